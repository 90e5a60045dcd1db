"""Files that run code when they are read: only this user may have written them."""

import os
import pathlib
import stat

from lcm_jax.errors import UserError
from lcm_jax.host import files


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Raises UserError if someone else owns this folder, or may write there."""
    with files.one_line(folder, "read"):
        _check(os.stat(folder), os.fspath(folder))


def read(path: str | os.PathLike[str]) -> bytes:
    """Reads a file that this user owns, in a folder of this user's, and that nobody else may write.

    Raises: UserError if it is another's, others may write it or its folder, it is a link, or it can't be read.
    """
    path = pathlib.Path(path)
    with files.one_line(path, "read"):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:  # by the open folder: nobody can exchange it between the checks and the reading
            _check(os.fstat(folder), os.fspath(path.parent))
            with os.fdopen(os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder), "rb") as file:
                _check(os.fstat(file.fileno()), os.fspath(path))
                return file.read()
        finally:
            os.close(folder)


def write(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file that `read` accepts, with the mode 0600, as `files.write` does.

    Raises: UserError if someone else owns its folder or may write there, or it can't be written.
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
