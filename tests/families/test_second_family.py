"""A second family, of another condition, is one record: here a small Stable Diffusion XL, compared with diffusers.

The condition is a tree, its null is not the empty prompt's, it depends on the image size, and there are two tokenizers.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from commands import train_on_one
from fixtures_folders import SCHEDULE, TOKENS, UNET, VAE, latents, randomize, write_tokenizer
from jaxtyping import Array, Float, Int

import lcm_jax
from lcm_jax import cli, export, families
from lcm_jax.errors import UserError
from lcm_jax.inference.verify import verify
from lcm_jax.interop import layouts
from lcm_jax.interop.folder import read_folder


def condition(
    encoders: Mapping[str, Callable[..., Any]], tokens: Mapping[str, Int[Array, "b l"]], size: tuple[int, int]
) -> dict[str, Array]:
    first, _ = encoders["text_encoder"](tokens["tokenizer"], method="hidden_states")
    second, pooled = encoders["text_encoder_2"](tokens["tokenizer_2"], method="hidden_states")
    time_ids = jnp.asarray((*size, 0, 0, *size), jnp.float32)  # original size, top left corner, size
    return {
        "context": jnp.concatenate([first[-2], second[-2]], axis=-1),
        "pooled": pooled,
        "time_ids": jnp.tile(time_ids, (len(pooled), 1)),
    }


def null(of: dict[str, Array]) -> dict[str, Array]:
    """Zeros, as a folder's `force_zeros_for_empty_prompt` says."""
    zeros = {name: jnp.zeros_like(of[name]) for name in ("context", "pooled")}
    return {**of, **zeros}


def call(
    unet: Callable[..., jax.Array],
    z: Float[Array, "b h w c"],
    t: Array,
    by: dict[str, Array],
    w_embedding: Array | None = None,
) -> Float[Array, "b h w c"]:
    added = {"text_embeds": by["pooled"], "time_ids": by["time_ids"]}
    return unet(z, t, by["context"], w_embedding, added)


LAYOUT = dataclasses.replace(
    layouts.SD,
    networks={**layouts.SD.networks, "text_encoder_2": "CLIPTextModelWithProjection"},
    tokenizers={"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"},
    copied=("feature_extractor", "image_encoder"),
    flagged=(),
    students=("StableDiffusionXLPipeline", "StableDiffusionXLPipeline"),
    check_fit=lambda path, **configs: None,
    settings={"force_zeros_for_empty_prompt": True},
)
SDXL = dataclasses.replace(
    families.SD,
    name="Stable Diffusion XL",
    layout=LAYOUT,
    text_encoders=("text_encoder", "text_encoder_2"),
    condition=condition,
    null=null,
    call=call,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROMPTS = ["a red seven", "red red words"]
WIDTHS, PROJECTION, TIME_DIM = (8, 16), 12, 4


@pytest.fixture(scope="module", autouse=True)
def _registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(layouts.LAYOUTS, "StableDiffusionXLPipeline", LAYOUT)
        patch.setattr(families, "FAMILIES", (*families.FAMILIES, SDXL))
        yield


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """A tiny StableDiffusionXLPipeline of diffusers."""
    root = tmp_path_factory.mktemp("tokenizers")
    tokenizers = []
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):  # as SDXL's own differ
        write_tokenizer(root / name)
        config = json.loads((root / name / "tokenizer_config.json").read_text())
        (root / name / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": pad}))
        tokenizers.append(transformers.CLIPTokenizer.from_pretrained(str(root / name)))
    configs = [
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            projection_dim=PROJECTION,
            hidden_act=act,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for tokenizer, width, act in zip(tokenizers, WIDTHS, ("quick_gelu", "gelu"), strict=True)
    ]
    parts = {
        "unet": diffusers.UNet2DConditionModel(
            **{**UNET, "cross_attention_dim": sum(WIDTHS), "transformer_layers_per_block": (2, 1)},
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=TIME_DIM,
            projection_class_embeddings_input_dim=PROJECTION + 6 * TIME_DIM,
        ),
        "vae": diffusers.AutoencoderKL(**VAE, scaling_factor=0.13025),
        "text_encoder": transformers.CLIPTextModel(configs[0]),
        "text_encoder_2": transformers.CLIPTextModelWithProjection(configs[1]),
    }
    for seed, part in enumerate(parts.values()):
        randomize(part, seed)
        part.eval()
    pipeline = diffusers.StableDiffusionXLPipeline(
        **parts,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        scheduler=diffusers.DDIMScheduler(**SCHEDULE, timestep_spacing="trailing", clip_sample=False),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def folder(peer, tmp_path_factory):
    path = tmp_path_factory.mktemp("sdxl") / "teacher"
    peer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pipe(folder):
    return lcm_jax.load_pipeline(folder)


def relative(ours, theirs):
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def test_condition_and_network(pipe, peer):
    """The teacher's raw output at a prompt, through the family's record."""
    condition = pipe.family.condition(pipe.networks, pipe.tokenizer(PROMPTS), (16, 24))
    z, t = latents(0, 2, 8, 12, 4), np.asarray([901, 20], np.int32)
    ours = pipe.family.call(pipe.unet, z, t, condition)
    with torch.no_grad():
        context, _, pooled, _ = peer.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[16, 24, 0, 0, 16, 24]] * 2, dtype=torch.float32)}
        theirs = peer.unet(
            torch.from_numpy(z).permute(0, 3, 1, 2), torch.from_numpy(t), context, added_cond_kwargs=added
        ).sample.permute(0, 2, 3, 1)
    assert relative(condition["context"], context) < 1e-5
    assert relative(condition["pooled"], pooled) < 1e-5
    assert relative(ours, theirs) < 1e-4


@pytest.mark.parametrize("negative", [None, "", "words"])
def test_samples_against_diffusers(pipe, peer, negative):
    """Without a negative prompt guidance leads away from zeros, with "" from the empty prompt."""
    z_T = latents(1, 2, 8, 8, 4)
    ours = pipe(PROMPTS, 4, 5.0, negative_prompt=negative, latents=z_T, output="latents")
    theirs = peer(
        PROMPTS,
        num_inference_steps=4,
        guidance_scale=5.0,
        negative_prompt=negative if negative is None else [negative] * 2,
        latents=torch.from_numpy(z_T).permute(0, 3, 1, 2),
        output_type="latent",
    ).images
    assert relative(ours, theirs.permute(0, 2, 3, 1)) < 1e-4


def test_a_distillation_step_and_export(folder, digits_data_dir, tmp_path):
    options = [
        f"--config={ROOT}/configs/digits.py:smoke",
        f"--config.model.folder={folder}",
        f"--config.data.data_dir={digits_data_dir}",
        f"--workdir={tmp_path}/run",
        "--config.mesh.cpu_devices=0",
        "--config.data.image_size=16",
        "--config.batch_size=2",
        "--config.steps=1",
        "--config.log.samples_every=1",
        "--config.lcd.w_embedding_dim=32",
    ]
    assert train_on_one(options) == 0
    assert (tmp_path / "run/samples/step_000001.png").exists()
    out = tmp_path / "lcm"
    assert cli.run(export.main, [f"--workdir={tmp_path}/run", f"--out={out}"], "export") == 0
    student = lcm_jax.load_pipeline(out)
    assert (student.folder.pipeline_class, student.is_lcm) == ("StableDiffusionXLPipeline", True)
    assert student.w_embedding_dim == 32
    assert verify(out) < 1e-4
    assert "StableDiffusionXLPipeline.from_pretrained" in (out / "README.md").read_text()


def test_a_setting_that_is_not_supported(folder, tmp_path):
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}))
    with pytest.raises(UserError, match="force_zeros_for_empty_prompt is False; supported: True"):
        read_folder(tmp_path)
