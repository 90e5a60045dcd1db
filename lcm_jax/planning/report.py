"""Formats the figures of a plan as text tables."""

from collections.abc import Mapping, Sequence
from typing import Any

Figures = dict[str, Any]

ABREAST = 8  # images that a TPU convolves at once, measured by benchmarks/batch_a_chip.py


def table(figures: Figures) -> str:
    """Formats the report of a compiled step."""
    lines = [
        *_head(figures),
        *_few(figures),
        "",
        *_memory(figures),
        "",
        f"FLOPs per chip    {figures['flops_a_chip']['model'] / 1e12:10.3f} T counted from the model, "
        f"{figures['flops_a_chip']['xla'] / 1e12:.3f} T by XLA (a loop's body once)",
        f"bytes per chip    {figures['bytes_a_chip'] / 1e9:10.3f} GB by XLA",
        "",
        *_collectives(figures),
        *_seconds(figures),
        *_profile(figures),
        f"compiled in       {figures['compile_seconds']:10.1f} s",
    ]
    return "\n".join(lines)


def no_fit_table(figures: Figures) -> str:
    """Formats the report of a step that does not fit: the memory of its inputs, and options that may help."""
    limit = figures["chip_memory_bytes"]
    helps = {
        "a smaller batch": figures["batch_a_chip"] > 1,
        "config.accumulate": figures["batch_a_chip"] > figures["accumulate"],
        "config.model.remat=block": figures["remat"] == "none",
        "a larger config.mesh.fsdp": figures["mesh"]["fsdp"] < figures["chips"],
        "config.mesh.frozen=sharded": figures["chips"] > 1 and figures["frozen"] == "replicated",
        "LoRA instead of full weights (config.lora.rank)": True,
    }
    lines = [
        *_head(figures),
        "",
        f"memory per chip   it does NOT fit{f' into {_gib(limit)}' if limit else ''}",
        *_parts(figures["memory_bytes"]),
        "",
        f"The compiler: {figures['why_not']}",
        f"What may help: {', '.join(name for name, possible in helps.items() if possible)}",
    ]
    return "\n".join(lines)


def _head(figures: Figures) -> list[str]:
    name = figures["topology"] + (f" ({figures['product']})" if figures["product"] else "")
    if figures["slices"] > 1:
        name = f"{figures['slices']} slices of {name}"
    if figures.get("fast"):
        name += ", fast: added up from layers"
    mesh = " × ".join(f"{axis} {size}" for axis, size in figures["mesh"].items())
    return [
        f"{name}: {figures['chips']} chips, mesh {mesh}",
        f"batch {figures['batch_size']}, {figures['batch_a_chip']} per chip, in {figures['accumulate']} "
        f"micro-batches; remat {figures['remat']}, attention {figures['attention']}, weights gathered per "
        f"{figures['gather']}, frozen ones {figures['frozen']}",
    ]


def _few(figures: Figures) -> list[str]:
    at_once = figures["batch_a_chip"] // figures["accumulate"]
    if figures["chip_memory_bytes"] is None or at_once >= ABREAST:
        return []
    return [
        f"{at_once} per chip and micro-batch; with {ABREAST} or more, most convolutions take less than "
        "half the time per image"
    ]


def _memory(figures: Figures) -> list[str]:
    memory, limit = figures["memory_bytes"], figures["chip_memory_bytes"]
    verdict = ""
    if limit:
        verdict = f" of {_gib(limit)}: " + ("it fits" if figures["fits"] else "it does NOT fit")
    return [f"memory per chip   {_gib(memory['total']):>10}{verdict}", *_parts(memory)]


def _parts(memory: Mapping[str, float]) -> list[str]:
    return [f"  {name:<16}{_gib(size):>12}" for name, size in memory.items() if name != "total"]


def _collectives(figures: Figures) -> list[str]:
    used = {kind: each for kind, each in figures["collectives"].items() if each["count"]}
    lines = [f"{kind:<18}{each['count']:6d} times, {_gib(each['bytes'])} per chip" for kind, each in used.items()]
    if figures["to_explain"]:
        lines += ["unusual, to be explained:", *(f"  {line}" for line in figures["to_explain"][:8])]
    return [*(lines or ["no communication between chips"]), ""]


def _seconds(figures: Figures) -> list[str]:
    seconds = figures["seconds"]
    if not seconds:
        return []

    def line(name: str, key: str, said: str) -> str:
        value = seconds[key]
        return f"{name:<18}{'-' if value is None else f'{1e3 * value:.2f} ms':>10}  {said}"

    return [
        line("step", "step", "computation, plus the part of the exchange that it does not hide"),
        line(
            "  computation", "compute", "the compiler's cycles, times loop iterations; kernels by their declared cost"
        ),
        line("  exchange", "exchange", "lcm_jax's model of links and hops"),
        line("  not hidden", "exposed", ""),
        line("roofline", "roofline", "FLOPs over peak or bytes over bandwidth, by XLA (a loop's body once)"),
        line("XLA's estimate", "xla", "not accurate for large groups"),
        line("FLOP floor", "floor", "the model's FLOPs at peak"),
        f"{'fraction of peak':<18}{100 * seconds['fraction_of_peak']:>8.1f} %",
        f"{'images/s':<18}{figures['images_per_second']:>10.1f}  over all chips",
        "",
    ]


def _profile(figures: Figures, lines: int = 12) -> list[str]:
    rows = figures["profile"][:lines]
    if not rows:
        return []
    total = figures["seconds"]["compute"]
    named = [
        f"  {1e3 * r['seconds']:9.2f} ms {100 * r['seconds'] / total:5.1f} %  {r['operation']}  {r['module']}"
        for r in rows
    ]
    return ["where the time goes", *named, ""]


def search_table(found: Sequence[Figures]) -> str:
    """Formats the results of `--search` in the given order, and the options of the first one."""
    lines = ["batch / chip  fsdp  remat                 images/s  GiB / chip  "]
    for each in found:
        rate, memory = each.get("images_per_second"), each.get("memory_bytes")
        lines.append(
            f"{each['batch_a_chip']:12d}  {each['fsdp']:4d}  {each['remat']:<20}  "
            f"{f'{rate:.1f}' if rate else '-':>8}  {_gib(memory['total']) if memory else '-':>10}  {each['why_not']}"
        )
    best = found[0]
    if best["why_not"]:
        return "\n".join([*lines, "", "None of these combinations fits."])
    given = {"batch_size": best["batch_size"], "mesh.fsdp": best["fsdp"], "model.remat": best["remat"]}
    options = " ".join(f"--config.{name}={value}" for name, value in given.items())
    return "\n".join([*lines, "", f"Use {options}"])


def _gib(size: float) -> str:
    return f"{size / 2**30:.3f} GiB"
