"""Image to image against diffusers: whole images, from pixels to pixels, of each pipeline with an LCMScheduler."""

import importlib

import diffusers
import numpy as np
import pytest
import torch
from fixtures_folders import SCHEDULE, latents
from fixtures_sdxl import build_sdxl

import lcm_jax
from lcm_jax.inference.verify import injected_noise

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = ["a red seven", "red red words"]
IMAGES = np.random.default_rng(5).random((2, 16, 16, 3)).astype(np.float32)


def sd(teacher_pipeline, lcm_pipeline, root):
    scheduler = diffusers.LCMScheduler(**SCHEDULE, steps_offset=1)  # without effect, and this pipeline warns of 0
    parts = {**teacher_pipeline.components, "scheduler": scheduler}
    return (
        diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False),
        diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False),
    )


def sdxl(teacher_pipeline, lcm_pipeline, root):
    peer = build_sdxl(root, 2, transformer_layers_per_block=1)
    parts = {**peer.components, "scheduler": lcm_pipeline.scheduler}
    return (
        diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False),
        diffusers.StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False),
    )


def lcm(teacher_pipeline, lcm_pipeline, root):
    parts = lcm_pipeline.components
    return lcm_pipeline, diffusers.LatentConsistencyModelImg2ImgPipeline(**parts, requires_safety_checker=False)


@pytest.mark.parametrize(
    ("make", "scale", "calls"),
    [
        # strength, steps: the calls of each pipeline take equally many steps, for which there is one program
        (lcm, 5.0, [(0.5, 4), (0.8, 4), (0.3, 4)]),
        (sd, 1.0, [(0.5, 4), (0.3, 8)]),
        (sdxl, 2.0, [(0.5, 4), (0.3, 8)]),
    ],
    ids=["lcm", "sd", "sdxl"],
)
def test_images_are_those_of_diffusers(teacher_pipeline, lcm_pipeline, tmp_path, make, scale, calls):
    folder, peer = make(teacher_pipeline, lcm_pipeline, tmp_path / "tokenizers")
    folder.save_pretrained(tmp_path / "model")
    pipe = lcm_jax.load_pipeline(tmp_path / "model")
    peer.set_progress_bar_config(disable=True)
    seen = []
    for strength, steps in calls:
        count = len(pipe.rules.settings(steps, scale, strength=strength, from_image=True).timesteps)
        z_T, noise = latents(1, 2, 8, 8, 4), latents(2, count - 1, 2, 8, 8, 4)
        eps, *between = (torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in (z_T, *noise))
        with injected_noise(between), pytest.MonkeyPatch.context() as patch:
            patch.setattr(importlib.import_module(type(peer).__module__), "randn_tensor", lambda *_, eps=eps, **__: eps)
            # the posterior's mean, of which we start
            patch.setattr("diffusers.models.autoencoders.vae.randn_tensor", lambda shape, **_: torch.zeros(shape))
            options = {"num_inference_steps": steps, "strength": strength, "guidance_scale": scale}
            theirs = peer(PROMPTS, image=IMAGES, output_type="np", **options).images
        ours = pipe(
            PROMPTS, steps, scale, image=IMAGES, strength=strength, latents=z_T, noise=noise, batch_size=2,
            output="float",
        )  # fmt: skip
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
        assert ((theirs > 0) & (theirs < 1)).mean() > 0.3  # clipped pixels would hide differences
        seen.append(ours)
    assert all(np.abs(one - seen[0]).max() > 0.01 for one in seen[1:])  # the strength matters
