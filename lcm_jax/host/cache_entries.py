"""Entries of JAX's compile cache that are whole or not there, with a checksum.

JAX writes an entry in place. Where the disk is full, or the process is killed, a part of it stays, and each later start
reads that, warns and compiles again. Here an entry is written beside its place and renamed, and one that does not have
its checksum is removed. What can't be written or read is reported in one line per process.

The files have JAX's names and format. The checksum follows the compressed executable as a skippable frame of Zstandard,
which every decompressor ignores, zlib's too: other programs can share the folder. Their entries have no checksum, and
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
    """Opens the cache in this folder, as `jax._src.compilation_cache.get_file_cache` does; None if that is impossible.

    A folder that is not there is made for this user alone.
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
    """Reports, once per process, what can't be kept."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"{error}; what is not kept is compiled again at the next start", stacklevel=2)


class Entries(CacheInterface):
    """JAX's cache, by whose names and limits entries are read and written."""

    def __init__(self, cache: Any) -> None:
        """Args: an LRUCache of JAX, or one that wraps it."""
        self._cache, self._path = cache, cache._path

    def get(self, key: str) -> bytes | None:
        """Returns the entry; None if there is none, or it is damaged, and then it is removed."""
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
        """Writes an entry, or nothing."""
        file, entry = self._file(key), value + _FRAME + hashlib.sha256(value).digest()
        try:
            if getattr(self._cache, "eviction_enabled", True):  # JAX counts what is there, and writes in place
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
    except Exception:  # zlib.error, or Zstandard's
        return False
    return True
