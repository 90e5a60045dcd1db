"""Damaged LoRA files of each dialect: merged, with finite weights, or refused in one line."""

import json
import os
import shutil

import numpy as np
import pytest
from fixtures_loras import random_lora
from mutations import RECIPE, damage_file, pick
from safetensors.numpy import load_file, save_file

from lcm_jax.interop.folder import read_folder
from lcm_jax.interop.lora.file import write_lora
from lcm_jax.interop.lora.ldm_names import ldm_names
from lcm_jax.interop.lora.merge import lcm_recipe, merged_kernels

FILE = "x.safetensors"
CONFIG = {"r": 4, "lora_alpha": 2.0, "peft_type": "LORA", "target_modules": ["to_q"], "bias": "none"}
PATTERNS = {"rank_pattern": {"to_out.0": 3}, "alpha_pattern": {r"mid_block\..*": 1.0, "to_out.0": 3.0}}


@pytest.fixture(scope="module")
def folder(micro):
    return read_folder(micro)


@pytest.fixture(scope="module")
def loras(folder, tmp_path_factory):
    """A folder with one LoRA for each dialect."""
    root, adapters = tmp_path_factory.mktemp("loras"), random_lora(folder)
    folders = [root / dialect for dialect in ("diffusers", "kohya", "ldm", "peft")]
    for each in folders:
        each.mkdir()
    files = {
        dialect: write_lora(root / dialect / FILE, adapters, dialect=dialect, header={"lcm_jax": json.dumps(RECIPE)})
        for dialect in ("diffusers", "kohya")
    }
    ldm = {kohya(module): kohya(name) for module, name in ldm_names(adapters["unet"].alphas).items()}
    tensors = {tuple(key.split(".", 1)): array for key, array in load_file(files["kohya"]).items()}
    tensors = {f"{ldm.get(module, module)}.{part}": array for (module, part), array in tensors.items()}
    save_file(tensors, root / "ldm" / FILE)
    tensors = load_file(write_lora(root / FILE, {"unet": adapters["unet"]}))
    tensors = {key.replace("unet.", "base_model.model.", 1): array for key, array in tensors.items()}
    save_file(tensors, root / "peft/adapter_model.safetensors")
    (root / "peft/adapter_config.json").write_text(json.dumps({**CONFIG, **PATTERNS}))
    return folders


def kohya(module: str) -> str:
    return f"lora_unet_{module}".replace(".", "_")


def read(folder, lora):
    path = lora if lora.name == "peft" else lora / FILE
    for kernels in merged_kernels(folder, {path: 0.5}).values():
        assert all(np.isfinite(kernel).all() for kernel in kernels.values()), "a weight is not finite"
    lcm_recipe({path: 0.5})


def test_loras(fuzz, folder, loras):
    for lora in loras:
        read(folder, lora)

    def case(rng, place):
        original = pick(rng, loras)
        lora = shutil.copytree(original, place / original.name, copy_function=os.link)
        yield f"{original.name}/{damage_file(rng, pick(rng, sorted(lora.iterdir())))}"
        read(folder, lora)

    fuzz(case, share=0.2)
