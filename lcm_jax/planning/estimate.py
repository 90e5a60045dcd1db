"""Estimates from a compiled step: memory, FLOPs, communication, time, and a profile by module."""

import collections
import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import jax

from lcm_jax.planning import exchange_time
from lcm_jax.planning.chips import Chip
from lcm_jax.planning.compiled import COLLECTIVES, Collective, HloProgram, Operation
from lcm_jax.planning.exchange_time import Position
from lcm_jax.planning.topology import Topology
from lcm_jax.training.program import Program

Report = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step compiled for a topology (None: this machine's devices), and the compile time in seconds."""

    step: Program
    lowered: jax.stages.Lowered
    executable: jax.stages.Compiled
    topology: Topology | None
    seconds: float


def memory(compiled: Compiled) -> Report:
    """Returns bytes per chip by category; `temporaries` are activations, gathered weights and gradients."""
    stats = compiled.executable.memory_analysis()
    assert stats is not None  # None only for GPU executables that were loaded from a file
    parts = state_memory(compiled.step)
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    parts["padding"] = max(0, stats.argument_size_in_bytes - sum(parts.values()))
    parts["temporaries"] = stats.temp_size_in_bytes + max(0, results)
    parts["program"] = stats.generated_code_size_in_bytes
    return {"total": sum(parts.values()), **parts}


def state_memory(step: Program) -> Report:
    """Returns bytes per chip of a step's inputs by category; needs no compilation."""
    return {
        "parameters": _bytes(step.state["params"]),
        "ema": _bytes(step.state["ema"]),
        "optimizer": _bytes(step.state["opt_state"]),
        "frozen": _bytes(step.frozen),
        "batch": _bytes(step.batch),
    }


def _bytes(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(leaf.dtype.itemsize * int(_product(leaf.sharding.shard_shape(leaf.shape))) for leaf in leaves)


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def exchange(program: HloProgram) -> Report:
    """Returns {kind: count and bytes} of the collectives per step on one device, including loop repetitions."""
    return sums(program.collectives())


def sums(collectives: Sequence[Collective]) -> Report:
    """Returns {kind: count and bytes} of these collectives."""
    found: Report = {kind: {"count": 0, "bytes": 0} for kind in COLLECTIVES}
    for collective in collectives:
        found[collective.kind]["count"] += collective.times
        found[collective.kind]["bytes"] += collective.times * collective.bytes
    return found


def times(compiled: Compiled, program: HloProgram, model_flops: int) -> Report:
    """Returns estimates of the seconds per step; {} for this machine's devices.

    `compute` is from the compiler's cycles, `exchange` the time of all collectives (`exchange_time.py`), `exposed` the
    part of it that is not hidden behind computation (`waiting`); `step` = compute + exposed. `roofline` is max(FLOPs /
    peak, bytes / bandwidth) by XLA's counts, `xla` its own estimate or None, `floor` model_flops (per chip) / peak.
    """
    topology = compiled.topology
    if topology is None:
        return {}
    chip, analysis = topology.chip, cost(compiled)
    positions = [
        Position(getattr(device, "slice_index", 0) or 0, tuple(device.coords))
        for device in compiled.step.mesh.devices.flat
    ]
    compute = sum(cycles * times for _, cycles, times in _priced(program, topology)) / chip.clock
    collectives = program.collectives(functools.partial(declared, chip))
    seconds = [each.times * exchange_time.seconds(each, positions, topology) for each in collectives]
    exposed = waiting(collectives, seconds, chip.clock)
    step = compute + exposed
    xla = analysis.get("optimal_seconds", 0.0)
    return {
        "step": step,
        "compute": compute,
        "exchange": sum(seconds),
        "exposed": exposed,
        "roofline": max(analysis["flops"] / chip.peak_flops, analysis["bytes accessed"] / chip.bandwidth),
        "xla": xla if xla > 0 else None,
        "floor": model_flops / chip.peak_flops,
        "fraction_of_peak": model_flops / chip.peak_flops / step,
    }


def waiting(collectives: Sequence[Collective], seconds: Sequence[float], clock: float) -> float:
    """Returns the seconds that a chip waits for collectives, which use the network one at a time, in order of start.

    Args:
      seconds: duration of each, summed over its runs.
      clock: cycles/s, to convert their starts and ends.
    """
    events = [(each.start, False, i) for i, each in enumerate(collectives)]
    events += [(each.end, True, i) for i, each in enumerate(collectives)]
    waited = free = 0.0  # seconds waited so far; time at which the network is free
    finished = {}
    for cycles, is_end, i in sorted(events):
        now = cycles / clock + waited
        if is_end:
            waited += max(0.0, finished[i] - now)
        else:
            finished[i] = free = max(now, free) + seconds[i]
    return waited


def cost(compiled: Compiled) -> dict[str, float]:
    """Returns XLA's cost analysis of the program, which counts the body of a loop once."""
    analysis = compiled.executable.cost_analysis()
    return {"flops": 0.0, "bytes accessed": 0.0, **(analysis or {})}


def profile(program: HloProgram, topology: Topology) -> list[Report]:
    """Returns the computation time in seconds by module and operation of the model, longest first."""
    seconds: dict[tuple[str, str], float] = collections.defaultdict(float)
    for operation, cycles, times in _priced(program, topology):
        seconds[place(operation.source)] += cycles * times / topology.chip.clock
    return [
        {"module": m, "operation": o, "seconds": s} for (m, o), s in sorted(seconds.items(), key=lambda each: -each[1])
    ]


def _priced(program: HloProgram, topology: Topology) -> list[tuple[Operation, float, int]]:
    """Returns (operation, cycles, times) of all operations but collectives."""
    return [
        (operation, operation.cycles or declared(topology.chip, operation.kind, operation.text), operation.times)
        for operation in program.operations()
        if operation.kind.removesuffix("-start").removesuffix("-done") not in COLLECTIVES
    ]


def declared(chip: Chip, kind: str, text: str) -> float:
    """Returns the cycles of a Pallas kernel from its declared cost estimate; 0 for other operations."""
    cost = kind == "custom-call" and re.search(r'"cost_estimate":\{([^}]*)\}', text)
    if not cost:
        return 0.0
    numbers = {name: float(value) for name, value in re.findall(r'"(\w+)":"?(\d+)', cost[1])}
    flops, moved = numbers.get("flops", 0.0), numbers.get("bytes_accessed", 0.0)
    return max(flops / chip.peak_flops, moved / chip.bandwidth) * chip.clock


# JAX's transformations in a path: around a part, as in transpose(jvp(student)), or as separate parts (_INNER)
_TRANSFORMED = re.compile(r"\b(?:jvp|transpose|vmap|remat\d*|checkpoint)\(([^()]*)\)")
_FUNCTION = re.compile(r"\bjit\([^()]*\)")
_INNER = re.compile(
    r"(pjit|shard_map|checkpoint|remat\d*|rematted_computation|while|body|cond|scan|closed_call|"
    r"custom_\w+|branch_\d+\w*|[A-Za-z]+,[A-Za-z]+->[A-Za-z]*)?"  # the last: an einsum
)


def place(source: str) -> tuple[str, str]:
    """Returns (module, operation) of a path like 'jit(step)/transpose(jvp(student))/conv_in/dot_general'.

    The module ends in "(forward)", "(backward)", or "(again)" for what `jax.checkpoint` recomputes.
    """
    plain, count = _TRANSFORMED.subn(r"\1", _FUNCTION.sub("", source))
    while count:
        plain, count = _TRANSFORMED.subn(r"\1", plain)
    parts = [part for part in plain.split("/") if not _INNER.fullmatch(part)]
    *modules, operation = parts or ["other"]
    for size in range(len(modules) // 2, 0, -1):  # the path of a recomputed block repeats its modules
        if modules[:size] == modules[size : 2 * size]:
            modules = modules[size:]
    if "rematted_computation" in source:
        when = "again"
    else:
        when = "backward" if "transpose(" in source else "forward"
    return f"{'/'.join(modules) or 'step'} ({when})", operation


def images_a_second(batch_size: int, report_times: Report) -> float | None:
    """Returns the estimated images/s of all chips together; None without time estimates."""
    return batch_size / report_times["step"] if report_times else None


def unusual(program: HloProgram) -> list[str]:
    """Returns a line for each collective other than gathers, scatters and sums: these are not expected."""
    return [
        f"{c.kind} of {c.bytes} bytes, {c.times} times: {c.source or 'no source'}"
        for c in program.collectives()
        if c.kind in ("all-to-all", "collective-permute", "ragged-all-to-all")
    ]


def too_much(report: Report) -> str:
    """Describes the memory of a step that does not fit: total, limit and largest category."""
    memory = report["memory_bytes"]
    most = max((name for name in memory if name != "total"), key=lambda name: memory[name])
    return (
        f"needs {memory['total'] / 2**30:.1f} of {report['chip_memory_bytes'] / 2**30:.0f} GiB, "
        f"{memory[most] / 2**30:.1f} of them {most}"
    )
