"""How long an exchange takes on a torus: bytes over the links that it can use, and a little for each hop.

XLA's own estimate takes a ring of a thousand chips for one of eight; here the time grows with the group.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

from lcm_jax.planning.chips import HOP
from lcm_jax.planning.compiled import Collective
from lcm_jax.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a device is: the number of its slice, and its place in it."""

    slice: int
    coords: tuple[int, ...]


def seconds(collective: Collective, positions: Sequence[Position], topology: Topology) -> float:
    """Returns the time of one run of an exchange, undisturbed by others.

    Args:
      positions: of the devices, by their number in the compiled program.

    An all-gather of n parts brings (n - 1) / n of its result over the links of each chip; a reduce-scatter as much the
    other way; an all-reduce is one after the other. A group that fills a box of the torus uses all links of the
    dimensions along which it extends; of a grid of every k-th chip, a k-th of each link, since the k - 1 groups between
    use them too. Between slices each chip sends its own part over the data center network.
    """
    members = [positions[i] for i in (collective.groups[0] if collective.groups else range(len(positions)))]
    slices = len({member.slice for member in members})
    inside = [member.coords for member in members if member.slice == members[0].slice]
    if collective.kind == "collective-permute":
        return _permute(collective, positions, topology)
    n, result = len(members), float(collective.bytes)
    whole = result * n if collective.kind == "reduce-scatter" else result  # of the array that all of them share
    rounds = 2 if collective.kind == "all-reduce" else 1
    links, hops = _links(inside, topology)
    time = 0.0
    if len(inside) > 1:
        share = (len(inside) - 1) / len(inside)
        moved = whole / slices if collective.kind == "all-gather" else whole
        if collective.kind in ("all-to-all", "ragged-all-to-all"):
            share *= max(1, _longest(inside)) / 4  # each part travels a quarter of a ring on average, either way
        time += rounds * (moved * share / (links * topology.chip.link) + hops * HOP)
    if slices > 1:
        part = whole / len(inside)
        time += rounds * part * (slices - 1) / slices / topology.chip.network
    return time


def _permute(collective: Collective, positions: Sequence[Position], topology: Topology) -> float:
    far = max((_distance(positions[a], positions[b], topology) for a, b in collective.groups), default=1.0)
    if math.isinf(far):
        return collective.bytes / topology.chip.network
    return collective.bytes * max(1.0, far / 2) / topology.chip.link + far * HOP


def _distance(a: Position, b: Position, topology: Topology) -> float:
    if a.slice != b.slice:
        return math.inf
    total = 0
    for dimension, (x, y) in enumerate(zip(a.coords, b.coords, strict=True)):
        size = topology.shape[dimension] if dimension < len(topology.shape) else 1
        straight = abs(x - y)
        total += min(straight, size - straight) if size > 1 and topology.is_ring(dimension) else straight
    return float(total)


def _longest(coords: Sequence[tuple[int, ...]]) -> int:
    return max(len(set(values)) for values in zip(*coords, strict=True))


def _links(coords: Sequence[tuple[int, ...]], topology: Topology) -> tuple[float, int]:
    """How many links a chip of the group can use one way at a time, and the hops of the longest way."""
    rings = [_ring(topology, dimension) for dimension in range(len(coords[0]))]
    places = [_from_first(set(values), *ring) for values, ring in zip(zip(*coords, strict=True), rings, strict=True)]
    steps = [{b - a for a, b in itertools.pairwise(values)} or {1} for values in places]
    if math.prod(map(len, places)) != len(coords) or any(len(step) > 1 for step in steps):
        # no grid: a ring that is laid through others, all of which share the links of the box around them
        return len(coords) / math.prod(values[-1] + 1 for values in places), sum(values[-1] for values in places)
    links, hops = 0.0, 0
    for values, (step,), (size, closed) in zip(places, steps, rings, strict=True):
        extent = len(values)
        if extent > 1:
            ring = closed and extent * step == size
            links += (2 if ring else 1) / step
            hops += step * (extent // 2 if ring else extent - 1)
    return links or 1, hops


def _ring(topology: Topology, dimension: int) -> tuple[int, bool]:
    """How many chips lie along a dimension, and whether they close to a ring; one in those that only devices have."""
    inside = dimension < len(topology.shape)
    return (topology.shape[dimension], topology.is_ring(dimension)) if inside else (1, False)


def _from_first(places: set[int], size: int, closed: bool) -> list[int]:
    """Places along a dimension, counted from the first; of a ring from behind its largest gap."""
    values = sorted(places)
    if closed:
        gaps = [(b - a) % size for a, b in zip(values, values[1:] + values[:1], strict=True)]
        after = (gaps.index(max(gaps)) + 1) % len(values)
        values = values[after:] + values[:after]
    return [(value - values[0]) % size if closed else value - values[0] for value in values]
