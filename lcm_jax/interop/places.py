"""Where the files of a model folder may lie: names are plain, links stay within the model or a hub cache.

A folder from elsewhere must not reach into this machine. A component named `../x` would be written outside the output
folder; a link `vae/config.json -> ~/.ssh/id_rsa` would copy a secret into an export that is then published. The rules:

1. Names of components and of weight files are plain names (`plain_name`).
2. A link to a file must end inside the model folder or be a blob of a hub cache, `models--NAME/blobs/HASH`, to which
   the hub's snapshots link. The cache, or its blobs, may have been moved and be links themselves.
3. A part itself may be a link to a folder anywhere, since models share parts that way, if that folder is recognizably
   a part: it holds the configuration of one. Its files must then stay within the folder that the link leads to.
4. Nothing but regular files and folders is read: opening a named pipe would wait for ever.

Only files that are opened or copied are judged: a checkpoint that no loader reads may be a link to anything.
"""

import os
import pathlib
import re
from typing import Any

from lcm_jax.errors import UserError, plain
from lcm_jax.host import json_file

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # the name of a blob: the SHA-1 or SHA-256 of its content
_LONGEST_NAME = 255  # bytes, the limit of the usual file systems
# A part holds one of these files; config.json is a common name, so it must also name a model.
_MARKS = ("scheduler_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json", "vocab.json")
_CONFIG_MARKS = ("_class_name", "model_type", "architectures")


def plain_name(name: Any, where: str) -> str:
    """Returns the name of a file or folder that lies directly in another folder.

    Args: the name, as a file from outside gives it; the file and what it names there, for the message.
    Raises: UserError for what is no text, empty, hidden, too long, or holds a separator, a colon (a drive on Windows),
      white space at an end or a character that can't be printed.
    """
    if (
        not isinstance(name, str)
        or not name
        or name.startswith(".")
        or name != name.strip()
        or any(c in "/\\:" or not c.isprintable() for c in name)
        or len(os.fsencode(name)) > _LONGEST_NAME
    ):
        raise UserError(f"{where} {plain(repr(name), 100)}, which is no plain name of something in the same folder")
    return name


def file_names(root: pathlib.Path, name: str) -> list[str]:
    """Returns the names of what lies directly in a part and is no folder, sorted; hidden ones are left out.

    Links are listed wherever they lead, even to nothing: `part_file` judges those that are used.

    Args: the model folder; the part's folder, a plain name.
    Raises: UserError for a part that is no folder, or a link to something else than a part. A part without a folder has
      no files, and is no error.
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
    """Returns the path of a part's file, checked to be safe to read and to copy.

    Args: the model folder; the part's folder, a plain name; the file's name.
    Raises: UserError names the file, and where its link leads.
    """
    part = root / name
    shared = not pathlib.Path(os.path.realpath(part)).is_relative_to(os.path.realpath(root))
    check_file(part / file, part if shared else root)
    return part / file


def check_file(path: pathlib.Path, within: pathlib.Path) -> None:
    """Checks that a file is safe to read and to copy.

    Args: the file; the folder that its links must not leave.
    Raises: UserError names the file, and where its link leads.
    """
    target = pathlib.Path(os.path.realpath(path))
    if path.is_symlink():
        if not target.is_relative_to(os.path.realpath(within)) and not _is_blob(target, path):
            raise UserError(
                f"{path} is a link to {target}, outside of {within}: a link to a file must stay within its folder or "
                "lead into a hub cache; put the file itself there"
            )
        if not target.exists():
            raise UserError(f"{path} is a broken link: {target} is missing")
    if target.exists() and not target.is_file():
        raise UserError(f"{path} is no regular file")


def _check_part(root: pathlib.Path, part: pathlib.Path) -> None:
    target = pathlib.Path(os.path.realpath(part))
    if part.is_symlink() and not target.exists():
        raise UserError(f"{part} is a broken link: {target} is missing")
    if not target.is_dir():
        raise UserError(f"{part} is no folder")
    if not target.is_relative_to(os.path.realpath(root)) and not _is_part(target):
        raise UserError(f"{part} is a link to {target}, which is no part of a model: it holds no configuration of one")


def _is_part(folder: pathlib.Path) -> bool:
    if any((folder / mark).is_file() for mark in _MARKS):
        return True
    config = folder / "config.json"
    return config.is_file() and any(mark in json_file.read(config) for mark in _CONFIG_MARKS)


def _is_blob(target: pathlib.Path, path: pathlib.Path) -> bool:
    if target.parent.name == "blobs" and target.parent.parent.name.startswith("models--"):
        return True
    # a cache that was moved: its place is known by the way to the file only, so the blob must have the name of one
    for snapshots in pathlib.Path(os.path.abspath(path)).parents:
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
            blobs = os.path.realpath(snapshots.parent / "blobs")
            return str(target.parent) == blobs and _HASH.fullmatch(target.name) is not None
    return False
