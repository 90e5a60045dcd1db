"""The kernel against plain attention, values and gradients, interpreted; which layers go to which implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from lcm_jax.models import flash, scaled_dot_product
from lcm_jax.models.flash import BLOCK, flash_attention
from lcm_jax.models.scaled_dot_product import attend


def normal(seed, *shape, dtype=np.float32):
    return jnp.asarray(2 * np.random.default_rng(seed).standard_normal(shape), dtype)


def plain(q, k, v):
    """Softmax attention in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhnm,bmhd->bnhd", p / p.sum(-1, keepdims=True), v)


def walk(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from walk(inner)


def kernels(function, *args):
    return [e for e in walk(jax.make_jaxpr(function)(*args).jaxpr) if e.primitive.name == "pallas_call"]


@pytest.mark.parametrize("head", [40, 64, 80, 160])
def test_values_and_gradients_are_plain_attentions(head):
    """Three blocks of queries, three of keys of three parts each, so that each running sum goes on and ends."""
    q, k, v, g = (
        normal(0, 1, 48, 2, head),
        normal(1, 1, 144, 2, head),
        normal(2, 1, 144, 2, head),
        normal(3, 1, 48, 2, head),
    )
    ours = jax.jit(lambda *x: jax.value_and_grad(lambda *x: jnp.sum(flash_attention(*x, block=16) * g), (0, 1, 2))(*x))
    reference = jax.jit(
        lambda *x: jax.value_and_grad(lambda *x: jnp.sum(jax.nn.dot_product_attention(*x) * g), (0, 1, 2))(*x)
    )
    (_, found), (_, expected) = ours(q, k, v), reference(q, k, v)
    y = jax.jit(lambda *x: flash_attention(*x, block=16))(q, k, v)
    for a, b in zip((y, *found), (plain(q, k, v), *expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


def test_bfloat16_is_as_exact_as_plain_attention_is():
    q, k, v = (normal(i, 2, 32, 2, 40, dtype=jnp.bfloat16) for i in range(3))
    found = jax.jit(lambda *x: flash_attention(*x, block=16))(q, k, v)
    assert found.dtype == jnp.bfloat16
    error = np.abs(np.asarray(found, np.float64) - plain(q, k, v)).max()
    theirs = np.abs(np.asarray(jax.nn.dot_product_attention(q, k, v), np.float64) - plain(q, k, v)).max()
    assert error < 2 * theirs


def test_scores_of_any_size_do_not_overflow():
    q = 300 * normal(0, 1, 32, 1, 40)
    found = jax.jit(lambda *x: flash_attention(*x, block=16))(q, q, normal(1, 1, 32, 1, 40))
    np.testing.assert_allclose(found, plain(q, q, normal(1, 1, 32, 1, 40)), atol=1e-3)


def test_every_kernel_says_what_it_costs():
    """Products over 40 channels take as long as over 128: two forward, two backward, where three more have 40 rows."""
    x = jax.ShapeDtypeStruct((2, 4096, 8, 40), jnp.bfloat16)
    found = [
        e.params["cost_estimate"]
        for e in kernels(jax.grad(lambda *x: jnp.sum(flash_attention(*x).astype(jnp.float32)), (0, 1, 2)), x, x, x)
    ]
    flops = {cost.flops / (2 * 2 * 8 * 4096**2) for cost in found}
    assert flops == {2 * 128, 2 * 128 + 3 * 40}
    operand = 2 * 8 * 4096 * 40 * 2
    assert all(4 * operand < cost.bytes_accessed < 20 * operand for cost in found)


@pytest.mark.parametrize(("tokens", "most", "size"), [(4096, 8, 2048), (1024, 8, 1024), (2304, 8, 768), (2304, 2, 256)])
def test_blocks_are_the_largest_that_divide(tokens, most, size):
    assert flash._largest(tokens, 256, most) == size


def test_tokens_that_no_block_divides_are_refused():
    x = normal(0, 1, 40, 1, 8)
    with pytest.raises(ValueError, match="40 tokens are no multiple of the block of 16"):
        flash_attention(x, x, x, block=16)


@pytest.mark.parametrize(
    ("implementation", "queries", "keys", "head", "taken"),
    [
        ("pallas", 4096, 4096, 40, "pallas"),
        ("pallas", 16384, 16384, 64, "pallas"),
        ("pallas", 9216, 9216, 64, "pallas"),  # 768 pixels
        ("pallas", 4096, 77, 40, "xla"),  # to the text
        ("pallas", 1024, 1024, 80, "pallas"),
        ("pallas", 2304, 2304, 64, "pallas"),
        ("pallas", 256, 256, 160, "xla"),
        ("pallas", 4096 + BLOCK // 2, 4096 + BLOCK // 2, 40, "xla"),
        ("cudnn", 4096, 4096, 40, "cudnn"),
        ("cudnn", 4096, 77, 40, "cudnn"),
        ("cudnn", 256, 256, 160, "xla"),  # wider than cuDNN takes
        ("cudnn", 256, 256, 20, "xla"),
        ("xla", 4096, 4096, 40, "xla"),
    ],
)
def test_each_layer_takes_the_program_that_can(monkeypatch, implementation, queries, keys, head, taken):
    seen = []

    def take(name):
        seen.append(name)

    monkeypatch.setattr(scaled_dot_product, "flash_attention", lambda *_: take("pallas"))
    monkeypatch.setattr(scaled_dot_product, "plain_attention", lambda *_: take("xla"))
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *_, implementation: take(implementation))
    q, k = (jax.ShapeDtypeStruct((1, n, 8, head), jnp.bfloat16) for n in (queries, keys))
    attend(q, k, k, implementation)
    assert seen == [taken]


def test_saving_the_outputs_of_attention_saves_the_kernel():
    """In the backward pass the forward kernel does not run again."""
    x = jax.ShapeDtypeStruct((1, 32, 1, 40), jnp.float32)

    def runs(policy):
        f = jax.checkpoint(lambda *x: jnp.sum(flash_attention(*x, block=16) ** 2), policy=policy)
        return len(kernels(jax.grad(f), x, x, x)) / 2  # one branch is for TPUs, one is interpreted

    assert runs(None) == 3
    assert runs(jax.checkpoint_policies.save_only_these_names("attention")) == 2
