"""A folder on this machine for what the user named: a path, or the id of a model on the Hugging Face hub."""

import os
import pathlib
import re

from lcm_jax.errors import UserError
from lcm_jax.host import unfinished

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# No pickles, no single-file checkpoints of the whole model at the top, and the variant without a name only.
_ALLOW = ["*.json", "*.txt", "*.md", "LICENSE*", "*/*.safetensors"]
_IGNORE = [pattern for name in ("fp32", "fp16", "bf16") for pattern in (f"*.{name}.*", f"*.{name}-*")] + ["*non_ema*"]
_NETWORKS = ("unet", "vae", "text_encoder")


def local_folder(path_or_hub_id: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the folder of that name, or fetches the hub's model of that name into the hub's own cache.

    Raises:
      UserError: neither is to be had.
    """
    path, name = pathlib.Path(os.path.expanduser(path_or_hub_id)), str(path_or_hub_id)
    try:
        if not path.exists():
            unfinished.restore(pathlib.Path(os.path.realpath(path)))
        if path.is_dir():
            return path
        if path.exists():
            raise UserError(f"{name} is a file; give the folder that holds model_index.json")
    except OSError as error:  # a name that is too long, a folder that this user must not read
        raise UserError(f"{name} can't be read: {error.strerror}") from None
    if not _HUB_ID.fullmatch(name):
        raise UserError(f"there is no folder {name}")
    # imported late: it takes time, and most models are folders
    from huggingface_hub import snapshot_download

    try:
        folder = pathlib.Path(snapshot_download(name, allow_patterns=_ALLOW, ignore_patterns=_IGNORE))
        # a model that comes as a named variant only, such as half precision
        if not all(any((folder / name).glob("*.safetensors")) for name in _NETWORKS):
            folder = pathlib.Path(snapshot_download(name, allow_patterns=_ALLOW))
        return folder
    except Exception as error:  # the hub's own errors, and those of an HTTP library that differs between its versions
        reason = " ".join(str(error).split()).split(". ")[0]
        raise UserError(
            f"there is no folder {name}, and no model of that name could be fetched from the hub: {reason}"
        ) from None
