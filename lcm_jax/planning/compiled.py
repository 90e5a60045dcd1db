"""Parses the text of a compiled XLA program: its operations, how often they run, their cycles, and collectives.

The text lists the operations of each computation in scheduled order. On TPU each operation has the compiler's estimate
of its cycles for one run, however often a loop repeats it. A Pallas kernel has its author's cost estimate, or none.
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
    """An operation of a program.

    Attributes:
      name, kind: its name and opcode.
      times: runs per step: the product of the trip counts of the enclosing loops.
      cycles: the compiler's estimate for one run; 0 if there is none.
      bytes: size of its result on one device.
      source: path of the model function that it comes from (XLA's op_name).
      text: its line in the program.
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
    """A collective operation.

    Attributes:
      kind: one of COLLECTIVES.
      times: runs per step.
      bytes: size of one run's result on a device.
      groups: groups of device numbers that communicate with each other; (source, target) pairs for a permutation.
      start, end: cycles of everything that runs before its start and before its result is needed. Loops count with all
        their iterations. Equal if nothing runs in between.
      source: path of the model function that it comes from (XLA's op_name).
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


class HloProgram:
    """A parsed program."""

    def __init__(self, text: str) -> None:
        """Args: the result of `jax.stages.Compiled.as_text`."""
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
        """Returns all operations that run. A fusion is one operation; a loop is replaced by those of its body."""
        return [
            Operation(line.name, line.kind, times, _cycles(line), size_of(line.type), _source(line), line.text)
            for line, times, _ in self._run(self._entry, 1)
            if line.kind not in ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while")
        ]

    def collectives(self, price: Callable[[str, str], float] | None = None) -> list[Collective]:
        """Returns all collectives, including those inside fusions, in the order in which they end.

        For single-core chips XLA writes a collective as a chain of fusions: `async-collective-start`,
        `async-collective-done` with the same number, and between them fusions that compute and contain a part of it.

        Args: `price`: (opcode, line) -> cycles of an operation without a compiler estimate; default 0.
        """
        found: list[Collective] = []
        started: dict[tuple[int, str], tuple[_Line, float]] = {}
        total = 0.0
        for line, times, scope in self._run(self._entry, 1):
            kind = line.kind.removesuffix("-start").removesuffix("-done")
            inner = [other for other in self._inside(line) if other.kind.removesuffix("-start") in COLLECTIVES]
            ended: list[tuple[_Line, str, int, float]] = []  # operation, kind, bytes, cycles before its start
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
        """Returns the start line of the collective that `line` ends and the cycles before it, or None."""
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
        """Yields (line, number of runs, id of the call of its computation) in the order of execution."""
        for line in self._computations[computation]:
            yield line, times, hash((computation, times, depth))
            if line.kind == "while":
                body, condition = (_named(line, key) for key in ("body", "condition"))
                yield from self._run(body, times * self._trips(line, condition), depth + 1)
            elif line.kind == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", line.text)
                names = branches[1].split(", ") if branches else [_named(line, k) for k in ("true_computation",)]
                costs = {name.strip("% "): self._cost(name.strip("% ")) for name in names}
                yield from self._run(max(costs, key=lambda name: costs[name]), times, depth + 1)  # the most expensive
            elif line.kind == "call":
                yield from self._run(_named(line, "to_apply"), times, depth + 1)

    def _cost(self, computation: str) -> int:
        return sum(_cycles(line) * times for line, times, _ in self._run(computation, 1))

    def _trips(self, line: _Line, condition: str) -> int:
        """Returns a loop's trip count: XLA's, or the constant that its condition compares with; 1 if unknown."""
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
    """Returns the end of a type: the first space outside of brackets."""
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
    """Returns the bytes of a type, summed over a tuple: 2048 for 'bf16[8,128]{1,0:T(8,128)}'."""
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
    """Parses device groups, either listed or as a reshaped and transposed iota: [4,2]<=[2,4]T(1,0)."""
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
