"""Parses names of TPU slices (products and shapes) and creates their devices for ahead-of-time compilation."""

import contextlib
import dataclasses
import math
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from lcm_jax.errors import UserError
from lcm_jax.planning.chips import CHIPS, Chip

# Shapes of the slices with product names, by number of chips. v4 and v5p names count cores, two per chip.
_CUBES = {
    4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8),
    512: (8, 8, 8), 1024: (8, 8, 16), 2048: (8, 16, 16), 4096: (16, 16, 16), 6144: (16, 16, 24),
}  # fmt: skip
_SQUARES = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
CORES = {"v4": 2, "v5p": 2, "v5e": 1, "v6e": 1}  # per chip


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or more TPU slices of equal shape.

    Attributes:
      chip: the kind of chip.
      shape: chips along each dimension of a slice.
      slices: number of slices.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """The number of chips in all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def name(self) -> str:
        """JAX's name for the shape of a slice, such as "v5p:4x4x8"."""
        return f"{self.chip.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def product(self) -> str:
        """The product name of the slice, such as "v5p-256"; empty if the shape has none."""
        size = math.prod(self.shape)
        table = _CUBES if self.chip.dimensions == 3 else _SQUARES
        return f"{self.chip.kind}-{size * CORES[self.chip.kind]}" if table.get(size) == self.shape else ""

    def is_ring(self, dimension: int) -> bool:
        """Returns whether the links along this dimension of a slice form a ring."""
        return self.shape[dimension] % self.chip.ring == 0


def parse(name: str, slices: int = 1) -> Topology:
    """Parses a topology name like v5p-256, v5p:4x4x8 or v5litepod-64; raises UserError if it is unknown."""
    if slices < 1:
        raise UserError(f"--slices={slices}; it must be at least 1")
    match = re.fullmatch(r"(v\d+\w*?)(?:litepod)?(?:-(\d+)|:(\d+(?:x\d+)*))", name.replace("v5litepod", "v5e"))
    chip = CHIPS.get(match[1]) if match else None
    if not match or not chip:
        raise UserError(f"--topology={name} is unknown; {_known()}")
    table = _CUBES if chip.dimensions == 3 else _SQUARES
    if match[2]:
        size, cores = int(match[2]), CORES[chip.kind]
        shape = table.get(size // cores)
        if size % cores or not shape or math.prod(shape) > chip.largest:
            sizes = ", ".join(f"{chip.kind}-{n * cores}" for n in table if n <= chip.largest)
            raise UserError(f"--topology={name} is not offered; use {sizes}, or a shape like {_example(chip)}")
    else:
        shape = tuple(map(int, match[3].split("x")))
        if len(shape) != chip.dimensions or 0 in shape or math.prod(shape) > chip.largest:
            raise UserError(
                f"--topology={name}: {chip.kind} has {chip.dimensions} dimensions and at most {chip.largest} chips, "
                f"as in {_example(chip)}"
            )
    return Topology(chip, shape, slices)


def _example(chip: Chip) -> str:
    return f"{chip.kind}:{'x'.join(['4'] * chip.dimensions)}"


def _known() -> str:
    examples = ", ".join(f"{kind}-{64} or {_example(chip)}" for kind, chip in CHIPS.items())
    return f"use {examples}, or local (the devices of this machine)"


def devices(topology: Topology) -> list[Any]:
    """Returns libtpu's device descriptions, one per chip.

    Raises: UserError if libtpu is missing or does not know the shape.
    """
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.chip.kind == "v4":
        options["chip_config_name"] = "megacore"  # otherwise each chip is two devices
    if math.prod(topology.shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)  # the default host has four chips, more than this slice
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to query
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor one that processes could compete for
    try:
        from jax.experimental import topologies

        with quiet():
            found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options).devices
    except Exception as error:
        text = str(error)
        if ("TPU" in text and "installed" in text) or isinstance(error, ImportError):
            raise UserError("planning for TPUs needs the compiler's library: pip install 'lcm_jax[plan]'") from None
        raise UserError(f"--topology={topology.name}: {text.strip().splitlines()[0]}") from None
    return list(found)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Redirects stderr to /dev/null, at the level of file descriptors, to hide libtpu's output."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
