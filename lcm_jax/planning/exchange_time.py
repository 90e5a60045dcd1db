"""Models the time of a collective on a torus: bytes over the bandwidth of the usable links, plus latency per hop.

Unlike in XLA's own estimate, where a ring of a thousand chips costs as much as one of eight, time grows with the group.
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
    """A device's position: the number of its slice, and its coordinates in the slice."""

    slice: int
    coords: tuple[int, ...]


def seconds(collective: Collective, positions: Sequence[Position], topology: Topology) -> float:
    """Returns the seconds of one run of a collective, if no other uses the network.

    Args:
      positions: positions of the devices, in the order of their numbers in the compiled program.

    An all-gather of n parts moves (n - 1) / n of its result over the links of each chip, a reduce-scatter the same
    amount of its input; an all-reduce takes both. A group that fills a box of the torus uses all links of the
    dimensions along which it extends. A grid of every k-th chip uses 1 / k of each link, shared with the k - 1 groups
    in between. Between slices each chip sends its own part over the data center network.
    """
    members = [positions[i] for i in (collective.groups[0] if collective.groups else range(len(positions)))]
    slices = len({member.slice for member in members})
    inside = [member.coords for member in members if member.slice == members[0].slice]
    if collective.kind == "collective-permute":
        return _permute(collective, positions, topology)
    n, result = len(members), float(collective.bytes)
    whole = result * n if collective.kind == "reduce-scatter" else result  # bytes of the complete array
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
    """Returns the number of links that a chip can use at once in one direction, and the hops of the longest path."""
    rings = [_ring(topology, dimension) for dimension in range(len(coords[0]))]
    places = [_from_first(set(values), *ring) for values, ring in zip(zip(*coords, strict=True), rings, strict=True)]
    steps = [{b - a for a, b in itertools.pairwise(values)} or {1} for values in places]
    if math.prod(map(len, places)) != len(coords) or any(len(step) > 1 for step in steps):
        # not a grid: a ring through other groups, which all share the links of the bounding box
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
    """Returns the chips along a dimension and whether they form a ring; (1, False) beyond the slice's dimensions."""
    inside = dimension < len(topology.shape)
    return (topology.shape[dimension], topology.is_ring(dimension)) if inside else (1, False)


def _from_first(places: set[int], size: int, closed: bool) -> list[int]:
    """Returns the sorted places relative to the first; on a ring the first is the one after the largest gap."""
    values = sorted(places)
    if closed:
        gaps = [(b - a) % size for a, b in zip(values, values[1:] + values[:1], strict=True)]
        after = (gaps.index(max(gaps)) + 1) % len(values)
        values = values[after:] + values[:after]
    return [(value - values[0]) % size if closed else value - values[0] for value in values]
