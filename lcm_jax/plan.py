"""python -m lcm_jax.plan --config=configs/sd15.py --topology=v5p-256 [--batch-a-chip=8] [--config.<option>=<value> …]

Compiles the training step of `train` without the hardware and prints its cost: memory, FLOPs, communication, time, and
a profile. Topologies are products (v4-64, v5e-64, v5p-256, v6e-64) or shapes (v5p:4x4x8); `local` stands for this
machine's devices. A published model's weights are not needed. Compiling a full-size step takes about 15 minutes on two
cores. `--fast` compiles each kind of layer once and adds them up, which needs less memory; docs/pods.md compares both.
Requires the extra `plan`, except for `local`.
"""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from lcm_jax import cli, config_file
from lcm_jax.config import Config
from lcm_jax.errors import UserError, is_out_of_memory
from lcm_jax.host import compile_cache, files
from lcm_jax.parallel.mesh import found_devices, make_mesh, split_cpu
from lcm_jax.planning import estimate, fast, flops, topology
from lcm_jax.planning.blueprint import blueprint
from lcm_jax.planning.compiled import HloProgram
from lcm_jax.planning.estimate import Compiled, Report
from lcm_jax.planning.report import no_fit_table, search_table, table
from lcm_jax.planning.topology import Topology
from lcm_jax.training import saved_step
from lcm_jax.training.program import Program, make_program


def compile_step(config: Config, where: Topology | None) -> Compiled:
    """Compiles the training step of a config.

    Raises: UserError if mesh, batch size or folder are invalid or compilation fails; NoFit if memory is too small.
    """
    devices = topology.devices(where) if where else found_devices()
    step = make_program(config, blueprint(config), make_mesh(config.mesh, devices))
    lowered = step.lower()
    print("Compiling the step; for Stable Diffusion it takes 10 to 90 minutes ...", file=sys.stderr, flush=True)
    start = time.perf_counter()
    with topology.quiet():
        try:
            executable = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            why = str(error).strip().splitlines()[0]
            if not is_out_of_memory(error):
                raise UserError(f"the compiler failed: {why}") from None
            raise NoFit(why, step) from None
    return Compiled(step, lowered, executable, where, time.perf_counter() - start)


class NoFit(Exception):
    """Raised if a step does not fit into a chip's memory; holds the compiler's message and the step."""

    def __init__(self, why: str, step: Program) -> None:
        super().__init__(why)
        self.step = step


def described(config: Config, step: Program, where: Topology | None) -> Report:
    """Returns the configuration of a step as plain values: the head of each report."""
    return {
        "topology": where.name if where else "local",
        "product": where.product if where else "",
        "slices": where.slices if where else 1,
        "chips": step.mesh.size,
        "mesh": dict(step.mesh.shape),
        "batch_size": config.batch_size,
        "batch_a_chip": config.batch_size // step.mesh.size,
        "accumulate": config.accumulate,
        "remat": config.model.remat,
        "attention": config.model.attention,
        "gather": config.mesh.gather,
        "frozen": config.mesh.frozen,
        "chip_memory_bytes": where.chip.memory if where else None,
    }


def report(config: Config, compiled: Compiled) -> Report:
    """Returns all figures of a compiled step as plain values."""
    where, chips = compiled.topology, compiled.step.mesh.size
    program = HloProgram(compiled.executable.as_text() or "")
    needed = model_flops(config)
    memory, times = estimate.memory(compiled), estimate.times(compiled, program, needed // chips)
    analysis = estimate.cost(compiled)
    return {
        **described(config, compiled.step, where),
        "fits": memory["total"] <= where.chip.memory if where else None,
        "memory_bytes": memory,
        "flops_a_chip": {"model": needed // chips, "xla": analysis["flops"]},
        "bytes_a_chip": analysis["bytes accessed"],
        "collectives": estimate.exchange(program),
        "to_explain": estimate.unusual(program),
        "seconds": times,
        "images_per_second": estimate.images_a_second(config.batch_size, times),
        "profile": estimate.profile(program, where)[:40] if where else [],
        "compile_seconds": compiled.seconds,
    }


def fast_report(config: Config, where: Topology, prices: fast.Prices) -> Report:
    """Returns the figures of a step from its pieces: those of `report`, but for what only a complete program has."""
    step = make_program(config, blueprint(config), make_mesh(config.mesh, topology.devices(where)))
    found = fast.Estimate(step, where, prices)
    needed = model_flops(config)
    memory, times = fast.memory(found), fast.times(found, needed // step.mesh.size)
    return {
        "fast": True,
        **described(config, step, where),
        "fits": memory["total"] <= where.chip.memory,
        "memory_bytes": memory,
        "flops_a_chip": {"model": needed // step.mesh.size, "xla": found.total("flops")},
        "bytes_a_chip": found.total("moved"),
        "collectives": estimate.sums(found.collectives),
        "to_explain": [],
        "seconds": times,
        "images_per_second": estimate.images_a_second(config.batch_size, times),
        "profile": fast.profile(found)[:40],
        "compile_seconds": found.seconds,
    }


_counted: dict[str, int] = {}  # the FLOPs of a config; a search changes only what they do not depend on


def model_flops(config: Config) -> int:
    """Returns the FLOPs of a step over the global batch, without recomputation."""
    plain = dataclasses.replace(
        config,
        accumulate=1,
        mesh=type(config.mesh)(),
        model=dataclasses.replace(config.model, remat="none", attention="xla"),
    )
    if repr(plain) not in _counted:
        step = make_program(plain, blueprint(plain), make_mesh(plain.mesh, jax.devices()[:1]))
        _counted[repr(plain)] = flops.count(step.trace().jaxpr)
    return _counted[repr(plain)]


def search(config: Config, where: Topology | None, batches: Sequence[int], prices: fast.Prices | None) -> list[Report]:
    """Compiles combinations of batch per chip, remat and fsdp; returns a report or an error for each, fastest first.

    Skips larger batches if a smaller one does not fit. With `prices` the reports are those of `--fast`.
    """
    chips = where.chips if where else jax.device_count()
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64) if chips % size == 0]
    found: list[Report] = []
    for fsdp, remat in itertools.product(sizes, ("layer", "block", "block_save_attention", "none")):
        for batch in sorted(batches):
            tried = dataclasses.replace(
                config,
                batch_size=batch * chips,
                mesh=dataclasses.replace(config.mesh, data=-1, fsdp=fsdp),
                model=dataclasses.replace(config.model, remat=remat),
            )
            what = {"batch_a_chip": batch, "remat": remat, "fsdp": fsdp}
            print(f"trying batch {batch} per chip, remat {remat}, fsdp {fsdp}", file=sys.stderr)
            try:
                if where and prices:
                    result = fast_report(tried, where, prices)
                else:
                    result = report(tried, compile_step(tried, where))
                why = "" if result["fits"] is not False else estimate.too_much(result)
                too_large = bool(why)
            except (NoFit, UserError) as error:
                result, why = {}, str(error)
                too_large = isinstance(error, NoFit)
            found.append({**result, **what, "why_not": why})
            if too_large:
                break
    return sorted(found, key=lambda each: (bool(each["why_not"]), -(each.get("images_per_second") or 0.0)))


def with_batch(config: Config, batch_a_chip: int | None, chips: int) -> Config:
    """Sets the batch size per chip; None: keeps config.batch_size, but at least one per chip and micro-batch."""
    if batch_a_chip is not None:
        return dataclasses.replace(config, batch_size=batch_a_chip * chips)
    least = chips * config.accumulate
    if config.batch_size < least:
        print(f"config.batch_size={config.batch_size} is raised to {least}: one image per chip and micro-batch")
        return dataclasses.replace(config, batch_size=least)
    return config


def main(argv: Sequence[str]) -> int:
    """Runs the command with the arguments `argv`. Returns the exit code: 1 if the step does not fit."""
    parser = cli.parser("plan", __doc__)
    parser.add_argument("--config", required=True, help="as for train")
    parser.add_argument("--topology", required=True, help="v5p-256, v5p:4x4x8, … or local")
    parser.add_argument("--slices", type=int, default=1, help="number of such slices in one run (default: 1)")
    parser.add_argument("--batch-a-chip", type=int, help="batch per chip, instead of config.batch_size")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also writes all figures to this file")
    parser.add_argument(
        "--save", type=pathlib.Path, metavar="FILE", help="saves the compiled step, for train --compiled"
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="tries batch sizes, remat and fsdp sizes, and recommends the fastest combination that fits",
    )
    parser.add_argument("--fast", action="store_true", help="adds up the step's layers, each compiled once")
    args, overrides = parser.parse_with_config(argv)
    config = config_file.load(args.config, overrides)
    local = args.topology == "local"
    if args.batch_a_chip is not None and args.batch_a_chip < 1:
        raise UserError(f"--batch-a-chip={args.batch_a_chip}; it must be at least 1")
    if local and (args.search or args.slices != 1):
        raise UserError("--search and --slices need a TPU topology; local has no time estimates")
    if args.fast and (local or args.save):
        other = f"--topology={args.topology}" if local else f"--save={args.save}"
        raise UserError(f"--fast does not go with {other}: it estimates a step for a TPU and compiles no complete one")
    for option, path in (("--json", args.json), ("--save", args.save)):
        if path is not None and path.is_dir():
            raise UserError(f"{option}={path} is a folder; give a file name")
        if path is not None:
            files.make_folder(option, path.parent)
    where = None if local else topology.parse(args.topology, args.slices)
    if local:
        split_cpu(config.mesh.cpu_devices)
    else:
        os.environ["JAX_PLATFORMS"] = "cpu"  # otherwise JAX looks for a TPU on this machine if libtpu is installed
        jax.config.update("jax_platforms", "cpu")
    compile_cache.enable()
    attention = config.model.attention_on((topology.devices(where) if where else found_devices())[0])
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention=attention))
    chips = where.chips if where else jax.device_count()
    prices = fast.Prices(where) if where and args.fast else None
    if args.search:
        if args.save:
            raise UserError(
                "--save writes one step; run it without --search, with the options that --search recommends"
            )
        first = args.batch_a_chip
        found = search(config, where, [first] if first else [1, 2, 4, 8, 16, 32], prices)
        print(search_table(found))
        _write_json(args.json, found)
        return int(bool(found[0]["why_not"]))
    config = with_batch(config, args.batch_a_chip, chips)
    if where and prices:
        figures = fast_report(config, where, prices)
        print(table(figures))
        _write_json(args.json, figures)
        return int(not figures["fits"])
    try:
        with compile_cache.off() if args.save else contextlib.nullcontext():
            compiled = compile_step(config, where)
    except NoFit as error:
        parts = estimate.state_memory(error.step)
        figures = {**described(config, error.step, where), "fits": False, "memory_bytes": parts, "why_not": str(error)}
        print(no_fit_table(figures))
        _write_json(args.json, figures)
        return 1
    figures = report(config, compiled)
    print(table(figures))
    _write_json(args.json, figures)
    if args.save:
        saved_step.save(args.save, compiled.step.mesh, compiled.lowered, compiled.executable)
        option = shlex.quote(f"--compiled={args.save}")
        print(f"The compiled step is in {args.save}; to use it, pass {option} to train")
    return int(figures["fits"] is False)


def _write_json(path: pathlib.Path | None, content: Any) -> None:
    if path is not None:
        files.write_json(path, content)
        print(f"All figures are in {path}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
