"""Names of TPU slices as users type them."""

import math

import jax
import jax.numpy as jnp
import pytest

from lcm_jax.errors import UserError
from lcm_jax.planning.chips import CHIPS
from lcm_jax.planning.topology import devices, parse


@pytest.mark.parametrize(
    ("name", "shape", "chips"),
    [
        ("v4-64", (2, 4, 4), 32),  # cores in the name
        ("v5p-16", (2, 2, 2), 8),
        ("v5p-256", (4, 4, 8), 128),
        ("v5p-2048", (8, 8, 16), 1024),
        ("v5e-64", (8, 8), 64),
        ("v5litepod-256", (16, 16), 256),
        ("v6e-8", (2, 4), 8),
        ("v5p:4x4x8", (4, 4, 8), 128),
        ("v5e:4x8", (4, 8), 32),
        ("v4:2x2x1", (2, 2, 1), 4),
    ],
)
def test_products_and_shapes(name, shape, chips):
    found = parse(name)
    assert (found.shape, found.chips) == (shape, chips)
    assert found.name == f"{found.chip.kind}:{'x'.join(map(str, shape))}"
    assert parse(found.product) == found
    assert parse(name, slices=3).chips == 3 * chips


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5p-17", r"--topology=v5p-17 is not offered; use v5p-8, v5p-16, .*v5p-12288, or a shape like v5p:4x4x4"),
        ("v5e-512", r"is not offered; use v5e-1, .*v5e-256, or"),
        ("v5p:4x4", "v5p has 3 dimensions and at most 6144 chips, as in v5p:4x4x4"),
        ("v5e:32x32", "v5e has 2 dimensions and at most 256 chips"),
        ("v5e:0x4", "v5e has 2 dimensions"),
        ("v7-64", r"--topology=v7-64 is unknown; use v4-64 or v4:4x4x4, .*, or local"),
        ("tpu", "is unknown"),
        ("v5p", "is unknown"),
        ("v5p-", "is unknown"),
    ],
)
def test_what_is_not_known_is_answered_with_what_is(name, said):
    with pytest.raises(UserError, match=said):
        parse(name)


def test_slices_are_at_least_one():
    with pytest.raises(UserError, match="--slices=0"):
        parse("v5p-16", slices=0)


def test_rings_close_where_cubes_do():
    assert [parse("v5p:4x8x2").is_ring(d) for d in range(3)] == [True, True, False]
    assert [parse("v5e-256").is_ring(d) for d in range(2)] == [True, True]
    assert [parse("v5e-128").is_ring(d) for d in range(2)] == [False, True]


def test_the_table_agrees_with_itself():
    """Peak = units x 128 x 128 x 2 x clock, for those whose clock follows from it."""
    for kind, units in (("v4", 8), ("v5e", 4), ("v5p", 8)):
        chip = CHIPS[kind]
        assert chip.peak_flops == pytest.approx(units * 128 * 128 * 2 * chip.clock, rel=0.01)
    for chip in CHIPS.values():
        assert math.log2(chip.memory / 2**30) > 3.9


@pytest.mark.parametrize("name", ["v5e-1", "v6e-1", "v5e-4", "v4-8"])
def test_small_slices_are_known_to_the_compiler(name):
    assert len(devices(parse(name))) == parse(name).chips


def test_libtpu_is_the_one_that_jax_asks_for(tmp_path):
    """With another version, JAX's profiler crashes with a segmentation fault once libtpu is loaded."""
    devices(parse("v5e:2x2"))
    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready(jax.jit(jnp.square)(jnp.ones(8)))
    assert list(tmp_path.rglob("*.xplane.pb"))
