"""Benchmark networks with random weights, from laptop size to Stable Diffusion 1.5."""

import dataclasses
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np

from lcm_jax.digits import presets
from lcm_jax.digits.tokenizer import write_tokenizer
from lcm_jax.interop.folder import Component, Folder, make_network
from lcm_jax.interop.folder_writing import write_folder


@dataclasses.dataclass(frozen=True)
class Size:
    """A UNet with cross-attention at every level but the last, as in Stable Diffusion, and its benchmark settings."""

    channels: tuple[int, ...]
    latents: int  # side
    batch: int
    layers: int = 1  # per block
    heads: int = 4
    context: int = 64  # width of the text encoder
    text_layers: int = 2
    tokens: int = 16


SIZES = {
    "micro": Size((8, 16), 8, 2, heads=2, context=16),
    "small": Size((32, 64), 8, 32),
    "middle": Size((64, 128, 256), 16, 16, context=128),
    "large": Size((128, 256, 512, 512), 32, 4, heads=8, context=256),
    "sd15": Size((320, 640, 1280, 1280), 64, 8, layers=2, heads=8, context=768, text_layers=12, tokens=77),
}


def write(size: Size, out: pathlib.Path, seed: int = 0) -> pathlib.Path:
    """Writes a diffusers folder of this size with random float32 weights; returns its path."""
    levels = len(size.channels)
    preset: dict[str, Any] = {
        **presets.PRESETS["micro"],
        "unet_channels": list(size.channels),
        "heads": size.heads,
        "text_width": size.context,
        "text_heads": max(1, size.context // 64),
        "groups": min(32, size.channels[0] // 2),
    }
    unet = {
        **presets.unet_config(preset),
        "layers_per_block": size.layers,
        "sample_size": size.latents,
        "down_block_types": ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1),
    }
    with tempfile.TemporaryDirectory() as temporary:
        rest = pathlib.Path(temporary)
        vocabulary = len(write_tokenizer(rest / "tokenizer", sorted(presets.caption_words()), size.tokens))
        text = {
            **presets.text_config(preset, vocabulary),
            "num_hidden_layers": size.text_layers,
            "max_position_embeddings": size.tokens,
        }
        vae = {
            **presets.vae_config({**preset, "vae_channels": [32, 32, 32], "groups": 8}),
            "sample_size": 4 * size.latents,
        }
        configs = {
            "unet": ("UNet2DConditionModel", unet),
            "vae": ("AutoencoderKL", vae),
            "text_encoder": ("CLIPTextModel", text),
        }
        components = {}
        for number, (name, (library_class, config)) in enumerate(configs.items()):
            params = make_network(library_class, config, where=name).init(jax.random.key(seed + number))
            components[name] = Component(
                name, library_class, config, {path: np.asarray(array) for path, array in params.items()}
            )
        scheduler = presets.scheduler_config(preset)
        return write_folder(Folder(rest, presets.MODEL_INDEX, scheduler, components), out)
