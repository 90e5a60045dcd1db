"""Atomic file writes, to folders and to Google Cloud Storage (`gs://bucket/…`)."""

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
    """Returns whether the path is in Google Cloud Storage."""
    return os.fspath(path).startswith("gs://")


def check_bucket(option: str, path: str) -> None:
    """Raises UserError, which begins with `option`=`path`, unless a gs:// path has a bucket and a path in it."""
    bucket, _, rest = path.removeprefix("gs://").partition("/")
    if not bucket or not rest.strip("/"):
        raise UserError(f"{option}={path} must name a bucket and a path in it: gs://BUCKET/PATH")


def absolute(path: str | os.PathLike[str]) -> epath.Path:
    """Returns the absolute path; a path in a bucket is returned unchanged."""
    return epath.Path(path) if in_bucket(path) else epath.Path(os.path.abspath(path))


def forget_listings(path: str | os.PathLike[str]) -> None:
    """Drops gcsfs's cached listings if the path is in a bucket; they miss changes by other processes."""
    if in_bucket(path):
        import fsspec  # installed with gcsfs, which only buckets need

        fsspec.filesystem("gs", finalize_on_close=True).invalidate_cache()  # the instance that epath uses


def write(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file atomically and creates its folder. Raises UserError if that fails."""
    data = content.encode() if isinstance(content, str) else content
    if in_bucket(path):
        with one_line(path):
            epath.Path(path).write_bytes(data)  # an object becomes visible only when its upload is complete
        return
    with new_file(path) as new:
        new.write_bytes(data)


def make_folder(option: str, folder: epath.PathLike) -> None:
    """Creates a folder if it is missing and checks that it is writable, before long work starts.

    Does nothing for a bucket. Raises UserError, naming `option`, if the folder can't be created or written.
    """
    if in_bucket(folder):
        return  # buckets have no folders
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
    """Yields a temporary path to write, and at exit syncs the file and renames it to `path`.

    Creates the folder. Raises UserError if something can't be written.
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
    """Writes a value as JSON, like `write`."""
    write(path, json.dumps(value, indent=1) + "\n")


@contextlib.contextmanager
def one_line(path: str | os.PathLike[str], what: str = "written") -> Iterator[None]:
    """Converts an OSError inside the context to a UserError: `path` can't be `what` ("written", "read"), and why.

    In a bucket, any exception is converted: to UserError if access is forbidden or the object is missing, else to
    Unavailable, which launchers may retry.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if in_bucket(path):  # gcsfs, google-auth and aiohttp have their own exception types
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
