"""Reads and writes files that run code when loaded: only the current user may have written them."""

import os
import pathlib
import stat

from lcm_jax.errors import UserError
from lcm_jax.host import files


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Raises UserError if another user owns the folder or may write to it."""
    with files.one_line(folder, "read"):
        _check(os.stat(folder), os.fspath(folder))


def read(path: str | os.PathLike[str]) -> bytes:
    """Reads a file that only the current user may have written.

    Raises: UserError if another user owns the file or its folder or may write to either, if the file is a symbolic
      link, or if it can't be read.
    """
    path = pathlib.Path(path)
    with files.one_line(path, "read"):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:  # via the open folder, so that it can't be replaced between the check and the read
            _check(os.fstat(folder), os.fspath(path.parent))
            with os.fdopen(os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder), "rb") as file:
                _check(os.fstat(file.fileno()), os.fspath(path))
                return file.read()
        finally:
            os.close(folder)


def write(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file that `read` accepts, atomically and with mode 0600.

    Raises: UserError if another user owns its folder or may write to it, or if the file can't be written.
    """
    check_folder(pathlib.Path(path).parent)
    files.write(path, content)
    with files.one_line(path):
        os.chmod(path, 0o600)


def _check(found: os.stat_result, path: str) -> None:
    if found.st_uid != os.geteuid():
        raise UserError(f"{path} belongs to another user")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UserError(f"others may write to {path}; chmod go-w {path}")
