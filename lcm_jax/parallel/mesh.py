"""The device mesh: axis "data" spans slices and hosts, axis "fsdp" lies inside a slice. Both divide the batch.

Weights, EMA and optimizer state are sharded over "fsdp" and replicated over "data", so only gradients cross the slow
network between slices, once per step.
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
BATCH = P(AXES)  # partition spec of arrays whose first axis is the batch


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How a run is distributed over devices. Results differ only by rounding."""

    data: int = -1  # number of groups that each hold all weights; -1: all remaining devices
    fsdp: int = 1  # devices per group, over which weights, EMA and optimizer state are sharded; -1 likewise
    frozen: str = "replicated"  # teacher, VAE, text encoder: replicated | sharded (like the trained weights)
    # when sharded weights are gathered: step: once per step | block: at each use and again for the backward pass, with
    # 50 % more traffic, but less memory where the gathered weights are larger than the activations; per layer instead
    # of per block with model.remat=layer
    gather: str = "step"
    cpu_devices: int = 0  # devices a CPU is split into, each with its share of the batch; 0: as set by XLA_FLAGS
    grad_dtype: str = "float32"  # dtype of the gradient sums over devices: float32 | bfloat16

    def __post_init__(self) -> None:
        for name in AXES:
            size = getattr(self, name)
            if size < 1 and size != -1:
                raise UserError(f"{name} is {size}; it must be positive, or -1 for all remaining devices")
        if self.cpu_devices < 0:
            raise UserError(f"cpu_devices is {self.cpu_devices}; it can't be negative")
        if self.data == self.fsdp == -1:
            raise UserError("data and fsdp are both -1; one of them must be a number")
        one_of("frozen", self.frozen, ("replicated", "sharded"))
        one_of("gather", self.gather, ("block", "step"))
        one_of("grad_dtype", self.grad_dtype, ("float32", "bfloat16"))


def split_cpu(devices: int) -> None:
    """Splits the CPU into this many JAX devices (0: no change). Call it before using JAX; accelerators are unaffected.

    Each device processes its share of the batch independently. This keeps all cores busy in small nets, many of whose
    operations are too small to use all cores. Raises UserError if JAX already runs with another number.
    """
    if devices:
        try:
            jax.config.update("jax_num_cpu_devices", devices)
        except RuntimeError:
            raise UserError(
                f"config.mesh.cpu_devices={devices} comes too late: JAX is already initialized in this process"
            ) from None


def found_devices() -> list[Any]:
    """Returns all devices of the run.

    Raises: Unavailable if JAX finds no device of the first platform in JAX_PLATFORMS.
    """
    wanted = (jax.config.jax_platforms or "").split(",")[0]  # pyright: ignore[reportAttributeAccessIssue]
    extra = {"cuda": "cuda", "tpu": "tpu"}.get(wanted, "")
    hint = f"does its driver run, and is lcm_jax installed with the extra {extra!r}?" if extra else "is it installed?"
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter, without text, for a GPU where libtpu is installed
        why = (str(error) or "no such platform").splitlines()[0]
        raise Unavailable(f"JAX finds no {wanted or 'device'}: {why}; {hint}") from None
    if extra and devices[0].platform != {"cuda": "gpu"}.get(wanted, wanted):
        found = devices[0].platform.upper()
        raise Unavailable(f"JAX_PLATFORMS requests {wanted}, but JAX finds only a {found}; {hint}")
    return devices


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, int]:
    """Returns the (data, fsdp) sizes; raises UserError if their product is not `devices`."""
    sizes = {name: getattr(config, name) for name in AXES}
    known = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values() and devices % known == 0:
        sizes = {name: devices // known if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != devices:
        given = ", ".join(f"config.mesh.{name}={size}" for name, size in sizes.items())
        raise UserError(f"{given} do not multiply to the {devices} devices; -1 stands for all remaining devices")
    return sizes["data"], sizes["fsdp"]


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh of `devices` (default: all devices of the run) with the axes "data" and "fsdp".

    Slices (devices with different `slice_index`) are joined along "data" only.

    Raises:
      UserError: the product of the sizes is not the number of devices; "data" is not a multiple of the number of
        slices; there is no device of the platform in JAX_PLATFORMS.
    """
    devices = found_devices() if devices is None else list(devices)
    data, fsdp = mesh_shape(config, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if data % slices:
        raise UserError(f"config.mesh.data={data} is not a multiple of the {slices} slices; fsdp stays inside a slice")
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            (data // slices, fsdp), (slices, 1), devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh((data, fsdp), devices, allow_split_physical_axes=True)
    return Mesh(np.asarray(grid), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raises UserError unless `batch_size` divides evenly by devices and micro-batches."""
    unit = mesh.size * accumulate
    if rest := batch_size % unit:
        times = f" times config.accumulate={accumulate}" if batch_size % mesh.size == 0 else ""
        near = [size for size in (batch_size - rest, batch_size - rest + unit) if size]
        raise UserError(
            f"config.batch_size={batch_size} is not divisible by the {mesh.size} devices{times}; "
            f"try {' or '.join(map(str, near))}"
        )
