"""Pipeline that samples images from prompts with the model of a diffusers folder.

    pipe = load_pipeline("path/to/diffusers/folder")
    images = pipe(["a red seven on a blue background"], steps=4, guidance_scale=8.0, seed=0)

The folder determines the sampler: multistep consistency sampling with `LCMScheduler`, otherwise DDIM or DPM-Solver++
on the diffusion model's ODE. With an LCM-LoRA, a diffusion model supports `sampler="lcm"` too. This is the default with
an LCM-LoRA trained by lcm_jax; other LoRA files do not record that they are one:

    pipe = load_pipeline("folder", loras={"lcm.safetensors": 1.0, "style.safetensors": 0.8})
    images = pipe(["a red seven on a blue background"], sampler="lcm")
"""

import dataclasses
import os
import pathlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from lcm_jax.errors import UserError, is_out_of_memory, one_of, plain
from lcm_jax.families import family_of
from lcm_jax.host import arguments, compile_cache, platforms
from lcm_jax.host.images import to_uint8, to_unit
from lcm_jax.inference import batches, diffusers_names
from lcm_jax.inference.bound import Bound, bind, put
from lcm_jax.inference.generate import Sampler
from lcm_jax.inference.image_to_image import image_array, image_size, initial_latents
from lcm_jax.inference.program import Program
from lcm_jax.inference.request import Request, at_least_one, negatives
from lcm_jax.inference.rules import Rules
from lcm_jax.inference.sizes import checked_negative_sizes, checked_sizes
from lcm_jax.interop.folder import Folder, read_folder
from lcm_jax.interop.folder_writing import write_folder
from lcm_jax.interop.lora.merge import Loras, check, lcm_recipe, merged_kernels, with_kernels
from lcm_jax.interop.recipe import Recipe
from lcm_jax.interop.tokenizer import Tokenizer, Tokenizers, load_tokenizer
from lcm_jax.models import Policy

OUTPUTS = ("uint8", "float", "latents")
IN_STRIPS = 2**20  # pixels of an image, from which on the VAE decodes in strips
LARGEST = 2**14  # pixels per side; far above, XLA aborts the process


class Pipeline:
    """A loaded model: `networks` ({component: `Bound`}), `family`, `tokenizer`, `process`, `folder`, `recipe`.

    A network is an attribute too: `pipe.vae`. `rules` say which samplers, steps and guidance the model supports.
    """

    def __init__(
        self, folder: Folder, tokenizer: Tokenizer | Tokenizers, policy: Policy, *, quiet: bool = False
    ) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.policy = policy
        self.family = family_of(folder.model_index)
        self.process = folder.schedule
        self.recipe = Recipe.read(folder.path)  # None unless lcm_jax distilled it
        self.networks = {name: bind(component, policy) for name, component in folder.components.items()}
        self.w_embedding_dim = self.family.w_embedding_dim(self.networks[self.family.denoiser].network.config)
        self.rules = Rules(folder, self.family, self.process, self.w_embedding_dim, self.recipe)
        self.is_lcm = self.rules.is_lcm
        self._quiet = quiet
        self._programs: dict[tuple[Any, ...], Program] = {}
        self._merged: dict[str, dict[str, np.ndarray]] = {}  # kernels that the attached LoRAs changed

    def __getattr__(self, name: str) -> Bound:
        """Returns the network of the component `name`."""
        if name in (networks := self.__dict__.get("networks", {})):
            return networks[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}{diffusers_names.method(name)}")

    def __call__(
        self,
        prompts: str | Sequence[str] = (),
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | None = 0,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        timesteps: int | Sequence[int] | None = None,
        latents: Float[np.ndarray, "b h w c"] | None = None,
        noise: Float[np.ndarray, "n b h w c"] | None = None,
        output: str = "uint8",
        sampler: str | None = None,
        batch_size: int | None = None,
        first_image: int = 0,
        original_size: Sequence[int] | None = None,
        crop: Sequence[int] | None = None,
        target_size: Sequence[int] | None = None,
        negative_original_size: Sequence[int] | None = None,
        negative_crop: Sequence[int] | None = None,
        negative_target_size: Sequence[int] | None = None,
        image: Any = None,
        strength: float | None = None,
        decode_in_strips: bool | None = None,
        **others: Any,
    ) -> np.ndarray:
        """Samples the images of each prompt, one by default. B is the number of prompts times the images per prompt.

        One program is compiled and cached per (batch size, steps, image size, kind of guidance). Numbers may have any
        library's types, or be strings ("4").

        Args:
          prompts: one string or several. Prompts that are too long are truncated with a warning. The token of a
            multi-vector textual inversion expands to all its vectors, as in diffusers.
          steps: number of sampling steps; 4 by default for a consistency model, 50 for a diffusion model.
          guidance_scale: w + 1. The default is 7.5 for a diffusion model (SDXL: 5), the middle of the trained range for
            a consistency model with a w-embedding (8.5 if unknown; SDXL: 5), and 1 for one without, as with an
            LCM-LoRA. Values outside the trained range give a warning. Without a w-embedding, values above 1 call the
            denoiser with and without the prompt in each step; other values mean no guidance (also 0 and below, as in
            diffusers).
          seed: in 0 … 2^64 - 1. Image i depends on the seed and on i, not on the other images. None takes a random
            seed for each call.
          negative_prompt: one string for all prompts, or one per prompt. Not supported by a consistency model with a
            w-embedding, nor without guidance.
          images_per_prompt: the images of one prompt follow each other.
          height, width: in pixels; by default the size that it was trained for.
          timesteps: descending training timesteps, or a single one, instead of `steps`.
          latents: initial noise (B, h, w, C), instead of noise from the seed.
          noise: noise (n-1, B, h, w, C) between the n steps of a consistency model, instead of noise from the seed.
          output: "uint8" (B, H, W, 3), "float" (the same in [0, 1]) or "latents" (B, h, w, C), scaled.
          sampler: "ddim" (default) or "dpmpp" for a diffusion model, on evenly spaced timesteps; "euler" as diffusers'
            EulerDiscreteScheduler with the folder's timestep spacing; "lcm" with an LCM-LoRA, where it is the default
            if the LoRA records that it is one.
          batch_size: images that are sampled at once; the last batch is padded. Default: `default_batch_size`.
          first_image: number of the first image, to sample a long list in parts: with 8, the first prompt has image 8
            of the seed.
          original_size, crop, target_size: of a model that conditions on sizes (SDXL): (height, width) of the image
            before it was resized, (top, left) of the crop, (height, width) of the result; by default the image's size
            and (0, 0).
          negative_original_size, negative_crop, negative_target_size: those that guidance leads away from; as in
            diffusers both sizes or neither, and then (0, 0) by default. Without them they are the image's.
          image: to start from it instead of from noise: uint8 or float in [0, 1] (H, W, 3), one for all prompts or one
            per prompt, or scaled latents (h, w, C). Its size is that of the result.
          strength: in (0, 1], how much of the image is replaced; 0.8 by default (SDXL: 0.3). As in diffusers, a folder
            of LatentConsistencyModelPipeline takes `steps` steps from the lower part of its trained grid, any other
            model the last int(steps · strength) of `steps` steps.
          decode_in_strips: whether the VAE decodes horizontal strips one by one, which takes about half the memory. The
            images differ by rounding only. By default it does so for images of 2^20 pixels (1024 x 1024) or more.
          others: none; an argument of diffusers' pipelines is answered with its name here.

        Raises:
          TypeError: an unknown argument.
          UserError: a value of the wrong type, out of range, or not supported by this kind of model; a token without an
            embedding in the text encoder.
        """
        diffusers_names.refuse(others, self.__call__)
        prompts = arguments.texts("prompts", prompts)
        if not prompts:
            raise UserError("prompts is empty; give at least one prompt")
        one_of("output", output, OUTPUTS)
        settings = self.rules.settings(
            steps, guidance_scale, sampler, timesteps, strength=strength, from_image=image is not None
        )
        null_prompts = negatives(negative_prompt, len(prompts))
        self.rules.check_negatives(null_prompts, settings)
        self._warn_of_cuts([*prompts, *null_prompts])
        each = at_least_one("images_per_prompt", images_per_prompt)
        given_images = None
        if image is not None:
            given_images, height, width = self._images(image, height, width)
        shape = self.latent_shape(len(prompts) * each, height, width)
        default_size = self.default_batch_size(shape[0], height, width)
        batch_size = default_size if batch_size is None else at_least_one("batch_size", batch_size)
        start = None
        if given_images is not None:
            start = initial_latents(self.networks["vae"], given_images, shape[0], each, batch_size)
        request = Request.checked(
            self.process,
            settings,
            shape,
            images_per_prompt=each,
            batch_size=batch_size,
            start=start,
            first_image=first_image,
            seed=seed,
            latents=latents,
            noise=noise,
        )
        pixels = [side * self.networks["vae"].network.config.factor for side in shape[1:3]]
        given = {"original_size": original_size, "crop": crop, "target_size": target_size}
        sizes = checked_sizes(self.family, request.batch_size, *pixels, **given)
        negative_sizes = checked_negative_sizes(
            self.family, sizes, settings.guided, negative_original_size, negative_crop, negative_target_size
        )
        negative = bool(self.family.null) and negative_prompt is not None
        if not isinstance(decode_in_strips, bool | np.bool_ | None):
            raise UserError(f"decode_in_strips is {plain(repr(decode_in_strips), 100)}; it must be True, False or None")
        in_strips = pixels[0] * pixels[1] >= IN_STRIPS if decode_in_strips is None else bool(decode_in_strips)
        program = self._program(settings.sampler, settings.guided, output != "latents", negative, in_strips)
        sampled = np.concatenate([*self._sample(request, program, prompts, null_prompts, sizes, negative_sizes)])
        if output == "latents":
            return sampled
        images = to_unit(sampled)
        return to_uint8(images) if output == "uint8" else images

    def _sample(
        self,
        request: Request,
        program: Program,
        prompts: list[str],
        null_prompts: list[str],
        *sizes: np.ndarray | None,
    ) -> Iterator[np.ndarray]:
        """Yields the images of each batch in [-1, 1], or its latents."""
        weights = {name: bound.params for name, bound in self.networks.items()}
        ids, null_ids = self.tokenizer(prompts), self.tokenizer(null_prompts)
        settings = request.settings
        w = np.full(request.batch_size, settings.guidance_scale - 1.0, np.float32)
        try:
            for part in request.parts():
                of_batch = part.of_batch(ids), part.of_batch(null_ids)
                result = program(weights, *of_batch, *sizes, w, settings.timesteps, part.z_T, part.between)
                sampled = np.asarray(result, np.float32)[: part.count]
                if not np.isfinite(sampled).all():
                    raise UserError(
                        f"{self.folder.path} samples values that are not finite at guidance_scale "
                        f"{settings.guidance_scale:g}: its weights or the inputs are not finite or too large"
                    )
                yield sampled
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            fewer = "a smaller batch_size, or " if request.batch_size > 1 else ""
            fewer += "" if program.in_strips else "decode_in_strips=True (--decode-in-strips), or "
            raise UserError(
                f"{request.batch_size} latents of {request.shape[1]} x {request.shape[2]} don't fit into this device's "
                f"memory; give {fewer}a smaller height and width"
            ) from None

    def _images(self, image: Any, height: Any, width: Any) -> tuple[np.ndarray, int, int]:
        """Returns the images that a call starts from, and their height and width in pixels."""
        vae = self.networks["vae"].network.config
        found = image_array(image, vae.latent_channels)
        size = image_size(found, vae.factor)
        for name, given, own in (("height", height, size[0]), ("width", width, size[1])):
            if given is not None and arguments.whole(name, given) != own:
                raise UserError(f"{name} is {given}, that of the image {own}; leave it out, or resize the image")
        return found, *size

    def _warn_of_cuts(self, prompts: Iterable[str]) -> None:
        for prompt in dict.fromkeys(prompts):
            if cut := self.tokenizer.cut(prompt):
                warnings.warn(
                    f"the prompt {_short(prompt)!r} is longer than {self.tokenizer.max_length} tokens; "
                    f"cut off: {plain(cut, 200)!r}",
                    UserWarning,
                    stacklevel=3,
                )

    @property
    def default_guidance(self) -> float:
        """The default guidance_scale with the default sampler."""
        return self.rules.default_guidance(self.rules.sampler(None))

    @property
    def lora_recipe(self) -> Recipe | None:
        """The recipe of an attached LCM-LoRA that lcm_jax distilled."""
        return self.rules.lora_recipe

    def default_batch_size(self, count: int, height: int | None = None, width: int | None = None) -> int:
        """Returns how many of `count` images are sampled at once by default: 1 on a CPU, up to 32 elsewhere."""
        factor = self.networks["vae"].network.config.factor
        _, *sides, _ = self.latent_shape(count, height, width)
        return batches.default_size(jax.default_backend(), count, *(side * factor for side in sides))

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
        recipe = lcm_recipe(loras, self.process.num_train_timesteps)
        self.rules = dataclasses.replace(self.rules, lora_recipe=recipe, has_loras=bool(loras))
        for name in self._merged.keys() | merged.keys():
            bound = self.networks[name]
            own, new = self.folder.components[name].params, merged.get(name, {})
            for path in self._merged.get(name, {}).keys() | new.keys():
                bound.params[path] = put(new.get(path, own[path]), self.policy)
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
        return self.rules.lcm_timesteps(steps)

    def _program(self, kind: str, guided: bool, decode: bool, negative: bool, in_strips: bool) -> Program:
        _, timestep_scaling = self.rules.lcm_grid
        key = (kind, guided, decode, negative, decode and in_strips, timestep_scaling)
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
                in_strips=in_strips,
            )
            self._programs[key] = Program(sampler, self._quiet)
        return self._programs[key]


def load_pipeline(
    path_or_hub_id: str | os.PathLike[str],
    *,
    loras: Loras | None = None,
    dtype: str = "float32",
    quiet: bool = False,
    **others: Any,
) -> Pipeline:
    """Loads a folder written by a diffusers pipeline in `interop.layouts.LAYOUTS`.

    Compiled programs are kept on disk, as by the commands, unless this process already set JAX's own compile cache.

    Args:
      path_or_hub_id: a folder, or a model id on the Hugging Face Hub.
      loras: LoRA file → weight; see `Pipeline.set_loras`.
      dtype: compute dtype of the networks, "float32" or "bfloat16".
      quiet: whether to print nothing. Otherwise one line on stderr says when a program is compiled.
      others: none; an argument of diffusers' `from_pretrained` is answered with its name here.

    Raises:
      TypeError: an unknown argument.
      UserError: the folder does not exist; a file is missing, damaged or a pickle; a class or configuration is not
        supported; tensors are missing, unexpected or of the wrong shape; a LoRA cannot be read or is for another base.
    """
    diffusers_names.refuse(others, load_pipeline)
    policy = Policy.named(dtype)
    check(loras or {})
    folder = read_folder(arguments.path("path_or_hub_id", path_or_hub_id))
    platforms.skip_absent_tpu()
    compile_cache.enable(keep_own=True)
    pipe = Pipeline(folder, load_tokenizer(folder), policy, quiet=quiet)
    pipe.set_loras(loras or {})
    return pipe


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= 40 else prompt[:40] + "…"
