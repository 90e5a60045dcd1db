"""python benchmarks/batch_a_chip.py [--chips=v5p,v5e] [--batches=1,2,4,8,16]

Prints the milliseconds per image of a forward 3 × 3 convolution on a TPU, by batch size per chip, for each level of
Stable Diffusion 1.5 at 512 px in bfloat16. Compiles for one chip and reads the compiler's cycle estimates; no TPU is
needed. Needs the extra `plan`.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from lcm_jax import cli
from lcm_jax.errors import UserError
from lcm_jax.planning import estimate, topology
from lcm_jax.planning.compiled import HloProgram

LEVELS = ((64, 320), (32, 640), (16, 1280), (8, 1280))  # side in pixels, channels


@jax.jit
def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns the convolution with "SAME" padding and stride 1."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def milliseconds(chip: str, batch: int, side: int, channels: int) -> float:
    """Returns the estimated time of one convolution, in milliseconds."""
    where = topology.parse(f"{chip}-1" if chip in ("v5e", "v6e") else f"{chip}:1x1x1")
    with topology.quiet():
        on = SingleDeviceSharding(topology.devices(where)[0])
        shapes = ((batch, side, side, channels), (3, 3, channels, channels))
        args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=on) for shape in shapes]
        program = HloProgram(convolve.lower(*args).compile().as_text())
    return 1e3 * sum(row["seconds"] for row in estimate.profile(program, where))


def main(argv: list[str]) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default="v5p,v5e")
    parser.add_argument("--batches", default="1,2,4,8,16")
    args = parser.parse_args(argv)
    if not all(word.isdigit() and int(word) for word in args.batches.split(",")):
        raise UserError(f"--batches={args.batches} must be numbers separated by commas, as in --batches=4,8")
    print("| chip | images | " + " | ".join(f"{side} × {side} × {channels}" for side, channels in LEVELS) + " |")
    print("|---|--:|" + "--:|" * len(LEVELS))
    for chip in args.chips.split(","):
        for batch in map(int, args.batches.split(",")):
            found = [milliseconds(chip, batch, *level) / batch for level in LEVELS]
            print(f"| {chip} | {batch} | " + " | ".join(f"{each:.3f}" for each in found) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, command="batch_a_chip"))
