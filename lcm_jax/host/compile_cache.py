"""Persistent compilation cache, so that the second start of a command compiles nothing."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator

import jax
from jax._src import compilation_cache  # selects the cache's class; jax.experimental can only set the folder

from lcm_jax.host import cache_entries

DEFAULT = "~/.cache/lcm_jax/compiled"


@dataclasses.dataclass
class Counts:
    """Statistics of the programs that this process requested since `enable`.

    Attributes:
      folder: folder of the cache.
      programs: number of programs requested.
      from_cache: number of programs found in the cache.
      seconds: time spent compiling, without reading the cache.
    """

    folder: str
    programs: int = 0
    from_cache: int = 0
    seconds: float = 0.0

    def note_event(self, event: str, **_: str | int) -> None:
        """Counts requests and cache hits; an event listener for `jax.monitoring`."""
        self.programs += event == "/jax/compilation_cache/compile_requests_use_cache"
        self.from_cache += event == "/jax/compilation_cache/cache_hits"

    def note_duration(self, event: str, duration_secs: float, **_: str | int) -> None:
        """Adds up the compile time; a duration listener for `jax.monitoring`."""
        if event == "/jax/core/compile/backend_compile_duration":
            self.seconds += duration_secs
        elif event == "/jax/compilation_cache/cache_retrieval_time_sec":
            self.seconds -= duration_secs


_counts: Counts | None = None


def enable(*, keep_own: bool = False) -> str:
    """Enables JAX's persistent compilation cache, with atomic writes, and returns its folder.

    The folder is JAX_COMPILATION_CACHE_DIR (a path or `gs://…`) if set, else `~/.cache/lcm_jax/compiled`. A missing
    folder is created with mode 0700, since the entries are executed.

    Args:
      keep_own: whether to change nothing if the process has set another folder in `jax.config`.
    """
    global _counts
    own = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if keep_own and own and own not in (_counts and _counts.folder, os.environ.get("JAX_COMPILATION_CACHE_DIR")):
        return own
    if compilation_cache.get_file_cache is not cache_entries.open_cache:
        compilation_cache.get_file_cache = cache_entries.open_cache
        compilation_cache.reset_cache()  # in case something was compiled before
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(pathlib.Path(DEFAULT).expanduser())
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if _counts is None:
        _counts = Counts(folder)
        jax.monitoring.register_event_listener(_counts.note_event)
        jax.monitoring.register_event_duration_secs_listener(_counts.note_duration)
    return folder


def folder() -> str:
    """Returns the cache folder, or "" before `enable`."""
    return _counts.folder if _counts else ""


def from_cache() -> int:
    """Returns the number of programs found in the cache so far."""
    return _counts.from_cache if _counts else 0


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Context manager that disables the cache: programs are neither read from it nor written to it."""
    before = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    _switch(False)
    try:
        yield
    finally:
        _switch(before)


def _switch(on: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", on)
    compilation_cache.reset_cache()  # JAX reads the setting only once per process


def note_hit() -> None:
    """Counts a program that was loaded from disk without JAX's cache."""
    if _counts:
        _counts.programs += 1
        _counts.from_cache += 1


def summary() -> str:
    """Returns a line with the number of cache hits and compiled programs since `enable`; "" before it."""
    if _counts is None:
        return ""
    compiled = _counts.programs - _counts.from_cache
    if not compiled:
        return f"compile cache: {_counts.programs} hits, no miss ({_counts.folder})"
    return (
        f"compile cache: {_counts.from_cache} hits, {compiled} compiled in {_counts.seconds:.1f} s ({_counts.folder})"
    )
