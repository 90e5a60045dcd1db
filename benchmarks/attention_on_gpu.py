"""python benchmarks/attention_on_gpu.py [--rounds=20] [--batch=8]

Compares XLA and cuDNN attention on a GPU in bfloat16, for the layers of Stable Diffusion 1.5 at 512 px and 2.1 at
768 px: forward only, and forward with gradients, in alternation. The reference for the errors is float32 with
full-precision matrix products, on the first sample. The error is |found - exact| / |exact| with output and gradients
as one vector. Fails if cuDNN's error is more than twice XLA's.
"""

import argparse
import functools
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax import cli
from lcm_jax.errors import UserError
from lcm_jax.models.kernels.attend import cudnn_attention, plain_attention

LAYERS = [  # queries, keys, heads, channels per head
    *((4096, 4096, 8, 40), (4096, 77, 8, 40), (1024, 1024, 8, 80), (1024, 77, 8, 80), (256, 256, 8, 160)),
    *((9216, 9216, 5, 64), (2304, 2304, 10, 64), (2304, 77, 10, 64)),
]
REPEATS = 10  # calls per measurement


def with_gradients(attention: Any, q: Any, k: Any, v: Any, g: Any) -> list[jax.Array]:
    """Returns the output and the gradients of q, k and v for the output gradient g."""
    y, vjp = jax.vjp(attention, q, k, v)
    return [y, *vjp(g)]


def seconds(function: Any, *args: Any) -> float:
    """Returns the mean time per call over REPEATS calls, in seconds."""
    start = time.perf_counter()
    found = [function(*args) for _ in range(REPEATS)]
    jax.block_until_ready(found)
    return (time.perf_counter() - start) / REPEATS


def error(found: list[jax.Array], exact: list[jax.Array]) -> float:
    """Returns the relative error of all arrays as one vector."""
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(found, exact, strict=True)]
    return (sum(np.square(a - b).sum() for a, b in pairs) / sum(np.square(b).sum() for _, b in pairs)) ** 0.5


def main(argv: list[str]) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args(argv)
    if min(args.rounds, args.batch) < 1:
        raise UserError("--rounds and --batch must be at least 1")
    if jax.default_backend() != "gpu":
        raise UserError(f"cuDNN needs a GPU; JAX runs on {jax.default_backend()} here")
    print(f"{jax.devices()[0].device_kind}, batch {args.batch}")
    print("| tokens | seen | heads | head | | xla, ms | cudnn, ms | xla / cudnn, median (range) | error: xla | cudnn |")
    print("|--:|--:|--:|--:|---|--:|--:|--:|--:|--:|")
    implementations = {"xla": plain_attention, "cudnn": cudnn_attention}
    for n, m, heads, head in LAYERS:
        shapes = [(args.batch, tokens, heads, head) for tokens in (n, m, m, n)]
        given = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes)]
        forward = {name: jax.jit(function) for name, function in implementations.items()}
        both = {
            name: jax.jit(functools.partial(with_gradients, function)) for name, function in implementations.items()
        }
        with jax.default_matmul_precision("highest"):
            exact = both["xla"](*(x[:1].astype(jnp.float32) for x in given))
        errors = {name: error([x[:1] for x in function(*given)], exact) for name, function in both.items()}
        for what, functions, inputs in (("forward", forward, given[:3]), ("with gradients", both, given)):
            for function in functions.values():
                seconds(function, *inputs)
            rounds = [
                {name: seconds(function, *inputs) for name, function in functions.items()} for _ in range(args.rounds)
            ]
            ratios = sorted(one["xla"] / one["cudnn"] for one in rounds)
            xla, cudnn = (1e3 * statistics.median(one[name] for one in rounds) for name in implementations)
            print(
                f"| {n} | {m} | {heads} | {head} | {what} | {xla:.3f} | {cudnn:.3f} "
                f"| {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) "
                f"| {errors['xla']:.1e} | {errors['cudnn']:.1e} |",
                flush=True,
            )
        if not errors["cudnn"] <= 2 * errors["xla"]:
            raise UserError(f"cuDNN is less exact than XLA: error {errors['cudnn']:.2e} instead of {errors['xla']:.2e}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, command="attention_on_gpu"))
