"""The files of model folders: compared, and changed by tests."""

import json
import pathlib

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lcm_jax.errors import UserError
from lcm_jax.interop.folder import read_folder

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder/model.safetensors"


def files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def fails(folder, message: str) -> None:
    """Reading the folder ends in one line that holds `message`."""
    with pytest.raises(UserError, match=message) as error:
        read_folder(folder)
    assert "\n" not in str(error.value)


def raw(path: pathlib.Path) -> dict:
    with safe_open(path, "np") as file:
        return {key: (a.dtype, a.shape, a.tobytes()) for key in file.keys() for a in [file.get_tensor(key)]}  # noqa: SIM118


def assert_same_folder(ours: pathlib.Path, theirs: pathlib.Path, but: tuple[str, ...] = ()) -> None:
    assert files(ours).keys() == files(theirs).keys()
    for name, path in files(theirs).items():
        if name in but:
            continue
        if name.endswith(".safetensors"):
            assert raw(ours / name) == raw(path), name
        elif name.endswith(".json") and not name.startswith("tokenizer"):
            assert json.loads((ours / name).read_text()) == json.loads(path.read_text()), name
        else:
            assert (ours / name).read_bytes() == path.read_bytes(), name


def edit(path: pathlib.Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rewrite(path: pathlib.Path, change) -> None:
    save_file(
        {key: np.ascontiguousarray(array) for key, array in change(load_file(path)).items()}, path, {"format": "pt"}
    )
