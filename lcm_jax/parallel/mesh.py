"""The grid of devices: "data" over slices and hosts, "fsdp" inside a slice. The batch is divided over both axes.

Weights, EMA and optimizer state are divided over "fsdp" and the same along "data", so that only gradients cross the
slow network between slices, once a step.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from lcm_jax.errors import Unavailable, UserError, one_of

AXES = ("data", "fsdp")
BATCH = P(AXES)  # of every array whose first axis is the batch


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices share a run. Nothing here changes the result, but for rounding."""

    data: int = -1  # groups of devices that each hold all weights; -1: whatever is left
    fsdp: int = 1  # devices of such a group, between which weights, EMA and optimizer state are divided; -1 likewise
    frozen: str = "replicated"  # teacher, VAE, text encoder: replicated | sharded (as the trained weights are)
    # how divided weights come together: step: once a step | block: at each use, and again for the backward pass, which
    # takes less memory where the whole weights are more than activations, and half as much traffic again
    gather: str = "step"
    cpu_devices: int = 0  # into which a run on a CPU is split, each with its share of the batch; 0: as XLA_FLAGS says
    grad_dtype: str = "float32"  # in which gradients are summed over devices: float32 | bfloat16

    def __post_init__(self) -> None:
        for name in AXES:
            size = getattr(self, name)
            if size < 1 and size != -1:
                raise UserError(f"{name} is {size}; it must be positive, or -1 for whatever is left")
        if self.cpu_devices < 0:
            raise UserError(f"cpu_devices is {self.cpu_devices}; it can't be negative")
        if self.data == self.fsdp == -1:
            raise UserError("data and fsdp are both -1; one of them must be a number")
        one_of("frozen", self.frozen, ("replicated", "sharded"))
        one_of("gather", self.gather, ("block", "step"))
        one_of("grad_dtype", self.grad_dtype, ("float32", "bfloat16"))


def split_cpu(devices: int) -> None:
    """Makes JAX see the CPU as this many devices (0: as it is), before anything runs; accelerators stay what they are.

    Each device works on its share of the batch by itself, so operations that are too small for all cores together, of
    which a small UNet has many, leave no core idle. Raises UserError if JAX runs already with another number.
    """
    if devices:
        try:
            jax.config.update("jax_num_cpu_devices", devices)
        except RuntimeError:
            raise UserError(
                f"config.mesh.cpu_devices={devices} comes too late: JAX runs already in this process"
            ) from None


def found_devices() -> list[Any]:
    """Returns all devices of the run.

    Raises: Unavailable where JAX finds none of the platform that JAX_PLATFORMS names first.
    """
    wanted = (jax.config.jax_platforms or "").split(",")[0]  # pyright: ignore[reportAttributeAccessIssue]
    extra = {"cuda": "cuda", "tpu": "tpu"}.get(wanted, "")
    hint = f"does its driver run, and is lcm_jax installed with the extra {extra!r}?" if extra else "is it there?"
    try:
        devices = jax.devices()
    except RuntimeError as error:
        raise Unavailable(f"JAX finds no {wanted or 'device'}: {str(error).splitlines()[0]}; {hint}") from None
    if extra and devices[0].platform != {"cuda": "gpu"}.get(wanted, wanted):
        found = devices[0].platform.upper()
        raise Unavailable(f"JAX_PLATFORMS asks for {wanted}, and JAX finds a {found} only; {hint}")
    return devices


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, int]:
    """Returns the sizes of the axes for this many devices; raises UserError where they do not multiply to it."""
    sizes = {name: getattr(config, name) for name in AXES}
    known = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values() and devices % known == 0:
        sizes = {name: devices // known if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != devices:
        given = ", ".join(f"config.mesh.{name}={size}" for name, size in sizes.items())
        raise UserError(f"{given} do not multiply to the {devices} devices; -1 takes whatever is left")
    return sizes["data"], sizes["fsdp"]


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh of all devices of the run, or of `devices`, with the axes "data" and "fsdp".

    Devices of several slices (those whose `slice_index` differs) are put together along "data" only.

    Raises:
      UserError: sizes that do not multiply to the devices; a "data" axis that slices do not divide; no device of the
        kind that JAX_PLATFORMS asks for.
    """
    devices = found_devices() if devices is None else list(devices)
    data, fsdp = mesh_shape(config, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if data % slices:
        raise UserError(f"config.mesh.data={data} is no multiple of the {slices} slices; fsdp stays inside a slice")
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            (data // slices, fsdp), (slices, 1), devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh((data, fsdp), devices, allow_split_physical_axes=True)
    return Mesh(np.asarray(grid), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raises UserError unless each device gets the same number of samples for each micro-batch."""
    if batch_size % mesh.size:
        raise UserError(f"config.batch_size={batch_size} does not divide by the {mesh.size} devices")
    if batch_size % (mesh.size * accumulate):
        raise UserError(
            f"config.batch_size={batch_size} does not divide by the {mesh.size} devices times "
            f"config.accumulate={accumulate}"
        )
