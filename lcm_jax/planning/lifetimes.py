"""Bytes of a step's arrays on one chip, and how many live at once."""

import collections
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lcm_jax.planning.pieces import Piece, Step
from lcm_jax.training.program import Program

LANES, SUBLANES = 128, 8  # arrays are padded to such tiles along two of their axes


class Sizes:
    """Bytes of variables on one chip."""

    def __init__(self, step: Step, program: Program) -> None:
        self._step, self._sizes = step, dict(program.mesh.shape)
        leaves = jax.tree.leaves((program.state, program.frozen, program.batch, program.stop))
        self._local: dict[Any, tuple[int, ...]] = {
            each: leaf.sharding.shard_shape(leaf.shape) for each, leaf in zip(step.arguments, leaves, strict=True)
        }
        for piece in step.pieces:
            if not piece.local:  # what has the shape of an input is divided like it
                known = {each.aval.shape: self.shape(each) for each in piece.inputs}
                for each in piece.outputs:
                    if each not in step.specs and each.aval.shape in known:
                        self._local[each] = known[each.aval.shape]

    def shape(self, variable: Any) -> tuple[int, ...]:
        """Returns the shape of a variable's part on one chip."""
        if variable in self._local:
            return self._local[variable]
        spec = self._step.specs.get(variable, P())
        parts = [math.prod(self._sizes[axis] for axis in axes(names)) for names in (*spec, *[None] * 9)]
        return tuple(size // part for size, part in zip(variable.aval.shape, parts))  # noqa: B905

    def of(self, variable: Any) -> int:
        """Returns the bytes of a variable's part on one chip, with padding."""
        return _padded(self.shape(variable), _itemsize(variable))

    def moved(self, piece: Piece, *, everywhere: bool = False) -> float:
        """Returns the bytes that a piece reads and writes on one chip, or all of it on one chip."""
        variables = (*piece.inputs, *piece.outputs)
        if everywhere:
            return sum(_padded(each.aval.shape, _itemsize(each)) for each in variables)
        return sum(map(self.of, variables))


def axes(names: Any) -> tuple[str, ...]:
    """Returns the mesh axes of a part of a partition spec, or of a collective."""
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)


def _itemsize(variable: Any) -> int:
    dtype = variable.aval.dtype
    return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize


def _padded(shape: Sequence[int], itemsize: int) -> int:
    """Returns the bytes of an array, padded to tiles along the two axes where that takes least."""
    if len(shape) < 2:
        return math.prod(shape) * itemsize
    least = min(
        _up(shape[lane], LANES) / shape[lane] * _up(shape[row], SUBLANES) / shape[row]
        for lane, row in itertools.permutations(range(len(shape)), 2)
        if shape[lane] and shape[row]
    )
    return int(math.prod(shape) * least) * itemsize


def _up(size: int, tile: int) -> int:
    return -(-size // tile) * tile


def temporaries(step: Step, sizes: Sizes, own: Mapping[int, float]) -> float:
    """Returns the most bytes that live at once, without arguments and results of the step.

    Args: `own`: id of a piece → the bytes that it needs while it runs.
    """
    pieces = step.pieces
    free = {step.root(each) for each in (*step.inputs, *step.outputs)}
    size: dict[Any, int] = collections.defaultdict(int)
    last: dict[Any, int] = {}
    made: dict[Any, int] = {}
    first: dict[Any, int] = {}
    place: dict[int, int] = {}
    for i in reversed(range(len(pieces))):  # what gathers or casts a weight runs just before the first reader
        piece = pieces[i]
        readers = [first[step.root(each)] for each in piece.outputs if step.root(each) in first]
        early = piece.local and len(piece.program.eqns) == 1 and bool(readers)
        place[i] = min(readers) if early else i
        for each in map(step.root, piece.inputs):
            first[each] = min(place[i], first.get(each, place[i]))
            last[each] = max(place[i], last.get(each, place[i]))
    for i, piece in enumerate(pieces):
        for each in piece.outputs:
            root = step.root(each)
            made.setdefault(root, place[i])
        for each in (*piece.inputs, *piece.outputs):
            size[step.root(each)] = max(size[step.root(each)], sizes.of(each))
    change = [0.0] * (len(pieces) + 2)
    for each, i in made.items():
        if each not in free:
            change[i] += size[each]
            change[max(i, last.get(each, i)) + 1] -= size[each]
    live = itertools.accumulate(change)
    return max(now + own.get(id(piece), 0.0) for now, piece in zip(live, pieces, strict=False))
