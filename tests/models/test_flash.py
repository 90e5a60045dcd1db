"""The kernel against plain attention, values and gradients, interpreted; which layers go to which implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from lcm_jax.host import compile_cache
from lcm_jax.models.kernels import attend as attend_module
from lcm_jax.models.kernels import flash
from lcm_jax.models.kernels.attend import attend
from lcm_jax.models.kernels.flash import BLOCK, flash_attention
from lcm_jax.planning import topology


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


def with_gradients(attention, g):
    """(q, k, v) -> the output and the gradients of its product with g, as one list."""

    def run(*x):
        y, vjp = jax.vjp(attention, *x)
        return [y, *vjp(g.astype(y.dtype))]

    return jax.jit(run)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("head", [40, 64, 80, 160])
def test_values_and_gradients_are_plain_attentions(head, parts, monkeypatch):
    """Four blocks of queries, five of keys of two parts each, so that each running sum goes on and ends.

    In two parts: as if the gradients of 32 queries were all that fast memory holds.
    """
    monkeypatch.setattr(flash, "HEAD", head * 12 * 64 // parts)
    q, k, v, g = (normal(i, 1, tokens, 2, head) for i, tokens in enumerate((64, 160, 160, 64)))
    ours = with_gradients(lambda *x: flash_attention(*x, block=16), g)
    assert len(kernels(ours, q, k, v)) == 2 * (1 + parts)  # one branch is for TPUs, one is interpreted
    expected = with_gradients(jax.nn.dot_product_attention, g)(q, k, v)
    np.testing.assert_allclose(expected[0], plain(q, k, v), atol=1e-5 * float(jnp.abs(v).max()))
    for a, b in zip(ours(q, k, v), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


def test_bfloat16_is_as_exact_as_plain_attention_is():
    """Two blocks of queries of two parts each, forward and backward."""
    q, k, v, g = (normal(i, 2, tokens, 2, 40, dtype=jnp.bfloat16) for i, tokens in enumerate((64, 160, 160, 64)))
    exact = with_gradients(jax.nn.dot_product_attention, g)(*(x.astype(jnp.float32) for x in (q, k, v)))
    found = with_gradients(lambda *x: flash_attention(*x, block=16), g)(q, k, v)
    theirs = with_gradients(jax.nn.dot_product_attention, g)(q, k, v)
    assert all(x.dtype == jnp.bfloat16 for x in found)
    for a, b, c in zip(found, theirs, exact, strict=True):
        assert np.abs(a.astype(jnp.float32) - c).max() < 2 * np.abs(b.astype(jnp.float32) - c).max()


@pytest.mark.parametrize(
    ("chip", "tokens", "head", "dtype"),
    [
        ("v4:1x1x1", 16384, 160, jnp.bfloat16),
        ("v4:1x1x1", 16384, 160, jnp.float32),
        ("v5e:1x1", 16384, 160, jnp.float32),
        ("v5p:1x1x1", 4096, 40, jnp.bfloat16),
        ("v5p:1x1x1", 2304, 64, jnp.float32),
    ],
)
def test_the_compiler_for_tpus_takes_it(chip, tokens, head, dtype):
    """Above all, its blocks fit into a chip's fast memory."""
    where = jax.sharding.SingleDeviceSharding(topology.devices(topology.parse(chip))[0])
    x = jax.ShapeDtypeStruct((1, tokens, 2, head), dtype, sharding=where)
    lowered = jax.jit(jax.grad(lambda *x: jnp.sum(flash_attention(*x)), (0, 1, 2))).lower(x, x, x)
    with compile_cache.off():  # from which a program for a chip that is not there can't be read
        text = lowered.compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') >= 2


def test_scores_of_any_size_do_not_overflow():
    q = 300 * normal(0, 1, 32, 1, 40)
    found = jax.jit(lambda *x: flash_attention(*x, block=16))(q, q, normal(1, 1, 32, 1, 40))
    np.testing.assert_allclose(found, plain(q, q, normal(1, 1, 32, 1, 40)), atol=1e-3)


@pytest.mark.parametrize(("dtype", "passes"), [(jnp.bfloat16, 1), (jnp.float32, 6)])
def test_every_kernel_says_what_it_costs(dtype, passes):
    """Products over 40 channels take as long as over 128: two forward, two backward, where three more have 40 rows."""
    x = jax.ShapeDtypeStruct((2, 4096, 8, 40), dtype)
    found = [
        e.params["cost_estimate"]
        for e in kernels(jax.grad(lambda *x: jnp.sum(flash_attention(*x).astype(jnp.float32)), (0, 1, 2)), x, x, x)
    ]
    scores, operand = 2 * 8 * 4096**2, 2 * 8 * 4096 * 40 * jnp.dtype(dtype).itemsize
    rows, columns = 512 // jnp.dtype(dtype).itemsize * 2, 1024 // jnp.dtype(dtype).itemsize * 2
    assert {(cost.flops, cost.bytes_accessed) for cost in found} == {
        (2 * scores * 2 * 128 * passes, (2 + 2 * 4096 // rows) * operand),
        (2 * scores * (2 * 128 + 3 * 40) * passes, (1 + 2 * 4096 // columns + 4) * operand),
    }


@pytest.mark.parametrize(("tokens", "most", "size"), [(4096, 8, 2048), (1024, 8, 1024), (2304, 8, 768), (2304, 2, 256)])
def test_blocks_are_the_largest_that_divide(tokens, most, size):
    assert flash._largest(tokens, 256, most) == size


def test_tokens_that_no_block_divides_are_refused():
    x = normal(0, 1, 40, 1, 8)
    with pytest.raises(ValueError, match="40 tokens are not a multiple of the block size 16"):
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

    monkeypatch.setattr(attend_module, "flash_attention", lambda *_: take("pallas"))
    monkeypatch.setattr(attend_module, "plain_attention", lambda *_: take("xla"))
    monkeypatch.setattr(attend_module, "cudnn_attention", lambda *_: take("cudnn"))
    q, k = (jax.ShapeDtypeStruct((1, n, 8, head), jnp.bfloat16) for n in (queries, keys))
    attend(q, k, k, implementation)
    assert seen == [taken]


@pytest.mark.parametrize(("queries", "keys"), [(16, 16), (16, 7), (9, 7), (9, 9)])
def test_cudnn_is_given_even_numbers_of_tokens(monkeypatch, queries, keys):
    """With XLA instead of cuDNN: the padding appears in no output and in no gradient."""
    xla, seen = jax.nn.dot_product_attention, []

    def stand_in(q, k, v, *, implementation, **lengths):
        seen.append((implementation, q.shape[1] % 2, k.shape[1] % 2))
        return xla(q, k, v, implementation="xla", **lengths)

    q, k, v, g = (normal(i, 2, tokens, 2, 8) for i, tokens in enumerate((queries, keys, keys, queries)))
    expected = with_gradients(xla, g)(q, k, v)
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    found = with_gradients(attend_module.cudnn_attention, g)(q, k, v)
    assert seen == [("cudnn", 0, 0)]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


def test_saving_the_outputs_of_attention_saves_the_kernel():
    """In the backward pass the forward kernel does not run again."""
    x = jax.ShapeDtypeStruct((1, 32, 1, 40), jnp.float32)

    def runs(policy):
        f = jax.checkpoint(lambda *x: jnp.sum(flash_attention(*x, block=16) ** 2), policy=policy)
        return len(kernels(jax.grad(f), x, x, x)) / 2  # one branch is for TPUs, one is interpreted

    assert runs(None) == 3
    assert runs(jax.checkpoint_policies.save_only_these_names("attention")) == 2
