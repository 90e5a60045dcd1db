"""Stable Diffusion XL at a small size, compared with diffusers: condition, samples, distillation and export."""

import json
import pathlib
import shutil

import diffusers
import numpy as np
import pytest
import torch
from commands import train_on_one
from fixtures_folders import SCHEDULE, latents
from fixtures_loras import TEXT_TARGETS, UNET_TARGETS, random_adapter
from fixtures_sdxl import build_sdxl

import lcm_jax
from lcm_jax import cli, export
from lcm_jax.errors import UserError
from lcm_jax.families.base import default_sizes
from lcm_jax.inference.verify import verify
from lcm_jax.interop.folder import read_folder
from lcm_jax.interop.lora.file import write_lora

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROMPTS = ["a red seven", "red red words"]


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    return build_sdxl(tmp_path_factory.mktemp("tokenizers"))


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
    text = pipe.family.encode(pipe.networks, pipe.tokenizer(PROMPTS))
    condition = pipe.family.condition(text, default_sizes(2, 16, 24))
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


SIZES = {"original_size": (20, 30), "target_size": (17, 25)}


@pytest.mark.parametrize(
    ("negative", "sizes"), [(None, {}), ("", {"crop": (3, 5), **SIZES}), ("words", {})], ids=["none", "empty", "words"]
)
def test_samples_against_diffusers(pipe, peer, negative, sizes):
    """Without a negative prompt guidance leads away from zeros, with "" from the empty prompt."""
    z_T = latents(1, 2, 8, 12, 4)
    ours = pipe(PROMPTS, 2, 5.0, negative_prompt=negative, latents=z_T, height=16, width=24, output="float", **sizes)
    theirs = peer(
        PROMPTS,
        height=16,
        width=24,
        num_inference_steps=2,
        guidance_scale=5.0,
        negative_prompt=negative if negative is None else [negative] * 2,
        latents=torch.from_numpy(z_T).permute(0, 3, 1, 2),
        output_type="np",
        **({"crops_coords_top_left": sizes["crop"], **SIZES} if sizes else {}),
    ).images
    assert relative(ours, theirs) < 1e-4


def test_negative_sizes_against_diffusers(pipe, peer):
    """Of one image: with more, diffusers gives half of the prompts the negative sizes."""
    z_T, options = latents(1, 1, 8, 12, 4), {"negative_original_size": (9, 40), "negative_target_size": (30, 7)}
    ours = {
        crop: pipe(
            PROMPTS[0], 2, 5.0, latents=z_T, height=16, width=24, output="float", negative_crop=crop,
            decode_in_strips=True, **options,
        )
        for crop in (None, (6, 2))
    }  # fmt: skip
    for crop, images in ours.items():
        theirs = peer(
            PROMPTS[0],
            height=16,
            width=24,
            num_inference_steps=2,
            guidance_scale=5.0,
            latents=torch.from_numpy(z_T).permute(0, 3, 1, 2),
            output_type="np",
            negative_crops_coords_top_left=crop or (0, 0),
            **options,
        ).images
        assert relative(images, theirs) < 1e-4
    assert relative(ours[None], ours[6, 2]) > 1e-3


@pytest.mark.parametrize(
    ("scale", "sizes", "message"),
    [
        (5.0, {"negative_crop": (1, 2)}, "negative_original_size is missing; give negative_original_size and negat"),
        (1.0, {"negative_original_size": (1, 2)}, "negative sizes have no effect without guidance; leave them out"),
        (5.0, {"negative_original_size": (1, 2), "negative_target_size": 3}, "negative_target_size is 3; it must be"),
    ],
    ids=["crop alone", "unguided", "one number"],
)
def test_wrong_negative_sizes(pipe, scale, sizes, message):
    with pytest.raises(UserError, match=message):
        pipe(PROMPTS, 2, scale, **sizes)


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # of diffusers' EulerDiscreteScheduler
def test_image_to_image_and_euler_against_diffusers(peer, pipe, folder, tmp_path):
    """The published scheduler: Euler with leading timesteps and an offset of one."""
    path = changed(
        folder, tmp_path / "folder", "scheduler/scheduler_config.json", timestep_spacing="leading", steps_offset=1
    )
    euler, z_0, z_T = lcm_jax.load_pipeline(path), latents(2, 2, 8, 8, 4), latents(3, 2, 8, 8, 4)
    scheduler = diffusers.EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading", steps_offset=1)
    parts = {**peer.components, "scheduler": scheduler}
    options = {"guidance_scale": 1.0, "output_type": "latent"}
    given = {"latents": torch.from_numpy(z_T).permute(0, 3, 1, 2), "num_inference_steps": 4}
    theirs = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)(PROMPTS, **given, **options).images
    ours = euler(PROMPTS, 4, 1.0, latents=z_T, sampler="euler", output="latents")
    assert relative(ours, theirs.permute(0, 2, 3, 1)) < 1e-4

    other = diffusers.StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    with pytest.MonkeyPatch.context() as patch:  # its noise
        patch.setattr(
            "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img.randn_tensor",
            lambda *_, **__: given["latents"],
        )
        image = torch.from_numpy(z_0).permute(0, 3, 1, 2)
        theirs = other(PROMPTS, image=image, strength=0.6, num_inference_steps=7, **options).images  # 4 of 7 steps
    ours = euler(PROMPTS, 7, 1.0, latents=z_T, image=z_0, strength=0.6, sampler="euler", output="latents")
    assert relative(ours, theirs.permute(0, 2, 3, 1)) < 1e-4
    assert len(pipe.rules.settings(10, from_image=True).timesteps) == 3  # the default strength is 0.3


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"crop": 3}, "crop is 3; it must be two whole numbers in 0 … 16384, top and left"),
        ({"original_size": (-1, 8)}, "original_size is .-1, 8.; it must be two whole numbers in 0 … 16384, height"),
        ({"target_size": (8, 0.5)}, "target_size is 0.5"),
    ],
    ids=["one", "negative", "broken"],
)
def test_sizes_out_of_range(pipe, sizes, message):
    with pytest.raises(UserError, match=message):
        pipe(PROMPTS, 2, **sizes)


def changed(folder, to, part, **values):
    """A copy of the folder with other values in one of its JSON files."""
    shutil.copytree(folder, to)
    (to / part).write_text(json.dumps({**json.loads((folder / part).read_text()), **values}))
    return to


def test_the_empty_prompt_is_encoded_where_the_folder_says_so(folder, peer, tmp_path):
    path = changed(folder, tmp_path / "folder", "model_index.json", force_zeros_for_empty_prompt=False)
    z_T = latents(1, 1, 8, 8, 4)
    pipe = lcm_jax.load_pipeline(path)
    ours, encoded = (pipe(PROMPTS[0], 2, latents=z_T, output="latents", negative_prompt=n) for n in (None, ""))
    np.testing.assert_array_equal(ours, encoded)
    assert pipe.default_guidance == 5.0


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


def test_a_lora_of_all_three_networks(folder, tmp_path):
    loaded, targets = read_folder(folder), {"unet": UNET_TARGETS}
    adapters = {
        name: random_adapter(loaded, name, targets.get(name, TEXT_TARGETS), seed)
        for seed, name in enumerate(("unet", "text_encoder", "text_encoder_2"))
    }
    file = write_lora(tmp_path / "x.safetensors", adapters, dialect="kohya")
    assert verify(folder, lora=file) < 1e-4


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("model_index.json", {"force_zeros_for_empty_prompt": "no"}, "force_zeros_for_empty_prompt is 'no'; supported"),
        ("model_index.json", {"text_encoder_2": [None, None]}, "does not name a text_encoder_2"),
        (
            "model_index.json",
            {"_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [None, None]},
            "it looks like SDXL's refiner",
        ),
        ("unet/config.json", {"cross_attention_dim": 32}, "unet and text_encoder and text_encoder_2 don't fit"),
        ("unet/config.json", {"addition_time_embed_dim": 8}, r"projection_dim \+ 6 · addition_time_embed_dim 56"),
        ("unet/config.json", {"addition_embed_type": None}, "addition_embed_type is None; supported: 'text_time'"),
    ],
    ids=["setting", "encoder", "refiner", "width", "sizes", "unet of sd"],
)
def test_a_folder_that_does_not_fit(folder, tmp_path, part, values, message):
    with pytest.raises(UserError, match=message):
        read_folder(changed(folder, tmp_path / "folder", part, **values))
