"""Resolves a path or a Hugging Face Hub id to a local folder."""

import os
import pathlib
import re
from collections.abc import Collection

from lcm_jax.errors import UserError
from lcm_jax.host import unfinished
from lcm_jax.interop import model_index
from lcm_jax.interop.layouts import LAYOUTS

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# No pickles, no top-level single-file checkpoints, and only the unnamed variant.
_ALLOW = ["*.json", "*.txt", "*.md", "LICENSE*", "*/*.safetensors"]
_IGNORE = [pattern for name in ("fp32", "fp16", "bf16") for pattern in (f"*.{name}.*", f"*.{name}-*")] + ["*non_ema*"]


def local_folder(path_or_hub_id: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the folder at a path, or downloads the hub model of that id to the hub cache and returns its folder.

    Raises:
      UserError: the path is a file or can't be read, or there is no such folder and the download fails.
    """
    path, name = pathlib.Path(os.path.expanduser(path_or_hub_id)), str(path_or_hub_id)
    try:
        if not path.exists():
            unfinished.restore(pathlib.Path(os.path.realpath(path)))
        if path.is_dir():
            if (path / "checkpoints").is_dir() and not (path / "model_index.json").exists():
                raise UserError(
                    f"{name} is the workdir of a run, not a model: python -m lcm_jax.export --workdir={name} "
                    f"--out={name}/model writes one"
                )
            return path
        if path.exists():
            raise UserError(f"{name} is a file; give the folder that holds model_index.json")
    except OSError as error:  # a name that is too long, a folder that this user must not read
        raise UserError(f"{name} can't be read: {error.strerror}") from None
    except ValueError:  # a null character, or half of a UTF-16 pair
        raise UserError(f"{name!r} is no path: it has a character that no file's name can have") from None
    if not _HUB_ID.fullmatch(name):
        raise UserError(f"there is no folder {name}")
    # lazy: slow to import, and most models are local folders
    from huggingface_hub import snapshot_download

    try:
        folder = pathlib.Path(snapshot_download(name, allow_patterns=_ALLOW, ignore_patterns=_IGNORE))
        # some models have only a named variant, such as fp16
        if not all(any((folder / name).glob("*.safetensors")) for name in _networks(folder)):
            folder = pathlib.Path(snapshot_download(name, allow_patterns=_ALLOW))
        return folder
    except Exception as error:  # hub errors, and those of an HTTP library that depends on the hub's version
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0].removeprefix("Got: ")
        raise UserError(
            f"there is no folder {path.absolute()}, and no model {name} could be downloaded from the hub: {reason}"
        ) from None


def _networks(folder: pathlib.Path) -> Collection[str]:
    """Returns the names of the networks of a folder; none if its model_index.json isn't supported."""
    try:
        index, _ = model_index.read(folder)
    except UserError:
        return ()  # `read_folder` says why
    return LAYOUTS[index["_class_name"]].networks
