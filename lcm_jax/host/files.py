"""Files that are whole or not there, in folders and in Google Cloud Storage (`gs://bucket/…`)."""

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from etils import epath

from lcm_jax.errors import Unavailable, UserError
from lcm_jax.host import unfinished


def in_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether the path is an object's, or the beginning of objects' names."""
    return os.fspath(path).startswith("gs://")


def absolute(path: str | os.PathLike[str]) -> epath.Path:
    """Returns the path with the working directory before it, unless it is absolute or in a bucket."""
    return epath.Path(path) if in_bucket(path) else epath.Path(os.path.abspath(path))


def forget_listings(path: str | os.PathLike[str]) -> None:
    """Lets what is below a bucket's path be listed anew: gcsfs keeps its listings, whatever others delete."""
    if in_bucket(path):
        import fsspec  # comes with gcsfs, which only buckets need

        fsspec.filesystem("gs", finalize_on_close=True).invalidate_cache()  # the one that epath uses


def write(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file beside `path` and renames it there; makes the folder. Raises UserError where that can't be done."""
    data = content.encode() if isinstance(content, str) else content
    if in_bucket(path):
        with one_line(path):
            epath.Path(path).write_bytes(data)  # an object appears when all of it has come
        return
    with new_file(path) as new:
        new.write_bytes(data)


def make_folder(option: str, folder: epath.PathLike) -> None:
    """Makes the folder that `option` names, before work that takes long; raises UserError where nothing can be written.

    One that is there already stays as it is.
    """
    if in_bucket(folder):
        return  # where there are no folders
    folder = pathlib.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError:
        raise UserError(f"{option}: {folder} is a file; choose a folder") from None
    except OSError as error:
        raise UserError(f"{option}: {folder} can't be written: {error.strerror or error}") from None


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Gives the path of a file to write, which is renamed to `path` when it is complete and on the disk.

    Makes the folder. Raises UserError where something can't be written.
    """
    path = pathlib.Path(path)
    with one_line(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.folder(path) as folder:
            yield (new := folder / "new")
            unfinished.sync_file(new)
            new.replace(path)
        unfinished.sync_names(path.parent)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes JSON as `write` does."""
    write(path, json.dumps(value, indent=1) + "\n")


@contextlib.contextmanager
def one_line(path: str | os.PathLike[str], what: str = "written") -> Iterator[None]:
    """Turns an error of this file, or below this folder, into a UserError: it can't be `what`, and the reason.

    In a bucket it is Unavailable, which launchers take for worth another start, but for what is absent or forbidden.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if in_bucket(path):  # gcsfs, google-auth and aiohttp have kinds of their own
            reason = " ".join(f"{error or type(error).__name__}".split())[:200]
            if not (isinstance(error, FileNotFoundError | PermissionError) or reason.startswith("Forbidden")):
                raise Unavailable(f"{path} can't be {what}: {reason}") from None
        elif isinstance(error, FileExistsError):
            place = epath.Path(path)
            reason = f"{'it' if place.exists() else place.parent} is a file"
        elif isinstance(error, OSError):
            reason = str(error.strerror or error)
        else:
            raise
        raise UserError(f"{path} can't be {what}: {reason}") from None
