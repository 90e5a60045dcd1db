"""Which axis of which weight is divided over "fsdp": an ordered table of path patterns, outside the models.

The first pattern that matches a path names axes in the order of preference; the first of them that the devices divide
is taken, and a weight that has none lies whole on each device. A path that no pattern matches is an error: a new kind
of layer must say what becomes of it.
"""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Shapes = dict[str, dict[str, jax.ShapeDtypeStruct]]  # {component: {path: shape}}
Axes = dict[str, dict[str, int | None]]  # {component: {path: the divided axis, or None}}

# Input channels come first: a part of them is a run of whole rows of 128 lanes on a TPU, where a part of the output
# channels (320 / 8 = 40 in SD 1.5) would be padded. conv_in, with its four input channels, takes the second.
RULES: tuple[tuple[str, tuple[int, ...]], ...] = (
    (r"(.*\.)?(bias|scale)", ()),
    (r".*_embedding\.embedding", (-2, -1)),  # (entries, width)
    (r"(.*\.)?kernel", (-2, -1)),  # ([height, width,] in, out)
)


def divided_axis(path: str, shape: tuple[int, ...], fsdp: int) -> int | None:
    """Returns the axis of this weight that is divided over `fsdp` devices, or None; raises ValueError for no rule."""
    for pattern, preferred in RULES:
        if re.fullmatch(pattern, path):
            if fsdp == 1:
                return None
            return next((axis % len(shape) for axis in preferred if shape[axis] % fsdp == 0), None)
    raise ValueError(f"no rule of lcm_jax/parallel/partition.py matches the parameter {path}")


def divided_axes(shapes: Shapes, fsdp: int) -> Axes:
    """Returns {component: {path: axis or None}} of the weights that have these shapes."""
    return {
        name: {path: divided_axis(path, leaf.shape, fsdp) for path, leaf in flat.items()}
        for name, flat in shapes.items()
    }


def spec(axis: int | None) -> P:
    """Returns the partition spec of an array with this axis divided."""
    return P() if axis is None else P(*[None] * axis, "fsdp")


def specs(axes: Axes) -> dict[str, dict[str, P]]:
    """Returns the partition spec of each weight."""
    return {name: {path: spec(axis) for path, axis in flat.items()} for name, flat in axes.items()}


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns the sharding of each array of a state, of weights alone, or of an optimizer's moments of weights.

    An array belongs to the weight whose path is the last dict key on the way to it; scalars are on each device.
    """

    def sharding(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        if not leaf.shape:
            return NamedSharding(mesh, P())
        path = next(key.key for key in reversed(keys) if isinstance(key, jax.tree_util.DictKey))
        return NamedSharding(mesh, spec(divided_axis(path, leaf.shape, mesh.shape["fsdp"])))

    return jax.tree.map_with_path(sharding, tree)


def place(tree: Any, like: Any) -> Any:
    """Puts arrays of the host on the devices that `like`, of jax.ShapeDtypeStruct, says: on each its own part."""
    return jax.tree.map(
        lambda x, leaf: jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: np.asarray(x[index])),
        tree,
        like,
    )
