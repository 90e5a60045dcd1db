"""Hand-written gradients against those that JAX derives from the plain formulas."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import print_saved_residuals

from lcm_jax.models import attention
from lcm_jax.models.kernels import row_attention
from lcm_jax.models.kernels.attend import plain_attention
from lcm_jax.models.kernels.convolution import convolve
from lcm_jax.models.norms import GroupNorm, LayerNorm
from lcm_jax.models.policy import FP32, Policy

EPS = 1e-5
NUMBERS = ("NHWC", "HWIO", "NHWC")


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def group_norm(x, scale, bias, groups, silu):
    b, c = x.shape[0], x.shape[-1]
    grouped = x.reshape(b, -1, groups, c // groups)
    mean = grouped.mean((1, 3), keepdims=True)
    deviation = jnp.sqrt(grouped.var((1, 3), keepdims=True) + EPS)
    y = ((grouped - mean) / deviation).reshape(x.shape) * scale + bias
    return y * jax.nn.sigmoid(y) if silu else y


def layer_norm(x, scale, bias):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + EPS) * scale + bias


def softmax_attention(q, k, v):
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(scores, axis=-1), v)


def save_attention(f):
    return jax.checkpoint(f, policy=jax.checkpoint_policies.save_only_these_names("attention"))


def by_rows(q, k, v):
    return row_attention.row_attention(*(x.swapaxes(1, 2) for x in (q, k, v))).swapaxes(1, 2)


def gated(h):
    x, gate = jnp.split(h, 2, axis=-1)
    return x * gate * 0.5 * (1 + jax.lax.erf(gate / 2**0.5))


def norm_of(module, **options):
    """The module as a function of its input and weights."""

    graphdef, _ = nnx.split(module)
    return lambda x, scale, bias: nnx.merge(graphdef, {"scale": scale, "bias": bias})(x, **options)


def cases(policy=FP32):
    scale, bias = 1 + normal(1, 6), normal(2, 6)
    pixels = 3 + 2 * normal(0, 2, 5, 3, 6)
    return {
        "group norm": (
            norm_of(GroupNorm(2, 6, EPS, policy=policy)),
            lambda *a: group_norm(*a, 2, False),
            (pixels, scale, bias),
        ),
        "group norm, silu": (
            norm_of(GroupNorm(2, 6, EPS, policy=policy), silu=True),
            lambda *a: group_norm(*a, 2, True),
            (pixels, scale, bias),
        ),
        "layer norm": (
            norm_of(LayerNorm(6, EPS, policy=policy)),
            layer_norm,
            (3 + 2 * normal(0, 2, 7, 6), scale, bias),
        ),
        "attention": (
            plain_attention,
            softmax_attention,
            (3 * normal(0, 2, 9, 2, 5), normal(1, 2, 7, 2, 5), normal(2, 2, 7, 2, 5)),
        ),
        "attention by rows": (
            by_rows,
            softmax_attention,
            (3 * normal(0, 2, 12, 2, 5), normal(1, 2, 7, 2, 5), normal(2, 2, 7, 2, 5)),
        ),
        "convolution": (
            lambda x, kernel: convolve(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=NUMBERS),
            lambda x, kernel: jax.lax.conv(
                x.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1), (1, 1), "SAME"
            ).transpose(0, 2, 3, 1),
            (normal(0, 2, 2, 3, 13), normal(1, 3, 3, 13, 12)),  # of twelve pixels: by taps
        ),
        "gated": (attention._gated, gated, (2 * normal(0, 2, 3, 10),)),
    }


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_value_and_gradients_are_the_formulas(name, dtype, monkeypatch):
    """In bfloat16 the formula is taken in float32 of the same numbers: what differs is rounding."""
    if name == "attention by rows":
        monkeypatch.setattr(row_attention, "TABLE", 25)  # three rows of seven at a time
    found, formula, args = cases(Policy(jnp.dtype(dtype)))[name]
    args = (args[0].astype(dtype), *(a if "norm" in name else a.astype(dtype) for a in args[1:]))
    value, pull = jax.vjp(found, *args)
    dy = normal(9, *value.shape, dtype=value.dtype)
    expected, pull_expected = jax.vjp(formula, *(a.astype(jnp.float32) for a in args))
    assert value.dtype == dtype
    close = 1e-5 if dtype == "float32" else 2e-2
    pairs = zip((value, *pull(dy)), (expected, *pull_expected(dy.astype(jnp.float32))), strict=True)
    for number, (a, b) in enumerate(pairs):
        assert number == 0 or a.dtype == args[number - 1].dtype
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=close * float(jnp.abs(b).max()))


def test_large_scores_do_not_overflow():
    q, k, v = 300 * normal(0, 1, 4, 1, 8), 300 * normal(1, 1, 4, 1, 8), normal(2, 1, 4, 1, 8)
    np.testing.assert_allclose(plain_attention(q, k, v), softmax_attention(q, k, v), atol=1e-4)
    assert jnp.isfinite(jax.grad(lambda q: plain_attention(q, k, v).sum())(q)).all()


@pytest.mark.parametrize(
    ("out", "side", "stride", "padding", "by_taps"),
    [(16, 3, 1, 1, True), (15, 3, 1, 1, False), (16, 3, 2, 1, False), (16, 3, 1, 0, False), (16, 1, 1, 0, True)],
)
def test_which_convolutions_are_taken_by_taps(out, side, stride, padding, by_taps):
    """Those that keep the map's size, if it has no more pixels (here 16) than the kernel has channels."""
    x, kernel = jnp.zeros((1, 4, 4, 20)), jnp.zeros((side, side, 20, out))
    jaxpr = jax.make_jaxpr(
        lambda x: convolve(x, kernel, (stride,) * 2, ((padding,) * 2,) * 2, dimension_numbers=NUMBERS)
    )(x)
    assert ("custom_vjp" in str(jaxpr)) == by_taps


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint, save_attention], ids=["plain", "remat", "save"])
def test_a_cpu_takes_large_tables_by_rows(wrap):
    """The largest array of forward and backward has TABLE elements, not the attention scores of 2 heads."""
    n = 2 * int(row_attention.TABLE**0.5)
    x = jax.ShapeDtypeStruct((1, n, 2, 4), jnp.float32)
    step = jax.jit(jax.grad(wrap(lambda q, k, v: jnp.sin(plain_attention(q, k, v)).sum()), argnums=(0, 1, 2)))
    text = step.lower(x, x, x).compile().as_text()
    shapes = [re.findall(r"f32\[([\d,]+)\]", line) for line in text.splitlines()]
    assert max(math.prod(map(int, s.split(","))) for found in shapes for s in found) <= row_attention.TABLE


def test_a_constant_map_is_normalised_to_the_bias():
    """Its variance is zero: eps alone keeps the gradient finite."""
    norm, _, (_, scale, bias) = cases()["group norm"]
    x = jnp.full((1, 4, 4, 6), 1000.0)
    np.testing.assert_allclose(norm(x, scale, bias), jnp.broadcast_to(bias, x.shape), atol=1e-5)
    assert jnp.isfinite(jax.grad(lambda x: norm(x, scale, bias).sum())(x)).all()


@pytest.mark.parametrize("name", ["group norm", "group norm, silu", "layer norm", "gated"])
def test_of_a_layer_in_bfloat16_its_input_alone_is_kept(name, capsys):
    """No float32 array of the input's size."""
    found, _, args = cases(Policy(jnp.dtype("bfloat16")))[name]
    x, rest = args[0].astype(jnp.bfloat16), args[1:]
    print_saved_residuals(lambda x: found(x, *rest), x)
    kept = capsys.readouterr().out
    assert f"bf16[{','.join(map(str, x.shape))}]" in kept or "bf16[2,15,6]" in kept
    large = [line for line in kept.splitlines() if line.startswith("f32") and size(line) >= x.size // 2]
    assert not large, large


def size(line):
    return int(np.prod([int(n) for n in line[line.index("[") + 1 : line.index("]")].split(",") if n]))
