"""Pipeline that samples images from prompts with the model of a diffusers folder.

    pipe = load_pipeline("path/to/diffusers/folder")
    images = pipe(["a red seven on a blue background"], steps=4, guidance_scale=8.0, seed=0)

The folder determines the sampler: multistep consistency sampling with `LCMScheduler`, otherwise DDIM or DPM-Solver++
on the diffusion model's ODE. With an LCM-LoRA, a diffusion model supports `sampler="lcm"` too. This is the default with
an LCM-LoRA trained by lcm_jax; other LoRA files do not record that they are one:

    pipe = load_pipeline("folder", loras={"lcm.safetensors": 1.0, "style.safetensors": 0.8})
    images = pipe(["a red seven on a blue background"], sampler="lcm")
"""

import functools
import inspect
import os
import pathlib
import secrets
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from lcm_jax.diffusion import sampling
from lcm_jax.diffusion.guidance import is_guided
from lcm_jax.errors import UserError, is_out_of_memory, nearest, one_of, plain
from lcm_jax.families import family_of
from lcm_jax.host import arguments
from lcm_jax.host.images import to_uint8, to_unit
from lcm_jax.inference.generate import Sampler, generate, seed_key
from lcm_jax.interop.folder import Component, Folder, read_folder
from lcm_jax.interop.folder_writing import write_folder
from lcm_jax.interop.lora.merge import Loras, check, lcm_recipe, merged_kernels, with_kernels
from lcm_jax.interop.recipe import Recipe
from lcm_jax.interop.tokenizer import Tokenizer, Tokenizers, load_tokenizer
from lcm_jax.models import Flat, Network, Policy

SAMPLERS = ("ddim", "dpmpp", "lcm")  # diffusion models need an LCM-LoRA for "lcm"; consistency models have only "lcm"
DIFFUSERS_NAMES = {  # argument of diffusers' pipelines → ours
    "prompt": "prompts",
    "num_inference_steps": "steps",
    "generator": "seed=0, a whole number",
    "output_type": "output",
    "num_images_per_prompt": "prompts=[prompt] * count",
}
OUTPUTS = ("uint8", "float", "latents")
PEER_LCM_GUIDANCE = 8.5  # default of diffusers' LatentConsistencyModelPipeline
LARGEST = 2**14  # pixels per side; far above, XLA aborts the process
TEACHER_GUIDANCE, TEACHER_STEPS, LCM_STEPS = 7.5, 50, 4


class Bound:
    """A network bound to its weights, called with arrays; `method` selects another method than `__call__`."""

    def __init__(self, network: Network, params: Flat) -> None:
        self.network = network
        self.params = params
        self._apply: Callable[..., Any] = jax.jit(network.apply, static_argnames="method")

    def __call__(self, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        """Applies the network, jitted; arrays are NHWC."""
        return self._apply(self.params, *args, method=method, **kwargs)


class Pipeline:
    """A loaded model: `networks` ({component: `Bound`}), `family`, `tokenizer`, `process`, `folder`, `recipe`.

    A network is an attribute too: `pipe.vae`.
    """

    def __init__(self, folder: Folder, tokenizer: Tokenizer | Tokenizers, policy: Policy) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.policy = policy
        self.family = family_of(folder.pipeline_class)
        self.process = folder.schedule
        self.recipe = Recipe.read(folder.path)  # None unless lcm_jax distilled it
        self.networks = {name: _bind(component, policy) for name, component in folder.components.items()}
        self.is_lcm = folder.scheduler_class == "LCMScheduler"
        self.w_embedding_dim = self.family.w_embedding_dim(self.networks[self.family.denoiser].network.config)
        self._programs: dict[tuple[Any, ...], Callable[..., jax.Array]] = {}
        self.lora_recipe: Recipe | None = None  # recipe of an attached LCM-LoRA that lcm_jax distilled
        self._merged: dict[str, dict[str, np.ndarray]] = {}  # kernels that the attached LoRAs changed

    def __getattr__(self, name: str) -> Bound:
        """Returns the network of the component `name`."""
        if name in (networks := self.__dict__.get("networks", {})):
            return networks[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __call__(
        self,
        prompts: str | Sequence[str],
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | None = 0,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        timesteps: int | Sequence[int] | None = None,
        latents: Float[np.ndarray, "b h w c"] | None = None,
        noise: Float[np.ndarray, "n b h w c"] | None = None,
        output: str = "uint8",
        sampler: str | None = None,
        **others: Any,
    ) -> np.ndarray:
        """Samples one image per prompt.

        One program is compiled and cached per (number of prompts, steps, size). Numbers may have any library's types,
        or be strings ("4").

        Args:
          prompts: one string or several. Prompts that are too long are truncated with a warning. The token of a
            multi-vector textual inversion expands to all its vectors, as in diffusers.
          steps: number of sampling steps; 4 by default for a consistency model, 50 for a diffusion model.
          guidance_scale: w + 1. The default is 7.5 for a diffusion model, the middle of the trained range for a
            consistency model with a w-embedding (8.5 if unknown), and 1 for one without, as with an LCM-LoRA. Values
            outside the trained range give a warning. Without a w-embedding, values above 1 call the denoiser with and
            without the prompt in each step; other values mean no guidance (also 0 and below, as in diffusers).
          seed: in 0 … 2^64 - 1. Image i depends on the seed, on i and, through the noise between the steps of a
            consistency model, on the number of prompts. None takes a random seed for each call.
          negative_prompt: one string for all prompts, or one per prompt. Not supported by a consistency model with a
            w-embedding, nor without guidance.
          height, width: in pixels; by default the size that it was trained for.
          timesteps: descending training timesteps, or a single one, instead of `steps`.
          latents: initial noise (B, h, w, C), instead of noise from the seed.
          noise: noise (n-1, B, h, w, C) between the n steps of a consistency model, instead of noise from the seed.
          output: "uint8" (B, H, W, 3), "float" (the same in [0, 1]) or "latents" (B, h, w, C), scaled.
          sampler: "ddim" (default) or "dpmpp" for a diffusion model; "lcm" with an LCM-LoRA, where it is the default
            if the LoRA records that it is one.
          others: none; an argument of diffusers' pipelines is answered with its name here.

        Raises:
          TypeError: an unknown argument.
          UserError: a value of the wrong type, out of range, or not supported by this kind of model; a token without an
            embedding in the text encoder.
        """
        for name in others:
            ours = DIFFUSERS_NAMES.get(name, "")
            hint = f"; use {ours}" if ours else nearest(name, inspect.signature(self.__call__).parameters)
            raise TypeError(f"there is no argument {name}{hint}")
        prompts = arguments.texts("prompts", prompts)
        if not prompts:
            raise UserError("prompts is empty; give at least one prompt")
        one_of("output", output, OUTPUTS)
        kind = self._kind(sampler)
        grid = self._timesteps(kind, steps, timesteps)
        scale = self._guidance(kind, guidance_scale)
        guided = is_guided(scale, self.w_embedding_dim)
        negatives = _negatives(negative_prompt, len(prompts))
        if any(negatives) and self.w_embedding_dim:
            raise UserError(
                "a consistency model with a w-embedding takes no negative_prompt: its guidance was distilled with "
                "the empty prompt; leave it out"
            )
        if any(negatives) and not guided:
            raise UserError(f"negative_prompt has no effect at guidance_scale {scale:g}; choose one above 1")
        for prompt in dict.fromkeys([*prompts, *negatives]):
            if cut := self.tokenizer.cut(prompt):
                warnings.warn(
                    f"the prompt {_short(prompt)!r} is longer than {self.tokenizer.max_length} tokens; "
                    f"cut off: {plain(cut, 200)!r}",
                    UserWarning,
                    stacklevel=2,
                )

        shape = self.latent_shape(len(prompts), height, width)
        latent_key, noise_key = jax.random.split(
            seed_key(secrets.randbits(64) if seed is None else arguments.seed(seed))
        )
        if latents is None:
            keys = jax.vmap(functools.partial(jax.random.fold_in, latent_key))(jnp.arange(shape[0]))
            z_T = jax.vmap(functools.partial(jax.random.normal, shape=shape[1:]))(keys)
        else:
            z_T = arguments.array("latents", latents, shape)
        if noise is not None and kind != "lcm":
            raise UserError(f"noise has no effect with the sampler {kind}, which adds none; leave it out")
        between = noise_key if noise is None else arguments.array("noise", noise, (len(grid) - 1, *shape))

        program = self._program(
            kind, guided, output != "latents", bool(self.family.null) and negative_prompt is not None
        )
        try:
            result = program(
                {name: bound.params for name, bound in self.networks.items()},
                self.tokenizer(prompts),
                self.tokenizer(negatives),
                jnp.full(len(prompts), scale - 1.0, jnp.float32),
                grid,
                z_T,
                between,
            )
            drawn = np.asarray(result, np.float32)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"{len(prompts)} latents of {shape[1]} x {shape[2]} don't fit into this device's memory; "
                "give fewer prompts, or a smaller height and width"
            ) from None
        if not np.isfinite(drawn).all():
            raise UserError(
                f"{self.folder.path} samples values that are not finite at guidance_scale {scale:g}: its weights or "
                "the inputs are not finite or too large"
            )
        if output == "latents":
            return drawn
        pictures = to_unit(drawn)
        return to_uint8(pictures) if output == "uint8" else pictures

    @property
    def default_guidance(self) -> float:
        """The default guidance_scale with the default sampler."""
        return self._default_guidance(self._kind(None))

    def _default_guidance(self, kind: str) -> float:
        if kind != "lcm":
            return TEACHER_GUIDANCE
        if not self.w_embedding_dim:
            return 1.0  # guidance is distilled into such a student
        return (self.recipe.guidance_min + self.recipe.guidance_max) / 2 if self.recipe else PEER_LCM_GUIDANCE

    def latent_shape(
        self, count: int, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int, int]:
        """Returns the NHWC shape of `count` latents; height and width in pixels, or the default size."""
        factor = self.networks["vae"].network.config.factor
        sample = self.folder.components[self.family.denoiser].config.get("sample_size") or 64
        default = (sample, sample) if isinstance(sample, int) else tuple(sample)
        sizes = []
        for name, given, latent in (("height", height, default[0]), ("width", width, default[1])):
            pixels = latent * factor if given is None else arguments.whole(name, given)
            if not factor <= pixels <= LARGEST or pixels % factor:
                raise UserError(f"{name} is {pixels}; it must be a multiple of {factor} in {factor} … {LARGEST}")
            sizes.append(pixels // factor)
        return count, sizes[0], sizes[1], self.networks[self.family.denoiser].network.config.in_channels

    def set_loras(self, loras: Loras) -> None:
        """Merges LoRAs into the weights in memory, instead of those merged before.

        Args:
          loras: file (or folder, as diffusers or peft writes it) → weight. {} restores the folder's weights exactly; a
            weight of 0 leaves them unchanged.

        Raises:
          UserError: a weight is not finite; a file cannot be read or is for another base model.
        """
        merged = merged_kernels(self.folder, loras)
        self.lora_recipe = lcm_recipe(loras, self.process.num_train_timesteps)
        for name in self._merged.keys() | merged.keys():
            bound = self.networks[name]
            own, new = self.folder.components[name].params, merged.get(name, {})
            for path in self._merged.get(name, {}).keys() | new.keys():
                bound.params[path] = _put(new.get(path, own[path]), self.policy)
        self._merged = merged

    def save(self, folder: str | os.PathLike[str]) -> pathlib.Path:
        """Writes a folder like the loaded one, with the same tensors, names, dtypes and files.

        Attached LoRAs are merged. Other variants of the weights are not copied.

        Raises:
          UserError: the target is not writable, is the loaded folder, or contains something other than a model.
        """
        return write_folder(with_kernels(self.folder, self._merged), arguments.path("folder", folder))

    def lcm_timesteps(self, steps: int) -> Int[np.ndarray, " steps"]:
        """Returns `steps` of the timesteps that the model or LCM-LoRA was trained on; raises UserError for too many."""
        original, _ = self._lcm_grid
        return sampling.lcm_timesteps(arguments.whole("steps", steps), self.process, original)

    def _kind(self, sampler: str | None) -> str:
        if self.is_lcm:
            if sampler is not None and str(sampler) != "lcm":
                raise UserError(
                    f"sampler is {plain(repr(sampler), 60)}, but the folder holds a consistency model; leave it out"
                )
            return "lcm"
        if sampler is None:
            return "lcm" if self.lora_recipe else SAMPLERS[0]
        one_of("sampler", sampler, SAMPLERS)
        return sampler

    @property
    def _lcm_grid(self) -> tuple[int, float]:
        """N (original_inference_steps) and timestep_scaling of the model or the attached LCM-LoRA."""
        recipe, scheduler = self.lora_recipe, self.folder.scheduler
        if self.is_lcm or recipe is None:
            return scheduler.get("original_inference_steps", 50), float(scheduler.get("timestep_scaling", 10.0))
        return recipe.original_inference_steps, recipe.timestep_scaling

    def _timesteps(self, kind: str, steps: int | None, timesteps: int | Sequence[int] | None) -> np.ndarray:
        total = self.process.num_train_timesteps
        if timesteps is not None:
            if steps is not None:
                raise UserError("give steps or timesteps, not both")
            return sampling.check_timesteps(arguments.wholes("timesteps", timesteps), total)
        if kind == "lcm":
            return self.lcm_timesteps(LCM_STEPS if steps is None else steps)
        return sampling.trailing_timesteps(TEACHER_STEPS if steps is None else arguments.whole("steps", steps), total)

    def _guidance(self, kind: str, guidance_scale: float | None) -> float:
        if guidance_scale is None:
            return self._default_guidance(kind)
        guidance_scale = arguments.number("guidance_scale", guidance_scale)
        if self.w_embedding_dim and self.recipe:
            low, high = self.recipe.guidance_min, self.recipe.guidance_max
            if not low <= guidance_scale <= high:
                warnings.warn(
                    f"guidance_scale {guidance_scale:g} is outside this model's trained range, {low:g} to {high:g}",
                    UserWarning,
                    stacklevel=3,
                )
        return guidance_scale

    def _program(self, kind: str, guided: bool, decode: bool, negative: bool) -> Callable[..., jax.Array]:
        _, timestep_scaling = self._lcm_grid
        key = (kind, guided, decode, negative, timestep_scaling)
        if key not in self._programs:
            sampler = Sampler(
                family=self.family,
                networks={name: bound.network for name, bound in self.networks.items()},
                process=self.process,
                kind=kind,
                guided=guided,
                timestep_scaling=timestep_scaling,
                decode=decode,
                negative=negative,
            )
            self._programs[key] = jax.jit(functools.partial(generate, sampler))
        return self._programs[key]


def load_pipeline(
    path_or_hub_id: str | os.PathLike[str], *, loras: Loras | None = None, dtype: str = "float32"
) -> Pipeline:
    """Loads a folder written by diffusers' `StableDiffusionPipeline` or `LatentConsistencyModelPipeline`.

    Args:
      path_or_hub_id: a folder, or a model id on the Hugging Face Hub.
      loras: LoRA file → weight; see `Pipeline.set_loras`.
      dtype: compute dtype of the networks, "float32" or "bfloat16".

    Raises:
      UserError: the folder does not exist; a file is missing, damaged or a pickle; a class or configuration is not
        supported; tensors are missing, unexpected or of the wrong shape; a LoRA cannot be read or is for another base.
    """
    policy = Policy.named(dtype)
    check(loras or {})
    folder = read_folder(arguments.path("path_or_hub_id", path_or_hub_id))
    pipe = Pipeline(folder, load_tokenizer(folder), policy)
    pipe.set_loras(loras or {})
    return pipe


def _bind(component: Component, policy: Policy) -> Bound:
    params = {path: _put(array, policy) for path, array in component.params.items()}
    return Bound(component.network(policy=policy), params)


def _put(array: np.ndarray, policy: Policy) -> jax.Array:
    """Puts an array on the device, in the file's dtype or the compute dtype, whichever is smaller."""
    smaller = jnp.dtype(policy.compute).itemsize < array.dtype.itemsize
    return jnp.asarray(array, policy.compute if smaller else array.dtype)


def _negatives(given: Any, count: int) -> list[str]:
    """Returns `count` negative prompts: a single one is repeated, and None gives empty ones."""
    if given is None:
        return [""] * count
    negatives = arguments.texts("negative_prompt", given)
    if isinstance(given, (str, bytes)):
        return negatives * count
    if len(negatives) != count:
        raise UserError(
            f"negative_prompt has {len(negatives)} texts for {count} prompts; give one per prompt, or a single text"
        )
    return negatives


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= 40 else prompt[:40] + "…"
