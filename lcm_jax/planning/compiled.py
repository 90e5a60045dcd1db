"""Reading a compiled program: what runs, how often, what it costs, and what devices tell each other meanwhile.

The text of a program that XLA has compiled and scheduled lists each computation's operations in the order in which they
run. TPU operations carry the compiler's estimate of their cycles, once, however often a loop repeats them; a kernel of
Pallas carries what its author says of it, or nothing.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator

import numpy as np

_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
    "u64": 8, "f64": 8, "c64": 8, "c128": 16, "f8e4m3fn": 1, "f8e5m2": 1, "s4": 0.5, "u4": 0.5,
}  # fmt: skip
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_CHAIN_START, _CHAIN_DONE, _CHAINED = "async-collective-start", "async-collective-done", "chain_id="


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line of a computation, and how often it runs.

    Attributes:
      name, kind: its own name, and its opcode.
      times: how often it runs in a step: the product of the loops around it.
      cycles: the compiler's estimate of one run; 0 where there is none.
      bytes: of its result on one device.
      source: the function of the model that it comes from, as a path.
      text: the line.
    """

    name: str
    kind: str
    times: int
    cycles: int
    bytes: int
    source: str
    text: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between devices.

    Attributes:
      kind: one of COLLECTIVES.
      times: how often it runs in a step.
      bytes: of one run's result on a device.
      groups: device numbers that exchange with each other, group by group; of a permutation the pairs.
      start, end: cycles of all that runs before it starts, and before its result is needed; those of all rounds of the
        loop it is in. Equal where nothing runs meanwhile.
      source: the function of the model that it comes from.
    """

    kind: str
    times: int
    bytes: int
    groups: tuple[tuple[int, ...], ...]
    start: float
    end: float
    source: str


@dataclasses.dataclass(frozen=True)
class _Line:
    name: str
    kind: str
    type: str
    operands: str
    text: str


class Program:
    """A compiled program's text, read."""

    def __init__(self, text: str) -> None:
        """Args: what `jax.stages.Compiled.as_text` returns."""
        self._computations: dict[str, list[_Line]] = {}
        self._entry = ""
        lines: list[_Line] = []
        for text_line in text.splitlines():
            header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", text_line)
            if header:
                lines = self._computations.setdefault(header[2], [])
                if header[1]:
                    self._entry = header[2]
            elif line := _read(text_line):
                lines.append(line)
        if not self._entry:
            raise ValueError("no entry computation; is this a compiled program's text?")

    def operations(self) -> list[Operation]:
        """All that runs, fusions as one operation each, loops' bodies and branches in place of their loop."""
        return [
            Operation(line.name, line.kind, times, _cycles(line), size_of(line.type), _source(line), line.text)
            for line, times, _ in self._run(self._entry, 1)
            if line.kind not in ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while")
        ]

    def collectives(self, price: Callable[[str, str], float] | None = None) -> list[Collective]:
        """Every exchange in the order of its end; those that the compiler has put into a fusion are taken out of it.

        For chips of one core XLA writes an exchange as a chain of fusions: `async-collective-start`, one of the same
        number called `async-collective-done`, and between them others, which compute and have a piece of it in them.

        Args: (opcode, line) -> cycles of an operation for which the compiler has written none; by default 0.
        """
        found: list[Collective] = []
        started: dict[tuple[int, str], tuple[_Line, float]] = {}
        total = 0.0
        for line, times, scope in self._run(self._entry, 1):
            kind = line.kind.removesuffix("-start").removesuffix("-done")
            inner = [other for other in self._inside(line) if other.kind.removesuffix("-start") in COLLECTIVES]
            ended: list[tuple[_Line, str, int, float]] = []  # what, kind, bytes, cycles before its start
            if line.name.startswith(_CHAIN_START) or (line.kind.endswith("-start") and (kind in COLLECTIVES or inner)):
                started[scope, line.name] = (line, total)
            elif opened := self._opened(line, scope, started):
                start, before = opened
                what = next((other for other in self._inside(start) if other.kind in COLLECTIVES), start)
                ended.append((what, what.kind.removesuffix("-start"), size_of(line.type), before))
            elif kind in COLLECTIVES and line.kind == kind:
                ended.append((line, kind, size_of(line.type), total))
            elif line.kind == "fusion":
                for what in (other for other in inner if _CHAINED not in other.text):
                    of_result, kind = size_of(what.type), what.kind.removesuffix("-start")
                    if kind == "all-reduce" and size_of(line.type) < of_result:
                        kind, of_result = "reduce-scatter", size_of(line.type)
                    ended.append((what, kind, of_result, total))
            for what, kind, size, before in ended:
                found.append(Collective(kind, times, size, _groups(what), before, total, _source(what)))
            total += times * (_cycles(line) or (price(line.kind, line.text) if price else 0))
        return found

    def _opened(
        self, line: _Line, scope: int, started: dict[tuple[int, str], tuple[_Line, float]]
    ) -> tuple[_Line, float] | None:
        """The line and the cycles at which the exchange began of which this is the end; None if it ends none."""
        names = re.findall(r"%([\w.\-]+)", line.operands) if line.kind.endswith("-done") else []
        if line.name.startswith(_CHAIN_DONE):
            names = [_CHAIN_START + line.name.removeprefix(_CHAIN_DONE)]
        return next((started.pop((scope, name)) for name in names if (scope, name) in started), None)

    def _inside(self, line: _Line) -> Iterator[_Line]:
        for name in re.findall(r"(?:calls|called_computations)=\{?%?([\w.\-]+)", line.text):
            for inner in self._computations.get(name, ()):
                yield inner
                yield from self._inside(inner)

    def _run(self, computation: str, times: int, depth: int = 0) -> Iterator[tuple[_Line, int, int]]:
        """Lines in their order, with how often they run and a number of the computation's call."""
        for line in self._computations[computation]:
            yield line, times, hash((computation, times, depth))
            if line.kind == "while":
                body, condition = (_named(line, key) for key in ("body", "condition"))
                yield from self._run(body, times * self._trips(line, condition), depth + 1)
            elif line.kind == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", line.text)
                names = branches[1].split(", ") if branches else [_named(line, k) for k in ("true_computation",)]
                costs = {name.strip("% "): self._cost(name.strip("% ")) for name in names}
                yield from self._run(max(costs, key=lambda name: costs[name]), times, depth + 1)  # the dearest
            elif line.kind == "call":
                yield from self._run(_named(line, "to_apply"), times, depth + 1)

    def _cost(self, computation: str) -> int:
        return sum(_cycles(line) * times for line, times, _ in self._run(computation, 1))

    def _trips(self, line: _Line, condition: str) -> int:
        """How often a loop runs: as XLA says, or as its condition compares a counter from zero with a constant."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line.text)
        if known:
            return int(known[1])
        lines = {other.name: other for other in self._computations[condition]}
        for other in lines.values():
            compared = "direction=LT" in other.text and re.findall(r"%([\w.\-]+)", other.operands)
            for name in compared or ():
                number = re.match(r"(\d+)$", lines[name].operands) if name in lines else None
                if number and lines[name].kind == "constant":
                    return int(number[1])
        return 1


def _read(text: str) -> _Line | None:
    match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", text)
    if not match:
        return None
    end = _end_of_type(text, match.end())
    kind = re.match(r" ([\w\-]+)\(", text[end:])
    if not kind:
        return None
    start = end + kind.end()
    return _Line(match[1], kind[1], text[match.end() : end], text[start : _closing(text, start)], text.strip())


def _end_of_type(text: str, start: int) -> int:
    """Where a type ends: at the first space outside of parentheses and braces."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] in "({[") - (text[place] in ")}]")
        if text[place] == " " and depth == 0:
            return place
    return len(text)


def _closing(text: str, start: int) -> int:
    depth = 1
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    return len(text)


def size_of(type: str) -> int:
    """Bytes of a type, of a tuple's all parts: 'bf16[8,128]{1,0:T(8,128)}' is 2048."""
    size = 0.0
    for element, dimensions in re.findall(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]", type):
        size += _BYTES.get(element, 0) * math.prod(int(n) for n in dimensions.split(",") if n)
    return int(size)


def _cycles(line: _Line) -> int:
    match = re.search(r'"estimated_cycles":"(\d+)"', line.text)
    return int(match[1]) if match else 0


def _source(line: _Line) -> str:
    match = re.search(r'op_name="([^"]*)"', line.text)
    return match[1] if match else ""


def _named(line: _Line, key: str) -> str:
    match = re.search(rf"\b{key}=%?([\w.\-]+)", line.text)
    if not match:
        raise ValueError(f"{line.kind} without {key}: {line.text[:200]}")
    return match[1]


def _groups(line: _Line) -> tuple[tuple[int, ...], ...]:
    """Written out, or as an array of numbers reshaped and transposed: [4,2]<=[2,4]T(1,0)."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", line.text)
    if listed:
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line.text)
    if not iota:
        return ()
    shape, of, order = ([int(n) for n in part.split(",")] if part else [] for part in iota.groups())
    numbers = np.arange(math.prod(of)).reshape(of)
    numbers = numbers.transpose(order) if order else numbers
    return tuple(map(tuple, numbers.reshape(shape).tolist()))
