"""Consistency-model samplers, from prompts to images, in lcm_jax and diffusers."""

import dataclasses
import pathlib
import time
from typing import Any

import jax
import numpy as np

from lcm_jax import load_pipeline
from lcm_jax.families import SD
from lcm_jax.host.images import to_uint8
from lcm_jax.interop.folder import read_folder
from lcm_jax.interop.recipe import Recipe
from lcm_jax.interop.trained_folder import write_lcm_folder

PROMPT, GUIDANCE = "a red seven on a blue background", 8.0


@dataclasses.dataclass(frozen=True)
class Work:
    """The sampling task; `noise` fixes the initial latents and the noise between steps."""

    folder: pathlib.Path
    batch: int
    steps: int
    dtype: str

    def noise(self, shape: tuple[int, ...]) -> np.ndarray:
        """Returns float32 noise (steps, batch, h, w, c) for latents of shape (h, w, c)."""
        return np.random.default_rng(0).standard_normal((self.steps, self.batch, *shape)).astype(np.float32)


def write_student(teacher: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """Writes a consistency model with the teacher's weights and a random w-projection; returns its folder."""
    folder = read_folder(teacher)
    unet = folder.components["unet"]
    width = unet.config["block_out_channels"][0]
    projection = np.random.default_rng(1).standard_normal((256, width)).astype(np.float32) / 16
    recipe = Recipe("teacher", "ema", 3.0, 15.0, "ddim", 20, 50, 10.0, 256, "huber", 1, 1, 1e-5, 0.95)
    return write_lcm_folder(folder, {**unet.params, SD.w_projection: projection}, out, recipe=recipe)


class JaxSampler:
    """Sampler of `lcm_jax.load_pipeline`."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._pipe = load_pipeline(work.folder, dtype=work.dtype)
        draws = work.noise(self._pipe.latent_shape(1)[1:])
        self._given: dict[str, Any] = {"latents": draws[0], "noise": draws[1:]}
        start = time.perf_counter()
        self.facts = {"images": self.run(), "device": jax.devices()[0].device_kind}
        self.facts["first_seconds"] = time.perf_counter() - start

    def run(self) -> np.ndarray:
        """Samples images, uint8 (B, H, W, 3)."""
        return self._pipe(
            [PROMPT] * self._work.batch, self._work.steps, GUIDANCE, **self._given, batch_size=self._work.batch
        )


class TorchSampler:
    """Sampler of diffusers' `LatentConsistencyModelPipeline`."""

    def __init__(self, work: Work, channels_last: bool, compiled: bool) -> None:
        import diffusers
        import torch

        from lcm_jax.inference.verify import injected_noise

        self._work, self._torch, self._injected = work, torch, injected_noise
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        pipe: Any = diffusers.LatentConsistencyModelPipeline.from_pretrained(
            work.folder, torch_dtype=getattr(torch, work.dtype), use_safetensors=True
        )
        pipe.set_progress_bar_config(disable=True)
        pipe.to(self._device)
        for module in (pipe.unet, pipe.vae):
            if channels_last:
                module.to(memory_format=torch.channels_last)
            if compiled:
                module.compile()
        self._pipe = pipe
        side, channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels
        draws = work.noise((side, side, channels)).transpose(0, 1, 4, 2, 3)
        self._draws = torch.from_numpy(np.ascontiguousarray(draws)).to(self._device, getattr(torch, work.dtype))
        start = time.perf_counter()
        self.facts = {"images": self.run()}
        self.facts["first_seconds"] = time.perf_counter() - start

    def run(self) -> np.ndarray:
        """Samples images, uint8 (B, H, W, 3)."""
        with self._injected(list(self._draws[1:])), self._torch.no_grad():
            result = self._pipe(
                [PROMPT] * self._work.batch,
                num_inference_steps=self._work.steps,
                guidance_scale=GUIDANCE,
                latents=self._draws[0],
                output_type="np",
            )
        return to_uint8(result.images)
