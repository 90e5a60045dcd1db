"""Damaged model folders: read with finite weights in a supported dtype, or one error line."""

import json
import os
import shutil

import jax.numpy as jnp
import numpy as np
from mutations import RECIPE, damage_folder, pick
from safetensors.numpy import load_file, save_file

from lcm_jax.interop.folder import read_folder
from lcm_jax.interop.recipe import Recipe
from lcm_jax.interop.tokenizer import load_tokenizer


def read(folder):
    """Reads everything that sampling and training read from a folder before they compile."""
    found = read_folder(folder)
    tokenizer = load_tokenizer(found)
    assert tokenizer(["a red seven", "…"]).shape == (2, tokenizer.max_length)
    tokenizer.cut("a red seven " * 50)
    Recipe.read(found.path)
    assert np.diff(found.schedule.alphas_cumprod).max() <= 0
    for component in found.components.values():
        for array in component.params.values():
            assert jnp.issubdtype(array.dtype, jnp.floating), f"a weight is {array.dtype}"
            assert np.isfinite(array.astype(np.float32)).all(), "a weight is not finite"


def split(folder) -> None:
    """Cuts the UNet's file into two shards with an index."""
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    path.unlink()
    names = [f"{path.stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {key: names[i % 2] for i, key in enumerate(tensors)}
    for name in names:
        save_file({key: array for key, array in tensors.items() if weight_map[key] == name}, path.parent / name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index))


def test_folders(fuzz, micro, tmp_path):
    folders = [shutil.copytree(micro, tmp_path / name) for name in ("whole", "in shards", "distilled")]
    split(folders[1])
    (folders[2] / "lcm_jax.json").write_text(json.dumps(RECIPE))
    for folder in folders:
        read(folder)

    def case(rng, place):
        folder = shutil.copytree(pick(rng, folders), place / "model", copy_function=os.link)
        yield damage_folder(rng, folder)
        read(folder)

    fuzz(case, share=0.25)
