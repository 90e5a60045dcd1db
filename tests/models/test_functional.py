"""Networks as pure functions of flat dicts."""

import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcm_jax.errors import UserError
from lcm_jax.models import FP32, Network, Policy
from lcm_jax.models.functional import flatten, unflatten
from lcm_jax.models.layers import enlarge
from lcm_jax.models.norms import GroupNorm


class Chain(nnx.Module):
    """Eleven linear layers that must run in their order: 10 after 9, not after 1."""

    def __init__(self, config, *, policy: Policy, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List(nnx.Linear(config, config, rngs=rngs) for _ in range(11))

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x

    def first(self, x):
        return self.layers[0](x)


@pytest.fixture(scope="module")
def chain():
    net = Network(Chain, 3)
    return net, net.init(jax.random.key(0))


def test_layers_keep_their_order_whatever_the_order_of_the_dict(chain):
    net, params = chain
    params = {name: leaf + 0.1 for name, leaf in params.items()}
    x = wanted = jnp.array([[1.0, -2.0, 3.0]])
    for i in range(11):
        wanted = jnp.tanh(wanted @ params[f"layers.{i}.kernel"] + params[f"layers.{i}.bias"])
    paths = sorted(params)  # '10' before '2'
    for order in (paths, random.Random(0).sample(paths, len(paths))):
        np.testing.assert_allclose(net.apply({p: params[p] for p in order}, x), wanted, rtol=1e-5)
    np.testing.assert_allclose(
        net.apply(params, x, method="first"), x @ params["layers.0.kernel"] + params["layers.0.bias"], rtol=1e-5
    )


def test_flatten_and_unflatten_are_inverse(chain):
    _, params = chain
    nested = unflatten(params)
    assert list(nested["layers"]) == list(range(11))
    assert flatten(nested).keys() == params.keys()
    assert all(flatten(nested)[path] is leaf for path, leaf in params.items())


def test_init_depends_on_the_key_and_fits(chain):
    net, params = chain
    net.check(params)
    assert {leaf.dtype for leaf in params.values()} == {jnp.dtype("float32")}
    again, other = net.init(jax.random.key(0)), net.init(jax.random.key(1))
    for path, leaf in params.items():
        np.testing.assert_array_equal(leaf, again[path])
        if path.endswith("kernel"):
            assert not np.array_equal(leaf, other[path])
    kernels = [np.asarray(leaf) for path, leaf in params.items() if path.endswith("kernel")]
    assert len({kernel.tobytes() for kernel in kernels}) == 11
    assert np.std(kernels) == pytest.approx(3**-0.5, rel=0.25)


def test_every_fault_is_named_also_under_jit(chain):
    net, params = chain
    broken = {path: leaf for path, leaf in params.items() if not re.search(r"layers\.(2|10|3|4)\.bias", path)}
    broken["layers.1.kernel"] = jnp.zeros((3, 4))
    broken["layers.11.bias"] = jnp.zeros(3)
    message = (
        "Chain: parameters do not fit; missing: layers.2.bias, layers.3.bias, layers.4.bias and 1 more; "
        "unexpected: layers.11.bias; of the wrong shape: layers.1.kernel is (3, 4) and should be (3, 3)"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        jax.jit(net.apply)(broken, jnp.ones((1, 3)))
    with pytest.raises(UserError, match=r"^the file: parameters do not fit; missing"):
        net.check({}, "the file")
    with pytest.raises(UserError, match=r"unexpected: layers\.0\.extra$"):  # nnx.merge would take it without a word
        net.apply({**params, "layers.0.extra": jnp.zeros(3)}, jnp.ones((1, 3)))


def test_abstract_networks_hold_no_arrays(chain):
    net, _ = chain
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in net.shapes.values())
    assert not [leaf for leaf in jax.tree.leaves(net._graphdef) if isinstance(leaf, jax.Array)]


def test_policies_by_name():
    assert Policy.named("float32") == FP32
    assert Policy.named("bfloat16").compute == jnp.bfloat16
    with pytest.raises(UserError, match="dtype is 'float16'"):
        Policy.named("float16")


def test_group_norm_keeps_its_digits_where_the_mean_is_large():
    """E[x²] - E[x]² in float32 would lose all of them; and bfloat16 input has float32 statistics."""
    norm = GroupNorm(2, 6, 1e-5, policy=FP32)
    norm.scale[...], norm.bias[...] = jnp.arange(1.0, 7.0), jnp.arange(6.0)
    x = np.random.default_rng(0).standard_normal((2, 5, 4, 6)) + 3000.0
    x = x.astype(np.float32).astype(np.float64)
    grouped = x.reshape(2, 20, 2, 3)
    mean, var = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    wanted = ((grouped - mean) / np.sqrt(var + 1e-5)).reshape(x.shape) * np.arange(1.0, 7.0) + np.arange(6.0)
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), wanted, atol=1e-2)


@pytest.mark.parametrize("size", [(2, 2), (3, 4), (9, 11), (14, 7), (63, 64)])
def test_enlargement_is_the_peers_at_odd_sizes(size):
    import torch

    height, width = size
    x = np.random.default_rng(0).standard_normal((1, -(-height // 2), -(-width // 2), 2)).astype(np.float32)
    wanted = torch.nn.functional.interpolate(torch.from_numpy(x).permute(0, 3, 1, 2), size=size, mode="nearest")
    np.testing.assert_array_equal(enlarge(jnp.asarray(x), size), wanted.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(enlarge(jnp.asarray(x)), x.repeat(2, 1).repeat(2, 2))
