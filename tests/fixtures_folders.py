"""Tiny model folders with random weights, as diffusers writes them."""

import json
import pathlib

import numpy as np
import pytest

TOKENS = 16
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
VAE = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "sample_size": 16,
    "latent_channels": 4,
}
W_DIM = 32


def write_tokenizer(folder: pathlib.Path) -> None:
    """Writes a CLIP tokenizer with all bytes and a few merges, as vocab.json and merges.txt like older folders."""
    from tokenizers import pre_tokenizers

    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d</w>"), ("s", "e"), ("se", "v"), ("e", "n</w>"), ("sev", "en</w>")]
    words = [*characters, *(c + "</w>" for c in characters), *(a + b for a, b in merges)]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "pad_token": "<|endoftext|>", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def randomize(module, seed: int) -> None:
    """Randomizes all parameters, including norms, whose ones and zeros would hide a swapped scale and bias."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                is_norm = "norm" in name and name.endswith("weight")
                parameter.copy_(draw * 0.2 + (1.0 if is_norm else 0.0))
            else:
                parameter.copy_(draw * (0.5 if "embedding" in name else parameter[0].numel() ** -0.5))


def build_pipeline(tokenizer_folder: pathlib.Path, *, lcm: bool = False, prediction_type: str = "epsilon"):
    """Builds a tiny StableDiffusionPipeline, or LatentConsistencyModelPipeline if `lcm`, of diffusers."""
    import diffusers
    import transformers

    if not tokenizer_folder.exists():
        write_tokenizer(tokenizer_folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(tokenizer_folder))
    text_config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    parts = {
        "unet": diffusers.UNet2DConditionModel(**UNET, time_cond_proj_dim=W_DIM if lcm else None),
        "vae": diffusers.AutoencoderKL(**VAE),
        "text_encoder": transformers.CLIPTextModel(text_config),
    }
    for seed, part in enumerate(parts.values()):
        randomize(part, seed)
        part.eval()
    if lcm:
        scheduler = diffusers.LCMScheduler(**SCHEDULE, prediction_type=prediction_type)
    else:
        scheduler = diffusers.PNDMScheduler(
            **SCHEDULE, prediction_type=prediction_type, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False
        )
    pipeline_class = diffusers.LatentConsistencyModelPipeline if lcm else diffusers.StableDiffusionPipeline
    pipeline = pipeline_class(
        **parts,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write_little(folder: pathlib.Path, **sizes) -> pathlib.Path:
    """Writes the micro preset with few operations to trace and compile: every layer type, but as few as can be.

    The UNet's only transformer is in its middle block; the text encoder has one layer.
    """
    from lcm_jax.digits import presets  # late: it imports jax

    preset = {**presets.PRESETS["micro"], "unet_channels": [8], "vae_channels": [8], **sizes}
    levels = len(preset["unet_channels"])
    unet = {
        **presets.unet_config(preset),
        "down_block_types": ["DownBlock2D"] * levels,
        "up_block_types": ["UpBlock2D"] * levels,
    }
    text_config = presets.text_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "little", preset)
        patch.setattr(presets, "unet_config", lambda preset: unet)
        patch.setattr(presets, "text_config", lambda *given: {**text_config(*given), "num_hidden_layers": 1})
        return presets.write_blank("little", folder)


@pytest.fixture(scope="session")
def teacher_pipeline(tmp_path_factory):
    """A tiny StableDiffusionPipeline of diffusers."""
    return build_pipeline(tmp_path_factory.mktemp("tokenizer") / "tokenizer")


@pytest.fixture(scope="session")
def teacher_folder(teacher_pipeline, tmp_path_factory) -> pathlib.Path:
    """The folder of `teacher_pipeline`; copy it before changing it."""
    return _save(teacher_pipeline, tmp_path_factory.mktemp("teacher") / "sd")


@pytest.fixture(scope="session")
def lcm_pipeline(tmp_path_factory):
    """A tiny LatentConsistencyModelPipeline of diffusers."""
    return build_pipeline(tmp_path_factory.mktemp("tokenizer") / "tokenizer", lcm=True)


@pytest.fixture(scope="session")
def lcm_folder(lcm_pipeline, tmp_path_factory) -> pathlib.Path:
    """The folder of `lcm_pipeline`; copy it before changing it."""
    return _save(lcm_pipeline, tmp_path_factory.mktemp("lcm") / "lcm")


@pytest.fixture
def one_thread():
    """Torch is slower with several threads on layers this small."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _save(pipeline, folder: pathlib.Path, **options) -> pathlib.Path:
    pipeline.save_pretrained(folder, **options)
    (folder / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n# A micro model\n")
    return folder


def latents(seed: int, *shape: int) -> np.ndarray:
    """Returns standard normal float32 noise."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
