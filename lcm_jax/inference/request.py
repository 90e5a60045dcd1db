"""A checked call of a pipeline, and its parts: the arrays of one batch each."""

import dataclasses
import math
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from lcm_jax.diffusion.process import Process
from lcm_jax.errors import UserError
from lcm_jax.families.base import Tokens
from lcm_jax.host import arguments
from lcm_jax.inference import batches, noise
from lcm_jax.inference.rules import Settings


@dataclasses.dataclass(frozen=True)
class Part:
    """One full batch.

    Attributes:
      count: number of images that are wanted; what follows them only fills the batch.
      of_prompts: (b,) number of each image's prompt.
      z_T: (b, h, w, c) initial noise.
      between: (n, b, h, w, c) noise between the steps.
    """

    count: int
    of_prompts: Int[np.ndarray, " b"]
    z_T: Float[Any, "b h w c"]
    between: Float[Any, "n b h w c"]

    def of_batch(self, tokens: Tokens) -> Tokens:
        """Returns the token ids of each image's prompt."""
        return jax.tree.map(lambda ids: ids[self.of_prompts], tokens)


@dataclasses.dataclass(frozen=True)
class Request:
    """The images that a call asks for.

    Attributes:
      process: the noise process.
      settings: how they are sampled.
      shape: (B, h, w, c) of all latents.
      each: images per prompt; those of one prompt follow each other.
      batch_size: images per batch.
      first: number of the first image, on which its noise depends.
      key: of the seed.
      latents, noise: the caller's, instead of noise from the seed.
      start: the image's latents, to which the initial noise is added at the first timestep; None to start from noise.
    """

    process: Process
    settings: Settings
    shape: tuple[int, int, int, int]
    each: int
    batch_size: int
    first: int
    key: jax.Array
    latents: Float[np.ndarray, "b h w c"] | None = None
    noise: Float[np.ndarray, "n b h w c"] | None = None
    start: Float[np.ndarray, "b h w c"] | None = None

    @classmethod
    def checked(
        cls,
        process: Process,
        settings: Settings,
        shape: tuple[int, int, int, int],
        *,
        images_per_prompt: Any,
        batch_size: Any,
        first_image: Any,
        seed: Any,
        latents: Any,
        noise: Any,
        start: Float[np.ndarray, "b h w c"] | None = None,
    ) -> "Request":
        """Checks the arguments of a call for latents of this shape; raises UserError."""
        if noise is not None and settings.sampler != "lcm":
            raise UserError(f"noise has no effect with the sampler {settings.sampler}, which adds none; leave it out")
        size, first = at_least_one("batch_size", batch_size), arguments.whole("first_image", first_image)
        _check_first(first, shape, size)
        return cls(
            process=process,
            settings=settings,
            shape=shape,
            each=images_per_prompt,
            batch_size=size,
            first=first,
            key=_key(seed),
            latents=None if latents is None else np.asarray(arguments.array("latents", latents, shape)),
            noise=None if noise is None else np.asarray(arguments.array("noise", noise, (_between(settings), *shape))),
            start=start,
        )

    def parts(self) -> Iterator[Part]:
        """Yields the batches, in order."""
        for numbers in batches.parts(self.shape[0], self.batch_size):
            first = np.uint32(self.first + numbers[0])
            z_T, between = noise.draw(self.key, first, (self.batch_size, *self.shape[1:]), _between(self.settings))
            yield Part(
                count=int(numbers[-1] - numbers[0]) + 1,
                of_prompts=numbers // self.each,
                z_T=self._initial(z_T if self.latents is None else self.latents[numbers], numbers),
                between=between if self.noise is None else self.noise[:, numbers],
            )

    def _initial(self, z_T: Any, numbers: np.ndarray) -> Any:
        if self.start is not None:
            return self.process.add_noise(
                jnp.asarray(self.start[numbers]), z_T, jnp.asarray(self.settings.timesteps[0])
            )
        return z_T if self.settings.noise_scale == 1 else z_T * np.float32(self.settings.noise_scale)


def at_least_one(name: str, value: Any) -> int:
    """Converts a number of images to int; raises UserError below 1."""
    if (found := arguments.whole(name, value)) < 1:
        raise UserError(f"{name} is {found}; it must be at least 1")
    return found


def negatives(given: Any, count: int) -> list[str]:
    """Returns `count` negative prompts: a single one is repeated, and None gives empty ones."""
    if given is None:
        return [""] * count
    texts: Sequence[str] = arguments.texts("negative_prompt", given)
    if isinstance(given, (str, bytes)):
        return list(texts) * count
    if len(texts) != count:
        raise UserError(
            f"negative_prompt has {len(texts)} texts for {count} prompts; give one per prompt, or a single text"
        )
    return list(texts)


def _between(settings: Settings) -> int:
    """Returns how often the sampler adds noise."""
    return len(settings.timesteps) - 1 if settings.sampler == "lcm" else 0


def _check_first(first: int, shape: tuple[int, ...], size: int) -> None:
    last = noise.MOST // math.prod(shape[1:]) - size  # a padded batch draws noise for images that nobody wants
    if not 0 <= first <= last - shape[0]:
        raise UserError(f"first_image is {first} of {shape[0]}; the images of a seed must be in 0 … {last - 1}")


def _key(seed: Any) -> jax.Array:
    return noise.seed_key(secrets.randbits(64) if seed is None else arguments.seed(seed))
