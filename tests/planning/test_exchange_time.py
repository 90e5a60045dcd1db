"""The model of communication time: formulas on small tori, and growth with the group size."""

import itertools

import pytest

from lcm_jax.planning.chips import HOP
from lcm_jax.planning.compiled import Collective
from lcm_jax.planning.exchange_time import Position, seconds
from lcm_jax.planning.topology import parse

MIB = 2**20


def positions(topology):
    return [
        Position(s, coords)
        for s in range(topology.slices)
        for coords in itertools.product(*(range(size) for size in topology.shape))
    ]


def time(kind, name, size=64 * MIB, groups=None, slices=1):
    topology = parse(name, slices)
    where = positions(topology)
    groups = groups or (tuple(range(len(where))),)
    return seconds(Collective(kind, 1, size, groups, 0, 0, ""), where, topology)


def test_a_ring_uses_both_of_its_links():
    # four chips along z of 4x4x4, which closes: 3/4 of the result over two links of 100 GB/s, two hops
    assert time("all-gather", "v5p:4x4x4", groups=((0, 1, 2, 3),)) == pytest.approx(0.75 * 64 * MIB / 200e9 + 2 * HOP)


def test_a_line_uses_one():
    assert time("all-gather", "v5p:2x2x1", groups=((0, 1),)) == pytest.approx(0.5 * 64 * MIB / 100e9 + HOP)


def test_a_box_uses_all_its_dimensions():
    # 2x2x2: a line along each of three dimensions
    assert time("all-gather", "v5p:2x2x2") == pytest.approx(7 / 8 * 64 * MIB / 300e9 + 3 * HOP)


def test_groups_between_each_other_share_their_links():
    # every second chip of a ring of eight, and every second one of half of it, a line: two groups on each link
    ring, line = ((0, 2, 4, 6), (1, 3, 5, 7)), ((0, 2),)
    assert time("all-gather", "v5p:1x1x8", groups=ring) == pytest.approx(0.75 * 64 * MIB / 100e9 + 4 * HOP)
    assert time("all-gather", "v5p:1x1x8", groups=line) == pytest.approx(0.5 * 64 * MIB / 50e9 + 2 * HOP)
    # eight corners of 4x4x4, two along each ring, which their eight groups share
    corners = (tuple(16 * x + 4 * y + z for x in (0, 2) for y in (0, 2) for z in (0, 2)),)
    assert time("all-gather", "v5p:4x4x4", groups=corners) == pytest.approx(7 / 8 * 64 * MIB / 300e9 + 6 * HOP)


def test_uneven_steps_are_no_grid():
    found = time("all-gather", "v5p:1x1x8", groups=((0, 1, 4),))
    assert found == pytest.approx(2 / 3 * 64 * MIB / (3 / 5 * 100e9) + 4 * HOP)


def test_a_ring_has_no_first_chip():
    groups = (((0, 7),), ((7, 0, 1),))
    assert time("all-gather", "v5p:1x1x8", groups=groups[0]) == time("all-gather", "v5p:1x1x8", groups=((3, 4),))
    assert time("all-gather", "v5p:1x1x8", groups=groups[1]) == time("all-gather", "v5p:1x1x8", groups=((3, 4, 5),))


def test_an_all_reduce_is_a_scatter_and_a_gather():
    name = "v5p:4x4x4"
    assert time("all-reduce", name) == pytest.approx(time("reduce-scatter", name, MIB) + time("all-gather", name))


def test_a_group_that_is_no_grid_shares_a_link_with_all_chips_of_the_box_around_it():
    scattered = ((0, 5, 10, 15),)
    assert time("all-gather", "v5p:4x4x4", groups=scattered) == pytest.approx(0.75 * 64 * MIB / 25e9 + 6 * HOP)


def test_larger_groups_take_longer():
    names = ["v5p-16", "v5p-128", "v5p-1024", "v5p-2048"]
    small = [time("all-reduce", name, size=1024) for name in names]
    assert small == sorted(small)
    assert small[-1] > 2 * small[0]  # hops


def test_between_slices_the_network_decides():
    alone = time("all-reduce", "v5p:4x4x4")
    two = time("all-reduce", "v5p:4x4x4", slices=2)
    assert two == pytest.approx(alone + 2 * (64 * MIB / 64) / 2 / 6.25e9)


def test_a_permutation_costs_its_distance():
    near = time("collective-permute", "v5p:4x4x4", groups=((0, 1), (1, 2)))
    far = time("collective-permute", "v5p:4x4x4", groups=((0, 42),))
    across = time("collective-permute", "v5p:4x4x4", groups=((0, 64),), slices=2)
    assert near < far < across
    assert near == pytest.approx(64 * MIB / 100e9 + HOP)
