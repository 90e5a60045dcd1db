"""Writing a file so that it is whole or not there."""

import json
import os
import pathlib
from typing import Any

from lcm_jax.errors import UserError


def write(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file beside `path` and renames it there; makes the folder. Raises UserError where that can't be done."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except FileExistsError:
        raise UserError(f"{path} can't be written: {path.parent} is a file") from None
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}") from None


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes JSON as `write` does."""
    write(path, json.dumps(value, indent=1) + "\n")
