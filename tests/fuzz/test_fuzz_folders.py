"""Damaged model folders: read, or refused in one line; what is read has finite weights in a dtype of weights."""

import os
import shutil

import jax.numpy as jnp
import numpy as np
from mutations import damage_folder, pick
from safetensors.numpy import load_file, save_file

from lcm_jax.interop.folder import read_folder
from lcm_jax.interop.recipe import Recipe
from lcm_jax.interop.tokenizer import load_tokenizer

RECIPE = Recipe("teacher", "ema", 3.0, 13.0, "ddim", 20, 50, 10.0, 0, "huber", 100, 8, 1e-4, 0.95)


def read(folder):
    """Reads all that sampling and training read of a folder before they compile."""
    found = read_folder(folder)
    tokenizer = load_tokenizer(found)
    ids = tokenizer(["a red seven", "…"])
    assert ids.shape == (2, tokenizer.max_length)
    tokenizer.cut("a red seven " * 50)
    Recipe.read(found.path)
    assert np.diff(found.schedule.alphas_cumprod).max() <= 0
    for component in found.components.values():
        for path, array in component.params.items():
            assert jnp.issubdtype(array.dtype, jnp.floating), f"a weight is {array.dtype}"
            assert np.isfinite(array.astype(np.float32)).all(), "a weight is not finite"
            assert path


def write_variants(micro, root):
    """The same model whole, in shards, and as a consistency model with a recipe."""
    shutil.copytree(micro, root / "whole")
    shards = shutil.copytree(micro, root / "shards")
    shutil.copytree(micro, root / "distilled")
    return [root / "whole", shards, root / "distilled"]


def split(folder):
    """Cuts the UNet's file into two shards with an index."""
    import json

    path = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    path.unlink()
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {key: names[i % 2] for i, key in enumerate(tensors)}
    for name in names:
        save_file({key: array for key, array in tensors.items() if weight_map[key] == name}, folder / "unet" / name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def test_folders(fuzz, micro, tmp_path):
    whole, shards, distilled = write_variants(micro, tmp_path)
    split(shards)
    (distilled / "lcm_jax.json").write_text(RECIPE.to_header()["lcm_jax"])
    for folder in (whole, shards, distilled):
        read(folder)

    def case(rng, place):
        folder = shutil.copytree(pick(rng, [whole, shards, distilled]), place / "model", copy_function=os.link)
        yield damage_folder(rng, folder)
        read(folder)

    fuzz(case, share=0.3)
