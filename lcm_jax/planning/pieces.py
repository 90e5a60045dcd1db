"""Cuts a traced training step into pieces: what one layer of one network computes in one pass.

A piece is a run of equations of the same module, such as a residual block of the teacher, or the gradient of one of the
student's. Equal pieces are compiled once. What is computed for each weight (casts, the optimizer) is a piece per
weight. Inside `shard_map` shapes are those of one device, so such a piece is a program for one device. Collectives are
no part of pieces.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import DebugInfo, Jaxpr, JaxprEqn, Literal, Var, jaxprs_in_params
from jax.sharding import PartitionSpec as P

from lcm_jax.planning.estimate import place

COLLECTIVES = {"all_gather": "all-gather", "psum": "all-reduce", "reduce_scatter": "reduce-scatter"}
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr", "remat2": "jaxpr",
          "checkpoint": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Line:
    """An equation of the step without calls around it.

    Attributes:
      equation: with variables of the complete step.
      module: the module that it comes from, and the pass ("student/conv_in (backward)").
      times: runs per step.
      local: inside `shard_map`.
    """

    equation: JaxprEqn
    module: str
    times: int
    local: bool


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of the step, which is compiled by itself.

    Attributes:
      module, times, local: as in `Line`.
      program: the equations with what they read and return.
      collective: the name of the one collective that it consists of, or "".
    """

    module: str
    times: int
    local: bool
    program: Jaxpr
    collective: str = ""

    @property
    def key(self) -> tuple[bool, str]:
        """Equal for pieces that compile to the same program."""
        return self.local, str(self.program)

    @property
    def inputs(self) -> list[Any]:
        """The variables that it reads."""
        return list(self.program.invars)

    @property
    def outputs(self) -> list[Any]:
        """The variables that it returns."""
        return list(self.program.outvars)

    def __call__(self, *args: Any) -> list[Any]:
        """Computes the piece: what its program returns for these inputs."""
        values: dict[Any, Any] = dict(zip(self.inputs, args, strict=True))
        for line in self.program.eqns:
            given = [each.val if isinstance(each, Literal) else values[each] for each in line.invars]
            with jax.named_scope(str(line.source_info.name_stack)):
                found = line.primitive.bind(*given, **line.primitive.get_bind_params(line.params))
            found = found if line.primitive.multiple_results else [found]
            values.update(zip(line.outvars, found, strict=True))
        return [values[each] for each in self.outputs]


class Step:
    """A step as a sequence of pieces.

    Attributes:
      pieces: in the order of the trace.
      arguments, inputs: variables of the step's arguments; of these and of constants.
      outputs: variables that it returns.
      specs: variable at the border of `shard_map` → its partition spec.
      same: variable → the variable whose memory it has, where `shard_map` or a loop gives it another name.
    """

    def __init__(self, traced: Jaxpr) -> None:
        """Cuts a trace, as of `Program.trace().jaxpr`, into pieces."""
        self.specs: dict[Var, P] = {}
        self.same: dict[Any, Any] = {}
        values: dict[Any, Any] = {each: each for each in (*traced.constvars, *traced.invars)}
        self.arguments = list(traced.invars)
        self.inputs = {*traced.constvars, *traced.invars}
        lines = list(self._flat(traced, values, "", 1, False))
        self.outputs = [values[each] for each in traced.outvars if isinstance(each, Var)]
        self.outputs = list(_variables(self.outputs))
        cutter = _Cutter(lines, self.outputs, self.same)
        self.pieces = list(cutter.pieces())
        self.root = cutter.root

    def _flat(self, jaxpr: Any, values: dict[Any, Any], path: str, times: int, local: bool) -> Iterator[Line]:
        """Yields the equations of a jaxpr; `values` has its inputs, and gets what it computes."""
        for equation in jaxpr.eqns:
            name, params = equation.primitive.name, equation.params
            stack = str(equation.source_info.name_stack)
            inner = f"{path}/{stack}" if stack else path
            given = [each if isinstance(each, Literal) else values[each] for each in equation.invars]
            call = _CALLS.get(name)
            if call and call in params:
                body = params[call]
                named = inner + (
                    "/rematted_computation" if name == "checkpoint" and params.get("differentiated") else ""
                )
                yield from self._call(
                    body, given, equation, values, inner if name != "checkpoint" else named, times, local
                )
            elif name == "shard_map":
                yield from self._shard_map(equation, given, values, inner, times)
            elif name == "scan" and _is_large(params["jaxpr"]):
                yield from self._scan(equation, given, values, inner, times, local)
            elif name == "cond" and any(map(_is_large, params["branches"])):
                body = max(params["branches"], key=lambda branch: len(branch.jaxpr.eqns))
                yield from self._call(body, given[1:], equation, values, inner, times, local)
            else:
                fresh = [Var(each.aval) for each in equation.outvars]
                values.update(zip(equation.outvars, fresh, strict=True))
                module, _ = place(f"{inner}/equation")
                if name == "optimization_barrier":  # one for each value: the cut is not to depend on it
                    for one, of_one in zip(given, fresh, strict=True):
                        yield Line(equation.replace(invars=[one], outvars=[of_one]), module, times, local)
                else:
                    yield Line(equation.replace(invars=given, outvars=fresh), module, times, local)

    def _call(self, body: Any, given: Sequence[Any], equation: JaxprEqn, values: dict, *rest: Any) -> Iterator[Line]:
        inner, consts = getattr(body, "jaxpr", body), getattr(body, "consts", ())
        inside = dict(zip(inner.invars, given, strict=True))
        for const, value in zip(inner.constvars, consts, strict=True):
            inside[const] = Literal(value, const.aval) if not const.aval.shape else self._input(const)
        yield from self._flat(inner, inside, *rest)
        for outer, each in zip(equation.outvars, inner.outvars, strict=True):
            values[outer] = each if isinstance(each, Literal) else inside[each]

    def _input(self, variable: Var) -> Var:
        fresh = Var(variable.aval)
        self.inputs.add(fresh)
        return fresh

    def _shard_map(
        self, equation: JaxprEqn, given: Sequence[Any], values: dict, path: str, times: int
    ) -> Iterator[Line]:
        inner, params = equation.params["jaxpr"], equation.params
        inside: dict[Any, Any] = {}
        for each, outer, spec in zip(inner.invars, given, params["in_specs"], strict=True):
            inside[each] = outer if isinstance(outer, Literal) else Var(each.aval)
            if isinstance(outer, Var):
                self.specs[outer], self.same[inside[each]] = spec, outer
        yield from self._flat(inner, inside, path, times, True)
        for outer, each, spec in zip(equation.outvars, inner.outvars, params["out_specs"], strict=True):
            values[outer] = fresh = Var(outer.aval)
            self.specs[fresh] = spec
            if isinstance(each, Var):
                self.same[fresh] = inside[each]

    def _scan(self, equation: JaxprEqn, given: Sequence[Any], values: dict, *rest: Any) -> Iterator[Line]:
        """A loop over micro-batches: its body counts with all rounds, its carry lives throughout."""
        path, times, local = rest
        inner, params = equation.params["jaxpr"].jaxpr, equation.params
        inside: dict[Any, Any] = dict(zip(inner.constvars, map(self._input, inner.constvars), strict=True))
        for each, outer in zip(inner.invars, given, strict=True):
            inside[each] = (
                outer if isinstance(outer, Literal) or outer.aval.shape == each.aval.shape else Var(each.aval)
            )
            if inside[each] is not outer:
                self.same[inside[each]] = outer
        yield from self._flat(inner, inside, path, times * params["length"], local)
        for outer, each in zip(equation.outvars, inner.outvars, strict=True):
            values[outer] = each if isinstance(each, Literal) else inside[each]


def _is_large(body: Any) -> bool:
    """Returns whether a loop or a branch contains more than one layer, so that it is worth being cut."""
    body = getattr(body, "jaxpr", body)
    return len({str(each.source_info.name_stack) for each in body.eqns}) > 8 or any(
        _is_large(inner) for each in body.eqns for inner in jaxprs_in_params(each.params)
    )


class _Cutter:
    """Groups the lines of a step into pieces."""

    def __init__(self, lines: Sequence[Line], outputs: Sequence[Var], same: Mapping[Any, Any]) -> None:
        self._same = same
        self._lines = _needed(_once(lines), {self.root(each) for each in outputs}, self.root)
        self._readers: dict[Var, list[int]] = {self.root(each): [len(lines)] for each in outputs}
        for i, line in enumerate(self._lines):
            for each in _variables(line.equation.invars):
                self._readers.setdefault(self.root(each), []).append(i)

    def root(self, variable: Var) -> Var:
        """Returns the variable whose memory this one has."""
        while variable in self._same:
            variable = self._same[variable]
        return variable

    def pieces(self) -> Iterator[Piece]:
        """Yields the pieces, in the order of the trace."""
        run: list[int] = []
        for i, line in enumerate(self._lines):
            before = self._lines[run[-1]] if run else line
            alone = line.equation.primitive.name in COLLECTIVES
            if alone or (before.module, before.times, before.local) != (line.module, line.times, line.local):
                yield from self._of_run(run)
                run = []
            if alone:
                yield self._piece([i])
            else:
                run.append(i)
        yield from self._of_run(run)

    def _of_run(self, run: Sequence[int]) -> Iterator[Piece]:
        if not run:
            return
        outside = self._lines[run[0]].module.startswith("step ")
        for part in self._connected(run) if outside else [run]:
            yield self._piece(part)

    def _connected(self, run: Sequence[int]) -> list[list[int]]:
        """Divides a run of equations into those that share arrays. What reads a sum over an array comes after it."""
        phases = self._phases(run)
        makers: dict[Var, int] = {}
        owner = {i: i for i in run}

        def root(i: int) -> int:
            while owner[i] != i:
                owner[i] = i = owner[owner[i]]
            return i

        for i in run:
            for each in _variables(self._lines[i].equation.invars):
                maker = makers.get(each)
                if maker is not None and has_axes(each) and phases[maker] == phases[i]:
                    owner[root(i)] = root(maker)
            makers.update(dict.fromkeys(self._lines[i].equation.outvars, i))
        groups: dict[int, list[int]] = {}
        for i in run:
            groups.setdefault(root(i), []).append(i)
        return list(groups.values())

    def _phases(self, run: Sequence[int]) -> dict[int, int]:
        """Returns the number of sums over arrays that must be complete before each equation."""
        after: dict[Var, int] = {}
        phases: dict[int, int] = {}
        sums = set()
        for i in run:
            line = self._lines[i].equation
            read = list(_variables(line.invars))
            phases[i] = max((after.get(each, 0) for each in read), default=0)
            if any(map(has_axes, read)) and not any(map(has_axes, line.outvars)):
                sums.add(i)
            after.update(dict.fromkeys(line.outvars, phases[i] + (i in sums)))
        for i in reversed(run):  # what is only read later is computed later
            readers = [reader for each in self._lines[i].equation.outvars for reader in self._readers.get(each, ())]
            if readers and i not in sums and all(reader in phases for reader in readers):
                phases[i] = max(phases[i], min(phases[reader] for reader in readers))
        return phases

    def _piece(self, part: Sequence[int]) -> Piece:
        inside, made = set(part), set()
        read: dict[Var, None] = {}
        for i in part:
            read.update(dict.fromkeys(each for each in _variables(self._lines[i].equation.invars) if each not in made))
            made.update(self._lines[i].equation.outvars)
        used = [
            each
            for i in part
            for each in self._lines[i].equation.outvars
            if any(reader not in inside for reader in self._readers.get(self.root(each), ()))
        ]
        first = self._lines[part[0]]
        info = DebugInfo("plan", "piece", ("",) * len(read), ("",) * len(used))
        program = Jaxpr((), list(read), used, [self._lines[i].equation for i in part], set(), info)
        collective = COLLECTIVES.get(first.equation.primitive.name, "") if len(part) == 1 else ""
        return Piece(first.module, first.times, first.local, program, collective)


def _once(lines: Sequence[Line]) -> list[Line]:
    """Replaces repeated equations outside of `shard_map` by the first, as XLA does."""
    first: dict[Any, JaxprEqn] = {}
    instead: dict[Any, Any] = {}
    kept = []
    for line in lines:
        equation = line.equation
        alone = line.local or line.module.endswith("(again)")
        if not alone and any(_variables(line.equation.invars)):  # a constant is made anew where it is used
            given = [instead.get(each, each) if isinstance(each, Var) else each for each in equation.invars]
            equation = equation.replace(invars=given)
            values = tuple(each if isinstance(each, Var) else str(each) for each in given)
            known = first.setdefault((equation.primitive, values, str(equation.params)), equation)
            if known is not equation:
                instead.update(zip(equation.outvars, known.outvars, strict=True))
                continue
        kept.append(dataclasses.replace(line, equation=equation))
    return kept


def _needed(lines: Sequence[Line], needed: set[Var], root: Callable[[Var], Var]) -> list[Line]:
    """Returns the lines on whose results the variables `needed` depend."""
    kept = []
    for line in reversed(lines):
        if any(root(each) in needed for each in line.equation.outvars):
            needed.update(map(root, _variables(line.equation.invars)))
            kept.append(line)
    return kept[::-1]


def _variables(atoms: Iterable[Any]) -> Iterator[Var]:
    return (each for each in atoms if isinstance(each, Var))


def has_axes(variable: Any) -> bool:
    """Returns whether a variable is an array, not a number."""
    return bool(getattr(variable.aval, "shape", ()))
