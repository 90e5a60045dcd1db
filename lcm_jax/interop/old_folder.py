"""Checks that an export may replace an existing folder.

The old folder is removed, so files that no export writes would be lost: notes, LoRAs, images, training runs.
"""

import pathlib
import re

from lcm_jax.errors import UserError, plain
from lcm_jax.host import json_file
from lcm_jax.interop import contents

_FILES = ("model_index.json", "lcm_jax.json", ".gitattributes", ".gitignore", ".DS_Store")
_DOCUMENTS = ("README", "LICENSE", "LICENCE", "NOTICE", "COPYING", "AUTHORS", "CITATION")
_ADVICE = "move it away, or choose another --out"


def check_replaceable(target: pathlib.Path, source: pathlib.Path | None, out: str) -> None:
    """Checks that replacing a model folder loses no files.

    Allowed are documents, and settings and weights in the parts that the old model_index.json names. Files that
    `source` has under the same name are allowed too.

    Args:
      target: the existing folder, as a real path.
      source: the folder that the new model is read from.
      out: `target` as the user wrote it, for error messages.

    Raises:
      UserError: `target` contains `source` or files that `source` links to, or files that no export writes.
    """
    if not any(target.iterdir()):
        return
    if inside := source and _first_inside(source, target):
        raise UserError(f"the model is read from {inside}, inside {out}, which would be replaced; {_ADVICE}")
    index = json_file.read(target / "model_index.json", largest=json_file.CONFIG)
    parts = {name for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    for path in sorted(target.iterdir()):
        if path.name in parts and path.is_dir():
            unknown = [file for file in sorted(path.iterdir()) if not _is_of_part(file)]
        else:
            unknown = [] if _is_of_folder(path) else [path]
        for found in unknown:
            name = found.relative_to(target)
            if found.is_dir() or source is None or not (source / name).is_file():
                raise UserError(
                    f"{out} holds {plain(str(name), 150)}, which is not from an export and would be lost; {_ADVICE}"
                )


def _is_of_folder(path: pathlib.Path) -> bool:
    document = re.split(r"[._-]", path.name)[0].upper() in _DOCUMENTS
    return not path.is_dir() and (path.name in _FILES or document)


def _is_of_part(path: pathlib.Path) -> bool:
    return not path.is_dir() and (_is_of_folder(path) or bool(contents.of_copied_part([path.name])))


def _first_inside(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path | None:
    """Returns the first of `source`, its entries and its parts' entries whose real path is in `target`, or None."""
    entries = list(source.iterdir()) if source.is_dir() else []
    files = [file for path in entries if path.is_dir() for file in path.iterdir()]
    return next((path for path in [source, *entries, *files] if target in path.resolve().parents), None)
