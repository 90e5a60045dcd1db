"""Checks file names and links of a model folder, which may be untrusted.

A component named `../x` would be written outside the output folder. A link `vae/config.json -> ~/.ssh/id_rsa` would
copy a secret into an export. The rules:

1. Names of components and weight files are plain names (`plain_name`).
2. A link to a file must lead into the model folder or to a blob of a hub cache, `models--NAME/blobs/HASH`, as in hub
   snapshots. The cache or its blobs may have been moved and be links themselves.
3. A part may be a link to any folder that holds a part's configuration, since models share parts this way. Links in it
   must then stay within that folder.
4. Only regular files and folders are read: opening a named pipe would block forever.

Only files that are opened or copied are checked. A checkpoint that no loader reads may be any link.
"""

import os
import pathlib
import re
from typing import Any

from lcm_jax.errors import UserError, plain
from lcm_jax.host import json_file

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # name of a blob: SHA-1 or SHA-256 of its content
_LONGEST_NAME = 255  # bytes, the limit of common file systems
# A part holds one of these files, or a config.json with one of _CONFIG_MARKS, since config.json is a common name.
_MARKS = ("scheduler_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json", "vocab.json")
_CONFIG_MARKS = ("_class_name", "model_type", "architectures")


def plain_name(name: Any, where: str) -> str:
    """Returns `name` if it is a plain file or folder name; `where` starts the error message.

    Raises:
      UserError: it is not a string, is empty, hidden or longer than 255 bytes, or has a path separator, a colon (a
        Windows drive), leading or trailing white space, or a character that can't be printed.
    """
    if (
        not isinstance(name, str)
        or not name
        or name.startswith(".")
        or name != name.strip()
        or any(c in "/\\:" or not c.isprintable() for c in name)
        or len(os.fsencode(name)) > _LONGEST_NAME
    ):
        raise UserError(f"{where} {plain(repr(name), 100)}, which is not a plain name in the same folder")
    return name


def file_names(root: pathlib.Path, name: str) -> list[str]:
    """Returns the sorted names of a part's files, without hidden files; [] if the part has no folder.

    `name` is the part's subfolder of the model folder `root`, a plain name. All links are listed, even broken ones;
    `part_file` checks those that are used.

    Raises:
      UserError: the part is not a folder, can't be read, or is a link to something other than a part.
    """
    part = root / name
    if not part.is_symlink() and not part.exists():
        return []
    _check_part(root, part)
    try:
        return sorted(path.name for path in part.iterdir() if not path.name.startswith(".") and not path.is_dir())
    except OSError as error:
        raise UserError(f"{part} can't be read: {error.strerror}") from None


def part_file(root: pathlib.Path, name: str, file: str) -> pathlib.Path:
    """Returns the path of a file in a part's subfolder `name` (a plain name), after checking it with `check_file`."""
    part = root / name
    shared = not pathlib.Path(os.path.realpath(part)).is_relative_to(os.path.realpath(root))
    check_file(part / file, part if shared else root)
    return part / file


def check_file(path: pathlib.Path, within: pathlib.Path) -> None:
    """Checks that a file is safe to read and copy: if it is a link, it stays in the folder `within` or a hub cache.

    Raises:
      UserError: a link leads elsewhere or is broken, or the file is not a regular file.
    """
    target = pathlib.Path(os.path.realpath(path))
    if path.is_symlink():
        if not target.is_relative_to(os.path.realpath(within)) and not _is_blob(target, path):
            raise UserError(
                f"{path} is a link to {target}, outside of {within}: a link to a file must stay within its folder or "
                "lead into a hub cache; replace it with the file itself"
            )
        if not target.exists():
            raise UserError(f"{path} is a broken link: {target} is missing")
    if target.exists() and not target.is_file():
        raise UserError(f"{path} is not a regular file")


def _check_part(root: pathlib.Path, part: pathlib.Path) -> None:
    target = pathlib.Path(os.path.realpath(part))
    if part.is_symlink() and not target.exists():
        raise UserError(f"{part} is a broken link: {target} is missing")
    if not target.is_dir():
        raise UserError(f"{part} is not a folder")
    if not target.is_relative_to(os.path.realpath(root)) and not _is_part(target):
        raise UserError(f"{part} is a link to {target}, which is not a part of a model: it has no configuration")


def _is_part(folder: pathlib.Path) -> bool:
    if any((folder / mark).is_file() for mark in _MARKS):
        return True
    config = folder / "config.json"
    return config.is_file() and any(mark in json_file.read(config) for mark in _CONFIG_MARKS)


def _is_blob(target: pathlib.Path, path: pathlib.Path) -> bool:
    if target.parent.name == "blobs" and target.parent.parent.name.startswith("models--"):
        return True
    # a moved cache is recognized only by the path to the file, so the blob's name must be a hash
    for snapshots in pathlib.Path(os.path.abspath(path)).parents:
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
            blobs = os.path.realpath(snapshots.parent / "blobs")
            return str(target.parent) == blobs and _HASH.fullmatch(target.name) is not None
    return False
