"""Makes the entries of JAX's compile cache atomic and adds checksums.

JAX writes an entry in place. If the disk is full or the process is killed, a truncated entry remains, and every later
start reads it, warns and compiles again. Here an entry is written to a temporary file and renamed, and an entry with a
wrong checksum is removed. The first read or write error of a process is reported as a one-line warning.

File names and format are JAX's. The checksum follows the compressed executable as a skippable Zstandard frame, which
all decompressors ignore, including zlib's, so other programs can share the folder. Their entries have no checksum and
are used if they can be decompressed.
"""

import hashlib
import os
import warnings
from typing import Any

from etils import epath
from jax._src import compilation_cache, lru_cache
from jax._src.compilation_cache_interface import CacheInterface

from lcm_jax.errors import UserError
from lcm_jax.host import files

_FRAME = b"\x5c\x2a\x4d\x18" + (32).to_bytes(4, "little")  # RFC 8878, section 3.1.2: a frame of 32 bytes to skip
_jax_cache = compilation_cache.get_file_cache
_warned = False


def open_cache(path: str) -> tuple[CacheInterface, str] | None:
    """Opens the cache in a folder, like `jax._src.compilation_cache.get_file_cache`; returns None if it can't.

    A missing folder is created with mode 0700.
    """
    try:
        with files.one_line(path):
            if "://" not in path:
                os.makedirs(path, mode=0o700, exist_ok=True)
            found = _jax_cache(path)
    except UserError as error:
        warn(error)
        return None
    return found and (Entries(found[0]), path)


def warn(error: UserError) -> None:
    """Warns, once per process, that an entry can't be cached."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"{error}; programs that are not cached are compiled again at the next start", stacklevel=2)


class Entries(CacheInterface):
    """Wraps JAX's cache and keeps its file names and size limit."""

    def __init__(self, cache: Any) -> None:
        """Wraps `cache`, JAX's LRUCache or a wrapper of it."""
        self._cache, self._path = cache, cache._path

    def get(self, key: str) -> bytes | None:
        """Returns an entry, or None if it is missing, unreadable or damaged; removes a damaged entry."""
        file = self._file(key)
        try:
            with files.one_line(file, "read"):
                entry = self._cache.get(key)
                if entry is None or _is_whole(entry):
                    return entry
                file.unlink(missing_ok=True)
        except UserError as error:
            warn(error)
        return None

    def put(self, key: str, value: bytes) -> None:
        """Writes a complete entry, or warns and leaves none."""
        file, entry = self._file(key), value + _FRAME + hashlib.sha256(value).digest()
        try:
            if getattr(self._cache, "eviction_enabled", True):  # JAX must track the size, and writes in place
                with files.one_line(file):
                    try:
                        self._cache.put(key, entry)
                    except OSError:
                        file.unlink(missing_ok=True)
                        raise
            else:
                files.write(file, entry)
        except UserError as error:
            warn(error)

    def _file(self, key: str) -> epath.Path:
        return epath.Path(self._path) / f"{key}{lru_cache._CACHE_SUFFIX}"


def _is_whole(entry: bytes) -> bool:
    value, frame = entry[: -len(_FRAME) - 32], entry[-len(_FRAME) - 32 :]
    if frame.startswith(_FRAME):
        return frame.removeprefix(_FRAME) == hashlib.sha256(value).digest()
    try:
        compilation_cache.decompress_executable(entry)
    except Exception:  # zlib.error or Zstandard's error
        return False
    return True
