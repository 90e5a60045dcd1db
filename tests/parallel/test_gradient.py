"""The gradient over eight devices against `jax.grad` of the whole batch, for a network of two layers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.models.functional import whole
from lcm_jax.parallel import partition
from lcm_jax.parallel.gradient import make_gradient
from lcm_jax.parallel.mesh import MeshConfig, make_mesh


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


PARAMS = {"net": {"a.kernel": normal(0, 8, 16), "b.kernel": normal(1, 16, 5), "b.bias": normal(2, 5)}}
TARGET = jax.tree.map(lambda x: 0.9 * x, PARAMS)
FROZEN = {"teacher": {"kernel": normal(3, 8, 5)}}
BATCH, DRAWS = {"x": normal(4, 32, 8)}, (normal(5, 32, 5),)


def loss(params, target, frozen, batch, draws):
    def apply(weights):
        w = {path: whole(leaf).astype(jnp.float32) for path, leaf in weights["net"].items()}
        return jnp.tanh(batch["x"] @ w["a.kernel"]) @ w["b.kernel"] + w["b.bias"]

    goal = apply(target) + batch["x"] @ whole(frozen["teacher"]["kernel"])
    difference = apply(params) + draws[0] - goal
    return jnp.mean(difference**2), {"most": jnp.mean(jnp.abs(difference))}


def shapes(weights, dtype=jnp.float32):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype if x.ndim > 1 else jnp.float32), weights)


def gradient(config, accumulate=1, devices=8, dtype=jnp.float32, loss=loss):
    """The jitted function with its arguments."""
    mesh = make_mesh(config, jax.devices()[:devices])
    function = jax.jit(
        make_gradient(loss, shapes(PARAMS, dtype), shapes(FROZEN), mesh=mesh, config=config, accumulate=accumulate)
    )
    return function, (PARAMS, TARGET, FROZEN, BATCH, DRAWS)


@pytest.fixture(scope="module")
def expected():
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS, TARGET, FROZEN, BATCH, DRAWS)


@pytest.mark.parametrize("gather", ["block", "step"])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_it_is_that_of_the_whole_batch(gather, accumulate, data, fsdp, expected):
    frozen = "sharded" if accumulate == 1 else "replicated"
    function, given = gradient(MeshConfig(data, fsdp, gather=gather, frozen=frozen), accumulate)
    found = function(*given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
    grads = found[1]["net"]
    assert grads["a.kernel"].sharding.spec == partition.spec(0 if fsdp > 1 else None)
    assert grads["a.kernel"].addressable_shards[0].data.shape == (8 // fsdp, 16)


def test_alone_it_is_the_same_bit_for_bit(expected):
    function, given = gradient(MeshConfig(), devices=1)
    jax.tree.map(np.testing.assert_array_equal, function(*given), expected)


def test_each_sample_counts_once(expected):
    """With one sample's part of the draws changed, the gradient changes as that of the whole batch does."""
    function, (*given, (draws,)) = gradient(MeshConfig(2, 4), accumulate=2)
    for i in (0, 7, 31):
        other = draws.copy()
        other[i] += 10
        found = function(*given, (other,))[0][0]
        np.testing.assert_allclose(found, loss(*given, (other,))[0], rtol=1e-5)


def test_weights_meet_in_the_dtype_of_their_use():
    def check(params, target, frozen, batch, draws):
        assert {path: whole(leaf).dtype for path, leaf in params["net"].items()} == {
            "a.kernel": jnp.bfloat16,
            "b.kernel": jnp.bfloat16,
            "b.bias": jnp.float32,
        }
        return loss(params, target, frozen, batch, draws)

    for gather in ("block", "step"):
        function, given = gradient(MeshConfig(1, 8, gather=gather), dtype=jnp.bfloat16, loss=check)
        (_, _), grads = jax.eval_shape(function, *given)
        assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}


def test_sums_are_taken_in_the_dtype_that_the_config_says():
    def sums(**options):
        function, given = gradient(MeshConfig(2, 4, **options))
        text = function.lower(*given).as_text()
        lines = text.splitlines()
        starts = [i for i, line in enumerate(lines) if "stablehlo.all_reduce" in line or "reduce_scatter" in line]
        return ["bf16" in "".join(itertools.islice(lines, i, i + 5)) for i in starts]

    assert not any(sums())
    assert sum(sums(grad_dtype="bfloat16")) == len(sums()) - 2  # all but loss and aux
