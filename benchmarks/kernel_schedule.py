"""python benchmarks/kernel_schedule.py [--topology=v5p-8] [--tokens=4096] [--head=40] [--heads=64] [--kernel=splash]

Estimates the time of the attention kernel on a TPU without a TPU: compiles it and reads the compiler's schedule, in
which each instruction bundle is one cycle. Memory stalls are not included. Prints for forward and backward: the cycles
per iteration of the innermost loop, the time of the kernel, the time of the cost that it declares to XLA, and the
utilization of each unit in the loop. `--kernel=splash` shows JAX's splash attention instead. Needs the extra `plan`.
"""

import argparse
import dataclasses
import math
import os
import pathlib
import re
import sys
import tempfile

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from lcm_jax import cli
from lcm_jax.errors import UserError
from lcm_jax.models.kernels import flash
from lcm_jax.planning import topology
from lcm_jax.planning.chips import Chip
from lcm_jax.planning.compiled import HloProgram, Operation

SPLASH, SPLASH_BACKWARD = (512, 2048), (1024, 1024)  # queries and keys of a block


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The compiler's schedule of a kernel.

    Attributes:
      always: bundles that run in every iteration of the loop over the grid.
      ends: bundles that run only at the start or end of an axis; counted once per run of the innermost axis.
      use: unit → share of its slots that the loop's bundles fill.
    """

    always: int
    ends: int
    use: dict[str, float]


def read(folder: pathlib.Path, name: str) -> Schedule:
    """Reads the schedule of the operation `name` from a folder of compiler dumps."""
    bundles = next(file for file in folder.glob(f"*-{name}-*-final_bundles.txt") if "analysis" not in file.name)
    address, starts, jumps = 0, {}, []
    for line in bundles.read_text().splitlines():
        if here := re.match(r"\s*(0x[0-9a-f]+)\s", line):
            address = int(here[1], 16)
        for region in re.findall(r"Start(?:/End empty)? region (\d+)", line):
            starts[region] = address
        if jump := re.search(r"sbr\.rel .*target = \$region(\d+)", line):
            jumps.append((address, jump[1]))
    ways = [(at, starts[region]) for at, region in jumps if region in starts]
    first, last = max(((to, at) for at, to in ways if to <= at), key=lambda loop: loop[1] - loop[0])
    inside = [(at, to) for at, to in ways if first <= at < to <= last]
    # Bundles skipped by outermost jumps; the longest jump skips the loop body after the last iteration.
    inside.remove(max(inside, key=lambda way: way[1] - way[0]))
    skipped = [to - at for at, to in inside if not any(a <= at and to <= b for a, b in inside if (a, b) != (at, to))]
    table = next(folder.glob(f"*-{name}-*-final_hlo-static-per-bundle-utilization.txt")).read_text().splitlines()
    units, slots = table[1].split(", "), [int(n) for n in table[2].split()]
    rows = [[int(n) for n in row.split()] for row in table[4:] if row.strip()][first:last]
    use = {unit: sum(row[i] for row in rows) / slots[i] / len(rows) for i, unit in enumerate(units)}
    return Schedule(last - first - sum(skipped), sum(skipped), use)


def splash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """JAX's splash attention without a mask, with the blocks that its schedule favours at 4,096 tokens."""
    tokens, heads = q.shape[1:3]
    forward, backward = (dict(zip(("q", "kv"), blocks, strict=True)) for blocks in (SPLASH, SPLASH_BACKWARD))
    layout = splash_attention_kernel.QKVLayout.SEQ_MINOR
    blocks = splash_attention_kernel.BlockSizes(
        block_q=min(forward["q"], tokens),
        block_kv=min(forward["kv"], tokens),
        block_q_dkv=min(backward["q"], tokens),
        block_kv_dkv=min(backward["kv"], tokens),
        use_fused_bwd_kernel=True,
        q_layout=layout,
        k_layout=layout,
        v_layout=layout,
    )
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((tokens, tokens))] * heads)
    attend = splash_attention_kernel.make_splash_mha_single_device(mask=mask, block_sizes=blocks)
    return jnp.swapaxes(jax.vmap(attend)(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v))), 1, 2)


KERNELS = {"flash": flash.flash_attention, "splash": splash}


def compile_kernels(
    kernel: str, where: topology.Topology, folder: pathlib.Path, tokens: int, head: int, heads: int
) -> HloProgram:
    """Compiles both kernels for one chip; the compiler dumps its files to `folder`."""
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    os.environ["LIBTPU_INIT_ARGS"] = f"{given} --xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    device = topology.devices(where)[0]
    x = jax.ShapeDtypeStruct((1, tokens, heads, head), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(device))
    gradient = jax.value_and_grad(lambda *x: jnp.sum(KERNELS[kernel](*x).astype(jnp.float32)), (0, 1, 2))
    lowered = jax.jit(gradient).lower(x, x, x)
    with topology.quiet():
        return HloProgram(lowered.compile().as_text() or "")


def flash_cycles(schedule: Schedule, cores: int, tokens: int, heads: int, *, backward: bool) -> int:
    """Returns the cycles of a call of our kernel."""
    inner, outer = flash.QUERIES, flash.KEYS_BACKWARD
    if not backward:
        inner, outer = flash.KEYS, flash.QUERIES
    inner, outer = (tokens // flash._largest(tokens, flash.BLOCK, most) for most in (inner, outer))
    # cores share the independent axes: forward all but the innermost, backward the heads
    rounds = math.ceil(heads / cores) * outer if backward else math.ceil(heads * outer / cores)
    return rounds * (inner * schedule.always + schedule.ends)


def splash_cycles(schedule: Schedule, cores: int, tokens: int, heads: int, *, backward: bool) -> int:
    """Returns the cycles of a call of splash attention, whose body is behind a condition that holds without a mask."""
    q, kv = (tokens // min(block, tokens) for block in (SPLASH_BACKWARD if backward else SPLASH))
    return math.ceil(heads / cores) * q * kv * (schedule.always + schedule.ends)


def row(kernel: Operation, schedule: Schedule, chip: Chip, tokens: int, heads: int, of: str) -> str:
    """Returns a row of the table."""
    backward = "transpose(" in kernel.source or "_dkv_" in kernel.name
    count = {"flash": flash_cycles, "splash": splash_cycles}[of]
    cycles = count(schedule, topology.CORES[chip.kind], tokens, heads, backward=backward)
    declared = re.search(r'"flops":"(\d+)"', kernel.text)
    floor = f"{int(declared[1]) / chip.peak_flops * 1e3:7.3f} ms" if declared else "none".rjust(10)
    used = ", ".join(f"{unit} {share:.0%}" for unit, share in schedule.use.items() if share >= 0.1)
    name = "backward" if backward else "forward"
    return f"{name:9} {schedule.always:6d} cycles  {cycles / chip.clock * 1e3:7.3f} ms  {floor}   {used}"


def main(argv: list[str]) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5p-8", help="of whose chip; as in lcm_jax.plan")
    parser.add_argument("--tokens", type=int, default=4096, help="queries, and keys, of each head")
    parser.add_argument("--head", type=int, default=40, help="channels of a head")
    parser.add_argument("--heads", type=int, default=64, help="times the batch")
    parser.add_argument("--kernel", default="flash", choices=KERNELS)
    args = parser.parse_args(argv)
    where = topology.parse(args.topology)
    if args.tokens < 1 or args.tokens % flash.BLOCK:
        raise UserError(f"--tokens={args.tokens} is not a multiple of the kernel's block size {flash.BLOCK}")
    for name in ("head", "heads"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)}; it must be at least 1")
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        program = compile_kernels(args.kernel, where, folder, args.tokens, args.head, args.heads)
        print(f"{where.chip.kind}, {args.heads} heads of {args.head} channels, {args.tokens} tokens")
        print("          one pass       schedule     declared   slots used")
        for kernel in program.operations():
            if kernel.kind == "custom-call" and "tpu_custom_call" in kernel.text:
                print(row(kernel, read(folder, kernel.name), where.chip, args.tokens, args.heads, args.kernel))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
