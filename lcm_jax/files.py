"""Files that are whole or not there, in folders and in Google Cloud Storage (`gs://bucket/…`)."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from etils import epath

from lcm_jax.errors import UserError


def in_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether the path is an object's, or the beginning of objects' names."""
    return os.fspath(path).startswith("gs://")


def absolute(path: str | os.PathLike[str]) -> epath.Path:
    """Returns the path with the working directory before it, unless it is absolute or in a bucket."""
    return epath.Path(path) if in_bucket(path) else epath.Path(os.path.abspath(path))


def write(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file beside `path` and renames it there; makes the folder. Raises UserError where that can't be done."""
    data = content.encode() if isinstance(content, str) else content
    with one_line(path):
        if in_bucket(path):
            epath.Path(path).write_bytes(data)  # an object appears when all of it has come
            return
        path = pathlib.Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes JSON as `write` does."""
    write(path, json.dumps(value, indent=1) + "\n")


@contextlib.contextmanager
def one_line(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an error of writing this file, or below this folder, into a UserError that names it and the reason."""
    try:
        yield
    except FileExistsError:
        place = epath.Path(path)
        raise UserError(f"{path} can't be written: {'it' if place.exists() else place.parent} is a file") from None
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}") from None
    except Exception as error:
        if isinstance(error, UserError) or not in_bucket(path):
            raise
        raise UserError(f"{path} can't be written: {' '.join(str(error).split())[:200]}") from None
