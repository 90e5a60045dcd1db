"""A traced step in pieces: nothing is lost, and equal layers are equal pieces."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.host import compile_cache
from lcm_jax.planning import fast, flops, topology
from lcm_jax.planning.pieces import Step


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, dy: (2 * dy,))


def layer(w, x):
    return x + jnp.tanh(doubled(x @ w))


def loss(weights, x, remat):
    for i, w in enumerate(weights):
        with jax.named_scope(f"net/layers.{i}"):
            x = (jax.checkpoint(layer) if remat else layer)(w, x)
    return (x**2).mean()


def step(weights, x, remat=False):
    """A gradient, clipped by its norm."""
    value, grads = jax.value_and_grad(functools.partial(loss, remat=remat))(weights, x)
    norm = sum((g**2).sum() for g in grads) ** 0.5
    return value, [w - g * jnp.minimum(1.0, 1 / norm) for w, g in zip(weights, grads, strict=True)]


@pytest.fixture
def arguments():
    random = np.random.default_rng(0)
    return [random.standard_normal((8, 8), np.float32) for _ in range(3)], random.standard_normal((4, 8), np.float32)


@pytest.mark.parametrize("remat", [False, True])
def test_the_pieces_together_are_the_step(arguments, remat):
    traced = jax.make_jaxpr(functools.partial(step, remat=remat))(*arguments)
    cut = Step(traced.jaxpr)
    layers = [each for each in cut.pieces if each.module.startswith("net/layers")]
    assert len(layers) == (9 if remat else 6)  # three layers: forward, again, backward
    total = sum(each.times * flops.count(each.program) for each in cut.pieces)
    assert total == flops.count(traced) == 2 * 4 * 8 * 8 * (11 if remat else 8)  # no gradient of x
    values = dict(zip(cut.arguments, jax.tree.leaves(arguments), strict=True))
    for piece in cut.pieces:
        found = piece(*(values[each] for each in piece.program.invars))
        values.update(zip(piece.program.outvars, found, strict=True))
    expected = jax.tree.leaves(step(*arguments, remat))
    for each, value in zip(cut.outputs, expected, strict=True):
        np.testing.assert_allclose(values[each], value, rtol=1e-6)


def test_equal_layers_are_equal_pieces(arguments):
    cut = Step(jax.make_jaxpr(step)(*arguments).jaxpr)
    keys = {}
    for piece in cut.pieces:
        keys.setdefault(piece.module, set()).add(piece.key)
    forward, backward = ([keys[f"net/layers.{i} ({when})"] for i in range(3)] for when in ("forward", "backward"))
    assert forward[0] == forward[1] == forward[2]
    assert backward[1] == backward[2] != backward[0]  # the first needs no gradient of its input
    updates = [each for each in cut.pieces if each.module == "step (forward)" and len(each.program.eqns) > 1]
    assert len({each.key for each in updates}) < len(updates)


def test_a_norm_and_what_reads_it_are_two_passes(arguments):
    cut = Step(jax.make_jaxpr(step)(*arguments).jaxpr)
    passes = [{each.primitive.name for each in piece.program.eqns} for piece in cut.pieces]
    assert not any({"reduce_sum", "sub"} <= names for names in passes)


def test_a_loop_counts_with_its_rounds(arguments):
    """As with micro-batches: the layers in the body are pieces, each run in each round."""

    def looped(weights, x):
        body = lambda total, part: (total + loss(weights * 3, part, False), None)  # noqa: E731
        return jax.lax.scan(body, 0.0, jnp.stack([x] * 5))[0]

    traced = jax.make_jaxpr(looped)(*arguments)
    cut = Step(traced.jaxpr)
    assert {each.times for each in cut.pieces if each.module.startswith("net/")} == {5}
    assert sum(each.times * flops.count(each.program) for each in cut.pieces) == flops.count(traced) > 0


def test_a_price_is_kept(arguments, monkeypatch, tmp_path):
    """JAX's cache can't read a program for a chip that is not there, so a second plan would compile all again."""
    monkeypatch.setattr(compile_cache, "folder", lambda: str(tmp_path))
    cut = Step(jax.make_jaxpr(step)(*arguments).jaxpr)
    piece = next(each for each in cut.pieces if each.module == "net/layers.0 (forward)")
    first = fast.Prices(topology.parse("v5e-4")).of(piece, cut)
    assert sum(first.seconds.values()) > 0
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: pytest.fail("compiled again"))
    assert fast.Prices(topology.parse("v5e-4")).of(piece, cut) == first
