"""A sampling program, compiled once per shapes of its arguments, which says so on stderr."""

import contextlib
import functools
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax

from lcm_jax.host import compile_cache, memory
from lcm_jax.inference.generate import Sampler, generate


class Program:
    """`generate` of one sampler. Call it with the arguments of `generate` after the sampler."""

    def __init__(self, sampler: Sampler, quiet: bool) -> None:
        """Compiles nothing yet. `quiet`: whether compiling is not reported."""
        self._sampler, self._quiet = sampler, quiet
        self._jitted = jax.jit(functools.partial(generate, sampler))
        self._compiled: dict[Any, Any] = {}

    @property
    def in_strips(self) -> bool:
        """Whether images are decoded in strips, or not at all."""
        return self._sampler.in_strips or not self._sampler.decode

    def __call__(self, *args: Any) -> jax.Array:
        """Samples one batch; compiles the program first if it is the first batch of these shapes."""
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
        key = (precision, *((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(args)))
        if key not in self._compiled:
            with contextlib.nullcontext() if self._quiet else reported(self._what(*args[6:8])):
                self._compiled[key] = self._jitted.lower(*args).compile()
                memory.release()
        return self._compiled[key](*args)

    def _what(self, timesteps: Any, z_T: Any) -> str:
        count, steps = len(z_T), len(timesteps)
        factor = self._sampler.networks["vae"].config.factor
        height, width = (side * factor for side in z_T.shape[1:3])
        what = "image" if self._sampler.decode else "latent"
        images = f"1 {what}" if count == 1 else f"{count} {what}s at once"
        return f"{steps} {self._sampler.kind} step{'s' * (steps != 1)} for {images} of {height} x {width} pixels"


@contextlib.contextmanager
def reported(what: str) -> Iterator[None]:
    """Prints one line on stderr: what is compiled, and at exit the seconds, and whether it was in the compile cache."""
    print(f"Compiling {what} ... ", end="", file=sys.stderr, flush=True)
    start, found = time.perf_counter(), compile_cache.from_cache()
    end = "stopped"
    try:
        yield
        end = f"{time.perf_counter() - start:.1f} s"
        if compile_cache.from_cache() > found:
            end += ", from the compile cache"
    finally:
        print(end, file=sys.stderr, flush=True)
