"""Small untrained models with Stable Diffusion's architecture, for the captioned digits."""

import pathlib
import re
import tempfile
from typing import Any

import jax
import numpy as np

from lcm_jax.digits.dataset import ALL_PAIRS, DIGIT_NAMES, PHRASES, caption
from lcm_jax.digits.tokenizer import write_tokenizer
from lcm_jax.errors import one_of
from lcm_jax.host import files
from lcm_jax.interop.folder import Component, Folder, make_network
from lcm_jax.interop.folder_writing import write_folder

# Values that differ between the presets; the functions below hold the rest. Both map 32 x 32 pixels to 8 x 8 x 4
# latents and use 16 tokens per caption.
PRESETS: dict[str, dict[str, Any]] = {
    # A teacher that two CPU cores can train: 3.2 million parameters, 6.4 MB in float16.
    "digits": {
        "unet_channels": [64, 96],
        "vae_channels": [32, 32, 32],
        "groups": 8,
        "heads": 4,
        "text_width": 64,
        "text_heads": 4,
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "v_prediction",
        "zero_init": True,
    },
    # For tests: as small as possible, and without zero initialization, so that every layer affects the output.
    "micro": {
        "unet_channels": [8, 16],
        "vae_channels": [8, 8, 8],
        "groups": 4,
        "heads": 2,
        "text_width": 16,
        "text_heads": 2,
        "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon",
        "zero_init": False,
    },
}

IMAGE_SIZE = 32  # height and width in pixels
LATENT_SIZE = 8
TOKENS = 16  # per caption, including start and end

# The last layer of each residual branch, zero so that each branch starts as the identity (as in ADM, arXiv
# 2105.05233), and the last convolution, zero so that the initial output is zero.
ZERO_INIT = re.compile(r"(.*\.conv2|.*\.proj_out|conv_out)\.(kernel|bias)")


def unet_config(preset: dict[str, Any]) -> dict[str, Any]:
    """Returns the UNet2DConditionModel config of a small SD 1.x UNet with cross-attention at every level."""
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": preset["heads"],  # diffusers' misnomer: the number of heads
        "block_out_channels": preset["unet_channels"],
        "center_input_sample": False,
        "cross_attention_dim": preset["text_width"],
        "down_block_types": ["CrossAttnDownBlock2D"] * len(preset["unet_channels"]),
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 1,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-5,
        "norm_num_groups": preset["groups"],
        "out_channels": 4,
        "sample_size": LATENT_SIZE,
        "up_block_types": ["CrossAttnUpBlock2D"] * len(preset["unet_channels"]),
    }


def vae_config(preset: dict[str, Any]) -> dict[str, Any]:
    """Returns the AutoencoderKL config, one level per channel count; scaling_factor is a placeholder until training."""
    levels = len(preset["vae_channels"])
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": preset["vae_channels"],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": preset["groups"],
        "out_channels": 3,
        "sample_size": IMAGE_SIZE,
        "scaling_factor": 1.0,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def text_config(preset: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """Returns the config of a two-layer CLIPTextModel; the two highest ids are the start and end tokens."""
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": vocabulary - 2,
        "dropout": 0.0,
        "eos_token_id": vocabulary - 1,
        "hidden_act": "quick_gelu",
        "hidden_size": preset["text_width"],
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 4 * preset["text_width"],
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": TOKENS,
        "model_type": "clip_text_model",
        "num_attention_heads": preset["text_heads"],
        "num_hidden_layers": 2,
        "pad_token_id": vocabulary - 1,
        "projection_dim": preset["text_width"],
        "torch_dtype": "float32",
        "vocab_size": vocabulary,
    }


def scheduler_config(preset: dict[str, Any]) -> dict[str, Any]:
    """Returns a DDIMScheduler config with SD's beta range, or the cosine schedule, and trailing timesteps."""
    return {
        "_class_name": "DDIMScheduler",
        "beta_end": 0.012,
        "beta_schedule": preset["beta_schedule"],
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": preset["prediction_type"],
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "trailing",
    }


MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def caption_words() -> set[str]:
    """Returns all words and punctuation marks of the captions, split as CLIP's tokenizer splits them."""
    texts = (
        caption(digit, *pair, phrase)
        for digit in range(len(DIGIT_NAMES))
        for pair in ALL_PAIRS
        for phrase in range(len(PHRASES))
    )
    return {word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)}


def write_blank(preset_name: str, out: str | pathlib.Path, seed: int = 0) -> pathlib.Path:
    """Writes an untrained float32 pipeline folder to `out`, deterministic in `seed`, and returns its path.

    Raises UserError if the preset is unknown or `out` can't be written.
    """
    one_of("--preset", preset_name, PRESETS)
    preset = PRESETS[preset_name]
    with files.one_line(out), tempfile.TemporaryDirectory() as temporary:
        rest = pathlib.Path(temporary) / "rest"  # all files except the networks
        rest.mkdir()
        vocabulary = len(write_tokenizer(rest / "tokenizer", sorted(caption_words()), TOKENS))
        configs = {
            "unet": ("UNet2DConditionModel", unet_config(preset)),
            "vae": ("AutoencoderKL", vae_config(preset)),
            "text_encoder": ("CLIPTextModel", text_config(preset, vocabulary)),
        }
        keys = jax.random.split(jax.random.key(seed), len(configs))
        components = {}
        for key, (name, (library_class, config)) in zip(keys, configs.items(), strict=True):
            params = make_network(library_class, config, where=name).init(key)
            params = {path: np.asarray(array) for path, array in params.items()}
            if preset["zero_init"] and name == "unet":
                params = {p: np.zeros_like(a) if ZERO_INIT.fullmatch(p) else a for p, a in params.items()}
            components[name] = Component(name, library_class, config, params)
        return write_folder(Folder(rest, MODEL_INDEX, scheduler_config(preset), components), out)
