"""Estimates a step from its pieces, each compiled once, instead of the complete program.

Time. A piece with matrix products or convolutions is compiled for one chip, with memory layouts of the compiler's
choice, and has the compiler's cycles. Of the same pass of the same kind of layer at the same resolution, only the
smallest is compiled: the others, with other channels or another multiple of eight images, have its price times the
ratio of FLOPs, counted with channels padded to the chip's 128 lanes. Pieces without products (casts, norms of
gradients, the optimizer, sums of skip connections) are priced per byte, by the largest of those with the same
operations. Collectives come from the traced step; `exchange_time` prices them. Nothing hides an exchange here.

Memory. The state is exact. Temporaries are what lives at the borders of pieces, in the order of the trace, plus the
piece's own. Weights are gathered just before their first use. Arrays are padded to the chip's tiles.
"""

import collections
import dataclasses
import hashlib
import json
import math
import pathlib
import re
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.extend.core import Jaxpr, jaxprs_in_params
from jax.sharding import Mesh, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from lcm_jax.host import compile_cache, files
from lcm_jax.planning import estimate, exchange_time, flops, lifetimes, topology
from lcm_jax.planning.compiled import Collective, HloProgram
from lcm_jax.planning.exchange_time import Position
from lcm_jax.planning.pieces import Piece, Step, has_axes
from lcm_jax.planning.report import ABREAST
from lcm_jax.planning.topology import Topology
from lcm_jax.training.program import Program

Report = dict[str, Any]
_WINDOW = 3  # the largest of a layer's convolutions


@dataclasses.dataclass(frozen=True)
class Price:
    """What one run of a piece costs.

    Attributes:
      seconds: by operation of the model, such as "dot_general".
      temporaries: bytes besides what it reads and returns.
      code: bytes of its instructions.
      flops, moved: by XLA, and bytes of memory that it reads and writes.
    """

    seconds: dict[str, float]
    temporaries: float
    code: float
    flops: float
    moved: float

    def times(self, factor: float) -> "Price":
        """Returns the price of `factor` times as much work with the same instructions."""
        seconds = {name: factor * each for name, each in self.seconds.items()}
        return Price(seconds, factor * self.temporaries, self.code, factor * self.flops, factor * self.moved)


class Prices:
    """Compiles pieces for one chip of a topology; each distinct one once."""

    def __init__(self, where: Topology) -> None:
        self._where = where
        one = Topology(where.chip, (1,) * len(where.shape))
        self._device = SingleDeviceSharding(topology.devices(one)[0])
        self._known: dict[Any, Price] = {}

    def of(self, piece: Piece, step: Step) -> Price:
        """Returns the price of a piece of a step; outside of `shard_map`, as if one chip computed all of it."""
        stored = tuple(step.root(each) in step.inputs for each in piece.inputs)
        key = (piece.key, stored)
        if key not in self._known:
            self._known[key] = self._compiled(piece, stored)
        return self._known[key]

    def _compiled(self, piece: Piece, stored: Sequence[bool]) -> Price:
        """Compiles a piece. What is `stored`, an argument of the step, keeps its memory layout."""
        free = Format(Layout.AUTO, self._device)
        given = [jax.ShapeDtypeStruct(each.aval.shape, each.aval.dtype) for each in piece.inputs]
        jitted = jax.jit(
            lambda *args: piece(*args),
            in_shardings=tuple(self._device if each else free for each in stored),
            out_shardings=[free] * len(piece.outputs),
        )
        with topology.quiet():
            lowered = jitted.trace(*given).lower(lowering_platforms=("tpu",))
        file = self._file(lowered.as_text())
        if file and file.is_file():
            return Price(**json.loads(file.read_text()))
        with topology.quiet(), compile_cache.off():
            price = self._priced(lowered.compile())
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(file, dataclasses.asdict(price))
        return price

    def _file(self, text: str) -> pathlib.Path | None:
        """Returns where the price of a program is kept; None without a local cache.

        JAX's cache can't read programs for devices that are not there.
        """
        folder = compile_cache.folder()
        if not folder or "://" in folder:
            return None
        made = (text, self._where.chip.kind, jax.__version__, metadata.version("jaxlib"), metadata.version("libtpu"))
        return pathlib.Path(folder) / "prices" / f"{hashlib.sha256(repr(made).encode()).hexdigest()}.json"

    def _priced(self, compiled: jax.stages.Compiled) -> Price:
        hlo = HloProgram(compiled.as_text() or "")
        seconds: dict[str, float] = collections.defaultdict(float)
        for row in estimate.profile(hlo, self._where):
            seconds[row["operation"]] += row["seconds"]
        stats, analysis = compiled.memory_analysis(), compiled.cost_analysis() or {}
        assert stats is not None
        return Price(
            dict(seconds),
            stats.temp_size_in_bytes,
            stats.generated_code_size_in_bytes,
            analysis.get("flops", 0.0),
            analysis.get("bytes accessed", 0.0),
        )


class Estimate:
    """The estimate of a step on a topology."""

    def __init__(self, program: Program, where: Topology, prices: Prices) -> None:
        """Compiles the distinct pieces that `prices` does not know."""
        start = time.perf_counter()
        self.program, self.where = program, where
        traced = program.trace().jaxpr
        self.step = Step(traced.jaxpr)
        self.sizes = lifetimes.Sizes(self.step, program)
        self.parts = [each for each in self.step.pieces if not each.collective and _computes(each)]
        self.priced = self._priced(prices)
        self.collectives = _collectives(self.step, program.mesh)
        self.seconds = time.perf_counter() - start

    def _priced(self, prices: Prices) -> dict[int, Price]:
        """Returns id of each piece → its price."""
        work = {id(each): flops.count(each.program, tile=lifetimes.LANES) for each in self.parts}
        found: dict[int, Price] = {}
        references: dict[Any, Piece] = {}
        for each in self.parts:
            key = self._kind(each, work[id(each)])
            if key not in references or self._size(each, work) < self._size(references[key], work):
                references[key] = each
        for each in self.parts:
            of = references[self._kind(each, work[id(each)])]
            if work[id(each)]:
                factor = work[id(each)] / work[id(of)]
            else:
                factor = self.sizes.moved(each) / max(1, self.sizes.moved(of, everywhere=True))
            found[id(each)] = prices.of(of, self.step).times(factor)
        return found

    def total(self, what: str) -> float:
        """Returns the sum of a figure of `Price` over the step."""
        return sum(piece.times * getattr(self.priced[id(piece)], what) for piece in self.parts)

    def _size(self, piece: Piece, work: dict[int, int]) -> tuple[float, ...]:
        """Orders pieces of a kind: the least work and fewest results first; without products, the largest."""
        if work[id(piece)]:
            return (work[id(piece)], len(piece.outputs))
        return (-self.sizes.moved(piece),)

    def _kind(self, piece: Piece, work: int) -> Any:
        """Equal for pieces with the same price but for a factor."""
        if not work:
            return piece.local, tuple(each.primitive.name for each in piece.program.eqns)
        path = piece.module.split("/", 1)
        shapes = [each.aval.shape for each in piece.inputs if each.aval.ndim == 4]
        maps = [shape for shape in shapes if shape[1] > _WINDOW]  # (images, height, width, features), not a kernel
        tokens = [each.aval.shape for each in piece.inputs if each.aval.ndim == 3]
        if len(path) == 1 or not (maps or tokens):
            return piece.key
        largest = max(maps or tokens, key=lambda shape: shape[1])
        images = largest[0] if largest[0] % ABREAST else ABREAST
        return _class(path[1]), images, largest[1:-1], round(math.log2(_products(piece.program) / 3))


def _computes(piece: Piece) -> bool:
    """Returns whether a piece computes with arrays; what only adds a few numbers costs nothing here."""
    return any(has_axes(each) for line in piece.program.eqns for each in (*line.invars, *line.outvars))


def _class(path: str) -> str:
    """Returns the kind of layer and the pass: "resnets (forward)" of "down_blocks.0/resnets.1 (forward)"."""
    layer, _, when = path.split("/")[-1].partition(" ")
    return f"{re.sub(r'[.][0-9]+', '', layer)} {when.replace('again', 'forward')}"


def _products(jaxpr: Jaxpr) -> int:
    """Returns the number of matrix products and convolutions."""
    inner = sum(
        _products(getattr(each, "jaxpr", each)) for line in jaxpr.eqns for each in jaxprs_in_params(line.params)
    )
    return inner + sum(line.primitive.name in ("dot_general", "conv_general_dilated") for line in jaxpr.eqns)


def _collectives(step: Step, mesh: Mesh) -> list[Collective]:
    """Returns the collectives of a step. Sums that follow each other are one, as the compiler combines them."""
    found: list[Collective] = []
    fills = _fills(mesh)
    for piece in step.pieces:
        if not piece.collective:
            continue
        equation = piece.program.eqns[0]
        names = equation.params.get("axes") or equation.params["axis_name"]
        names = tuple(name for name in lifetimes.axes(names) if mesh.shape[name] > 1)
        if not names:
            continue
        kind, (result,) = piece.collective, piece.outputs
        if kind == "reduce-scatter" and fills:
            kind, result = "all-reduce", piece.inputs[0]
        size = math.prod(result.aval.shape) * result.aval.dtype.itemsize
        last = found[-1] if found else None
        groups = _groups(mesh, names)
        if last and (kind, groups, piece.times) == (last.kind, last.groups, last.times) and kind == "all-reduce":
            found[-1] = dataclasses.replace(last, bytes=last.bytes + size)
        else:
            found.append(Collective(kind, piece.times, size, groups, 0.0, 0.0, piece.module))
    return found


def _fills(mesh: Mesh) -> bool:
    """Asks the compiler whether it turns a sum of gradients over "fsdp" into an all-reduce."""
    if mesh.shape["fsdp"] == 1:
        return False
    size = 1024 * mesh.shape["fsdp"]

    def scatter(x: jax.Array) -> jax.Array:
        return jax.lax.psum_scatter(x, "fsdp", scatter_dimension=0, tiled=True)

    mapped = jax.jit(jax.shard_map(scatter, mesh=mesh, in_specs=P(), out_specs=P("fsdp"), check_vma=False))
    with topology.quiet():
        text = mapped.lower(jax.ShapeDtypeStruct((size, 1024), jnp.float32)).compile().as_text() or ""
    return any(each.kind == "all-reduce" for each in HloProgram(text).collectives())


def _groups(mesh: Mesh, names: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    numbers = np.arange(mesh.size).reshape(mesh.devices.shape)
    kept = [i for i, name in enumerate(mesh.axis_names) if name not in names]
    over = [i for i, name in enumerate(mesh.axis_names) if name in names]
    size = math.prod(mesh.shape[name] for name in names)
    return tuple(map(tuple, numbers.transpose(*kept, *over).reshape(-1, size).tolist()))


def memory(found: Estimate) -> Report:
    """Returns bytes per chip by category, as `estimate.memory` does for a complete program."""
    parts = estimate.state_memory(found.program)
    own = {number: price.temporaries for number, price in found.priced.items()}
    most = lifetimes.temporaries(found.step, found.sizes, own)
    distinct = {each.key: found.priced[id(each)].code for each in found.parts}
    parts |= {"padding": 0, "temporaries": round(most), "program": round(sum(distinct.values()))}
    return {"total": sum(parts.values()), **parts}


def times(found: Estimate, model_flops: int) -> Report:
    """Returns seconds per step, as `estimate.times` does for a complete program; nothing hides an exchange."""
    chip = found.where.chip
    positions = [Position(getattr(d, "slice_index", 0) or 0, tuple(d.coords)) for d in found.program.mesh.devices.flat]
    compute = sum(row["seconds"] for row in profile(found))
    exchange = sum(each.times * exchange_time.seconds(each, positions, found.where) for each in found.collectives)
    step, floor = compute + exchange, model_flops / chip.peak_flops
    return {
        "step": step,
        "compute": compute,
        "exchange": exchange,
        "exposed": exchange,
        "roofline": max(found.total("flops") / chip.peak_flops, found.total("moved") / chip.bandwidth),
        "xla": None,
        "floor": floor,
        "fraction_of_peak": floor / step,
    }


def profile(found: Estimate) -> list[Report]:
    """Returns the computation time in seconds by module and operation of the model, longest first."""
    seconds: dict[tuple[str, str], float] = collections.defaultdict(float)
    for piece in found.parts:
        for operation, each in found.priced[id(piece)].seconds.items():
            seconds[piece.module, operation] += piece.times * each
    return [
        {"module": m, "operation": o, "seconds": s} for (m, o), s in sorted(seconds.items(), key=lambda each: -each[1])
    ]
