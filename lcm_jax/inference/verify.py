"""Checks that diffusers loads a folder and samples the same images. torch is imported here only, inside functions."""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lcm_jax.adapters import lora as low_rank
from lcm_jax.errors import UserError
from lcm_jax.host.images import to_uint8
from lcm_jax.inference.pipeline import Pipeline, load_pipeline
from lcm_jax.interop import names
from lcm_jax.interop.lora.file import read_lora
from lcm_jax.interop.lora.keys import TEXT_MODEL
from lcm_jax.interop.lora.merge import adaptable
from lcm_jax.interop.trained_folder import with_lcm_scheduler

TOLERANCE = 1e-3
PROMPTS = ("a red seven", "")  # short, so that no tokenizer truncates them


def verify(
    folder: str | os.PathLike[str],
    *,
    lora: str | os.PathLike[str] | None = None,
    prompts: Sequence[str] = PROMPTS,
    steps: int = 4,
    seed: int = 0,
) -> float:
    """Compares samples of diffusers and lcm_jax from the same prompts and noise, both in float32.

    Args:
      folder: a model folder.
      lora: a LoRA file to attach. With an LCM-LoRA that records its recipe, both use the "lcm" sampler.
      prompts, steps, seed: what to sample; the seed is that of the noise.

    Returns:
      The largest max |difference| / max |diffusers' values| among the latents, the images decoded from the same
      latents, and each LoRA weight difference.

    Raises:
      UserError: torch, diffusers or, for a LoRA, peft is missing; diffusers reports missing or unexpected tensors, or
        adapts other modules with the LoRA; a difference is above 1e-3.
    """
    try:
        import diffusers
        import torch
        import transformers
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler
        from diffusers.schedulers.scheduling_lcm import LCMScheduler

        if lora:
            importlib.import_module("peft")
    except ImportError as error:
        raise UserError(f"verifying needs {error.name}: pip install lcm_jax[diffusers]") from None
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    pipe = load_pipeline(folder, loras={lora: 1.0} if lora else None)
    path = pipe.folder.path
    prompts = list(prompts)
    sampler = "lcm" if pipe.is_lcm or pipe.lora_recipe else "ddim"
    scale = 1.0 if pipe.lora_recipe else pipe.default_guidance
    draws = np.random.default_rng(seed).standard_normal((steps, *pipe.latent_shape(len(prompts)))).astype(np.float32)
    noise = draws[1:] if sampler == "lcm" else None
    ours = pipe(prompts, steps, scale, latents=draws[0], noise=noise, output="latents", sampler=sampler)

    peer = getattr(diffusers, pipe.folder.pipeline_class).from_pretrained(str(path), **load_networks(pipe))
    peer.set_progress_bar_config(disable=True)
    if lora:
        logging.getLogger("diffusers").setLevel(logging.ERROR)  # it would warn of a LoRA without text encoder weights
        peer.load_lora_weights(str(lora), adapter_name="verified")
    of_weights = _lora_difference(lora, pipe, peer) if lora else 0.0
    if pipe.lora_recipe:
        peer.scheduler = LCMScheduler.from_config(with_lcm_scheduler(pipe.folder, pipe.lora_recipe).scheduler)
    elif not pipe.is_lcm:
        peer.scheduler = DDIMScheduler.from_config(
            peer.scheduler.config, timestep_spacing="trailing", clip_sample=False
        )
    nchw = torch.from_numpy(draws).permute(0, 1, 4, 2, 3)
    with injected_noise(list(nchw[1:])), torch.no_grad():
        result = peer(prompts, num_inference_steps=steps, guidance_scale=scale, latents=nchw[0], output_type="latent")
        theirs = result.images.permute(0, 2, 3, 1).numpy()
        scaled = result.images / peer.vae.config.scaling_factor + (peer.vae.config.shift_factor or 0.0)
        decoded = peer.vae.decode(scaled).sample.permute(0, 2, 3, 1).numpy()

    differences = {
        "latents": _difference(ours, theirs),
        "images of the same latents": _difference(pipe.vae(theirs, method="to_images"), decoded),
    }
    for what, difference in differences.items():
        if not difference <= TOLERANCE:
            raise UserError(
                f"{lora or path}: diffusers' {what} differ from those of lcm_jax by {difference:.1e} of their "
                f"maximum; rounding explains {TOLERANCE:g}"
            )
    return max(of_weights, *differences.values())


def _lora_difference(file: str | os.PathLike[str], pipe: Pipeline, peer: Any) -> float:
    """Returns the largest relative difference of a module's dW; a wrong scale may hardly change the samples."""
    kernels = adaptable(pipe.folder)
    ours = {
        f"{name}.{path}": difference
        for name, adapter in read_lora(file, kernels).items()
        for path, difference in low_rank.differences(adapter.params, adapter.alphas).items()
    }
    theirs = {
        f"{name}.{path.removeprefix(TEXT_MODEL)}.kernel": names.from_file(
            "kernel", module.get_delta_weight("verified").detach().numpy()
        )
        for name in kernels
        for path, module in getattr(peer, name).named_modules()
        if hasattr(module, "get_delta_weight")
    }
    if other := sorted(ours.keys() ^ theirs.keys()):
        who = "only diffusers adapts it" if other[0] in theirs else "only lcm_jax adapts it"
        raise UserError(
            f"{file}: diffusers and lcm_jax disagree about {len(other)} of its modules, for example {other[0]}: {who}"
        )
    worst = max(ours, key=lambda path: _difference(ours[path], theirs[path]))
    if not (difference := _difference(ours[worst], theirs[worst])) <= TOLERANCE:
        raise UserError(
            f"{file}: diffusers' weight difference of {worst} differs from that of lcm_jax by {difference:.1e} of its "
            "maximum: it uses another alpha or tensor"
        )
    return difference


def _difference(ours: Any, theirs: np.ndarray) -> float:
    difference, largest = float(np.abs(np.asarray(ours) - theirs).max()), float(np.abs(theirs).max())
    if difference == 0:
        return 0.0
    return difference / largest if largest else math.inf


def lcm_sampler(pipe: Pipeline, steps: int) -> Callable[..., np.ndarray]:
    """Returns `sample(prompts, initial noise, noise between the steps, guidance_scale=…) -> uint8 images` by diffusers.

    The noise is NHWC, as in `Pipeline.__call__`. Raises UserError if torch, diffusers or transformers is missing.
    """
    try:
        import diffusers
        import torch
        import transformers
    except ImportError as error:
        raise UserError(f"sampling in diffusers needs {error.name}: pip install lcm_jax[diffusers]") from None
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    peer = getattr(diffusers, pipe.folder.pipeline_class).from_pretrained(str(pipe.folder.path), **load_networks(pipe))
    peer.set_progress_bar_config(disable=True)

    def sample(
        prompts: list[str], first: np.ndarray, between: np.ndarray | None, *, guidance_scale: float
    ) -> np.ndarray:
        def nchw(noise: np.ndarray) -> Any:
            return torch.from_numpy(np.ascontiguousarray(np.moveaxis(noise, -1, -3)))

        later = [] if between is None else list(nchw(between))
        with injected_noise(later), torch.no_grad():
            result = peer(
                prompts,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                latents=nchw(first),
                output_type="np",
            )
        return to_uint8(result.images)

    return sample


def load_networks(pipe: Pipeline) -> dict[str, Any]:
    """Loads each network with its library in float32; raises UserError for missing, unexpected or misshapen tensors."""
    import diffusers
    import torch
    import transformers

    loaded = {}
    for name, component in pipe.folder.components.items():
        if component.library_class.startswith("CLIP"):
            library, dtype = transformers, {"dtype": torch.float32}
        else:
            library, dtype = diffusers, {"torch_dtype": torch.float32}
        network, info = getattr(library, component.library_class).from_pretrained(
            str(pipe.folder.path), subfolder=name, output_loading_info=True, **dtype
        )
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if keys := [str(key) for key in info[what] if not str(key).endswith("position_ids")]:
                raise UserError(
                    f"{pipe.folder.path}/{name}: {library.__name__} reports {what}: {', '.join(sorted(keys)[:3])}"
                )
        loaded[name] = network
    return loaded


@contextlib.contextmanager
def injected_noise(noise: list[Any]) -> Iterator[None]:
    """Makes diffusers' LCMScheduler use these NCHW tensors as its noise, in order."""
    scheduling_lcm: Any = importlib.import_module("diffusers.schedulers.scheduling_lcm")
    drawn = iter(noise)
    original = scheduling_lcm.randn_tensor
    scheduling_lcm.randn_tensor = lambda shape, **_: next(drawn).reshape(shape)
    try:
        yield
    finally:
        scheduling_lcm.randn_tensor = original
