"""Sharding rules: which axis of each weight is sharded over "fsdp", by ordered path patterns outside the models.

The first pattern that matches a path lists axes in order of preference. The first of them whose size is divisible by
"fsdp" is sharded; if there is none, the weight is replicated. A path that no pattern matches is an error, so that each
new kind of layer gets a rule.
"""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Shapes = dict[str, dict[str, jax.ShapeDtypeStruct]]  # {component: {path: shape}}
Axes = dict[str, dict[str, int | None]]  # {component: {path: the sharded axis, or None}}

# Input channels come first: on a TPU a shard of them is made of full rows of 128 lanes, whereas a shard of the output
# channels (320 / 8 = 40 in SD 1.5) would be padded. conv_in, with 4 input channels, can need the second.
RULES: tuple[tuple[str, tuple[int, ...]], ...] = (
    (r"(.*\.)?(bias|scale)", ()),
    (r".*_embedding\.embedding", (-2, -1)),  # (entries, width)
    (r"(.*\.)?kernel", (-2, -1)),  # ([height, width,] in, out)
)


def divided_axis(path: str, shape: tuple[int, ...], fsdp: int) -> int | None:
    """Returns the axis of this weight to shard over `fsdp` devices, or None; raises ValueError if no rule matches."""
    for pattern, preferred in RULES:
        if re.fullmatch(pattern, path):
            if fsdp == 1:
                return None
            there = (axis for axis in preferred if -axis <= len(shape))  # Adafactor's means have an axis less
            return next((axis % len(shape) for axis in there if shape[axis] % fsdp == 0), None)
    raise ValueError(f"no rule of lcm_jax/parallel/partition.py matches the parameter {path}")


def divided_axes(shapes: Shapes, fsdp: int) -> Axes:
    """Returns the sharded axis, or None, of each weight."""
    return {
        name: {path: divided_axis(path, leaf.shape, fsdp) for path, leaf in flat.items()}
        for name, flat in shapes.items()
    }


def spec(axis: int | None) -> P:
    """Returns the partition spec of an array that is sharded along `axis`; None: replicated."""
    return P() if axis is None else P(*[None] * axis, "fsdp")


def specs(axes: Axes) -> dict[str, dict[str, P]]:
    """Returns the partition spec of each weight."""
    return {name: {path: spec(axis) for path, axis in flat.items()} for name, flat in axes.items()}


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns the sharding of each array in a training state, a tree of weights or optimizer moments.

    The last dict key on the way to an array is the path of its weight. Scalars are replicated.
    """

    def sharding(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        if not leaf.shape:
            return NamedSharding(mesh, P())
        path = next(key.key for key in reversed(keys) if isinstance(key, jax.tree_util.DictKey))
        return NamedSharding(mesh, spec(divided_axis(path, leaf.shape, mesh.shape["fsdp"])))

    return jax.tree.map_with_path(sharding, tree)


def place(tree: Any, like: Any) -> Any:
    """Moves host arrays to devices with the shapes, dtypes and shardings of `like`, a tree of jax.ShapeDtypeStruct.

    Each array is divided, and its parts cast, before they are moved: neither the host nor a device holds it whole once
    more. An array that nothing else refers to is freed before the next one is moved, if `tree` gives it up: {name:
    flat dict} is emptied. A replicated array is one buffer in memory, however many devices a CPU is split into: they
    share it. Do not donate it to a program.
    """
    return {
        name: {path: _moved(flat.pop(path), leaf) for path, leaf in like[name].items()} for name, flat in tree.items()
    }


def _moved(x: Any, leaf: Any) -> jax.Array:
    def part(index: Any) -> np.ndarray:
        return np.asarray(x[index]).astype(leaf.dtype, copy=False)

    sharding: NamedSharding = leaf.sharding
    if sharding.is_fully_replicated and next(iter(sharding.device_set)).platform == "cpu":
        buffer = _aligned(part(...))
        copies = [jax.device_put(buffer, device, may_alias=True) for device in sharding.addressable_devices]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, copies)
    return jax.make_array_from_callback(leaf.shape, sharding, part).block_until_ready()


def _aligned(x: np.ndarray) -> np.ndarray:
    """Returns a copy that begins at a multiple of 64 bytes, which JAX needs to use it without a copy."""
    room = np.empty(x.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    copy = room[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy
