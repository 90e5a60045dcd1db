"""Keeps libtpu from printing errors on machines without a TPU."""

import glob
import importlib.metadata
import importlib.util
import os

import jax
from jax._src import hardware_utils  # what JAX itself asks whether there is a TPU

DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia*", "/dev/kfd", "/dev/dxg")  # of TPUs and GPUs
SETTINGS = ("TPU_", "CLOUD_TPU_", "JAX_FORCE_TPU_INIT", "PJRT_")  # beginnings of variables that a TPU's user sets
SET_BY_JAX = ("TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH")  # when it is imported


def skip_absent_tpu() -> None:
    """Sets JAX's platform to the CPU if libtpu is installed and this machine has neither a TPU nor a GPU.

    Otherwise JAX tries to start the TPU first, and libtpu prints five lines of errors. Changes nothing if JAX's
    platforms are set, a variable of libtpu is set, or another plugin of JAX is installed. Call it before using JAX.
    """
    if jax.config.jax_platforms is None and _only_libtpu():  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_platforms", "cpu")


def _only_libtpu() -> bool:
    chips, _ = hardware_utils.num_available_tpu_chips_and_device_id()
    return not (
        chips
        or importlib.util.find_spec("libtpu") is None
        or any(name.startswith(SETTINGS) for name in os.environ if name not in SET_BY_JAX)
        or any(map(glob.glob, DEVICES))
        or importlib.metadata.entry_points(group="jax_plugins")
    )
