"""Compiled programs kept on disk, so that the second start of a command compiles nothing."""

import os
import pathlib

import jax

DEFAULT = "~/.cache/lcm_jax/compiled"


def enable() -> str:
    """Turns JAX's persistent compilation cache on and returns its folder.

    The folder is JAX_COMPILATION_CACHE_DIR (a path or `gs://…`) where that is set, else `~/.cache/lcm_jax/compiled`.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(pathlib.Path(DEFAULT).expanduser())
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder
