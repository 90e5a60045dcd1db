"""FLOPs counted in a traced function, against numbers worked out by hand and XLA's own."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from lcm_jax.models.kernels.attend import plain_attention
from lcm_jax.models.kernels.convolution import convolve
from lcm_jax.parallel.mesh import MeshConfig, make_mesh
from lcm_jax.planning.flops import count


def of_function(function, *args):
    return count(jax.make_jaxpr(function)(*args))


def zeros(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_matrix_products():
    assert of_function(lambda a, b: a @ b, zeros(3, 5), zeros(5, 7)) == 2 * 3 * 5 * 7
    assert of_function(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), zeros(4, 3, 5), zeros(4, 5, 7)) == 4 * 2 * 105
    assert of_function(lambda a: jnp.tanh(a) + 1, zeros(100)) == 0


def conv(x, w, stride=1):
    return jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_and_their_gradients(stride):
    x, w = zeros(2, 8, 8, 4), zeros(3, 3, 4, 6)
    forward = 2 * 2 * (8 // stride) ** 2 * 6 * 3 * 3 * 4
    assert of_function(lambda x, w: conv(x, w, stride), x, w) == forward
    gradient = of_function(jax.grad(lambda x, w: jnp.sum(conv(x, w, stride)), argnums=(0, 1)), x, w)
    assert 2 * forward <= gradient <= 3.3 * forward  # to the input and to the kernel; the value itself may fall away


def test_loops_branches_and_recomputation():
    w = zeros(5, 5)

    def repeated(w):
        return jax.lax.scan(lambda x, _: (x @ w, None), jnp.eye(5), length=10)[0]

    assert of_function(repeated, w) == 10 * 250
    assert of_function(lambda w: jax.lax.cond(w[0, 0] > 0, lambda: w @ w @ w, lambda: w @ w), w) == 2 * 250
    plain = of_function(jax.grad(lambda w: jnp.sum(jnp.sin(w @ w) @ w)), w)
    again = of_function(jax.grad(jax.checkpoint(lambda w: jnp.sum(jnp.sin(w @ w) @ w))), w)
    assert again > plain


def test_a_device_counts_its_own():
    mesh = make_mesh(MeshConfig(8, 1))
    f = jax.shard_map(lambda a, b: a @ b, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    assert of_function(f, zeros(16, 5), zeros(5, 7)) == 2 * 2 * 5 * 7


def test_it_is_xlas_count():
    def network(x, w, v):
        return jnp.sum(jax.nn.relu(conv(x, w)).reshape(2, -1) @ v)

    given = zeros(2, 8, 8, 4), zeros(3, 3, 4, 6), zeros(384, 10)
    analysis = jax.jit(network).lower(*given).compile().cost_analysis()
    assert of_function(network, *given) == pytest.approx(analysis["flops"], rel=0.15)  # XLA leaves the border out


def test_what_a_gradient_computes_again_is_not_counted():
    """Attention by rows takes the scores again for its gradient; needed are two products forward, four back."""
    x = zeros(1, 1024, 1, 8)
    found = of_function(jax.grad(lambda q, k, v: plain_attention(q, k, v).sum(), argnums=(0, 1, 2)), x, x, x)
    assert found == 6 * 2 * 1024 * 1024 * 8


def test_the_gradient_of_a_frozen_kernel_is_not_counted():
    """Where kernels outweigh their maps, gradients are written by hand: of four pixels and eight channels, say."""
    x, kernel = zeros(1, 2, 2, 8), zeros(3, 3, 8, 8)

    def loss(x, kernel):
        return convolve(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")).sum()

    once = of_function(loss, x, kernel)
    assert once > 0
    assert of_function(jax.grad(loss), x, kernel) == 2 * once
    assert of_function(jax.grad(loss, argnums=(0, 1)), x, kernel) == 3 * once
