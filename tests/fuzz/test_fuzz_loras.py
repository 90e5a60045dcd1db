"""Damaged LoRA files of each dialect: merged, with finite weights, or refused in one line."""

import json
import os
import shutil

import numpy as np
import pytest
from fixtures_loras import UNET_TARGETS, random_adapter, random_lora
from mutations import damage_file, pick
from safetensors.numpy import load_file, save_file

from lcm_jax.interop.folder import read_folder
from lcm_jax.interop.lora_file import write_lora
from lcm_jax.interop.lora_merge import lcm_recipe, merged_kernels

RECIPE = '{"teacher": "t", "weights": "student", "guidance_min": 3.0, "guidance_max": 13.0, "solver": "ddim", \
"skip": 20, "original_inference_steps": 50, "timestep_scaling": 10.0, "w_embedding_dim": 0, "distance": "huber", \
"steps": 100, "batch_size": 8, "learning_rate": 1e-4, "ema_decay": 0.0}'
CONFIG = {"r": 4, "lora_alpha": 2.0, "peft_type": "LORA", "target_modules": ["to_q"], "bias": "none"}
PATTERNS = {"rank_pattern": {"to_out.0": 3}, "alpha_pattern": {r"mid_block\..*": 1.0, "to_out.0": 3.0}}


@pytest.fixture(scope="module")
def folder(micro):
    return read_folder(micro)


@pytest.fixture(scope="module")
def loras(folder, tmp_path_factory):
    """A folder with one LoRA for each dialect."""
    root = tmp_path_factory.mktemp("loras")
    adapters = random_lora(folder)
    for dialect in ("diffusers", "kohya"):
        (root / dialect).mkdir()
        write_lora(root / dialect / "x.safetensors", adapters, dialect=dialect, header={"lcm_jax": RECIPE})
    (root / "peft").mkdir()
    unet = {"unet": random_adapter(folder, "unet", UNET_TARGETS)}
    keys = load_file(write_lora(root / "peft" / "x.safetensors", unet))
    keys = {key.replace("unet.", "base_model.model.", 1): array for key, array in keys.items()}
    (root / "peft" / "x.safetensors").unlink()
    save_file(keys, root / "peft" / "adapter_model.safetensors")
    (root / "peft" / "adapter_config.json").write_text(json.dumps({**CONFIG, **PATTERNS}))
    return sorted(root.iterdir())


def read(folder, lora):
    path = lora / "x.safetensors" if lora.name != "peft" else lora
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
