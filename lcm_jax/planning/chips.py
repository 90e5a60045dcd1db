"""What the chips can do, in one table, as their maker publishes it.

Source: docs.cloud.google.com/tpu/docs, the pages v4, v5e, v5p and v6e (key specifications; read November 2026). The
interconnect is published for all links of a chip and, of late, for both directions together; here it is one link, one
way. Of v5e and v6e the data center network is that of a host with eight chips. Not published there: the network of v4,
taken to be v5p's; clocks, which follow from the peak and the matrix units (v4, v5p: 8 a chip, v5e: 4, all of 128 x 128
and two FLOPs a cell and cycle; v6e: two of 256 x 256, which would need twice the clock that is written here, at which
v5p's compiler counts); which slices close to rings (v4, v5p: multiples of a cube of four; v5e, v6e: sixteen).
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      kind: as JAX names it in topologies.
      peak_flops: a second, bfloat16.
      memory: bytes of HBM.
      bandwidth: bytes a second of HBM.
      link: bytes a second of one link of the interconnect, one way; a chip has two along each dimension.
      dimensions: of the interconnect.
      ring: a slice whose size along a dimension is a multiple of this closes to a ring there.
      network: bytes a second to other slices, one way.
      clock: cycles a second, in which the compiler estimates.
      largest: chips of the largest slice.
    """

    kind: str
    peak_flops: float
    memory: int
    bandwidth: float
    link: float
    dimensions: int
    ring: int
    network: float
    clock: float
    largest: int


_GIB = 2**30

CHIPS = {
    "v4": Chip("v4", 275e12, 32 * _GIB, 1228e9, 50e9, 3, 4, 6.25e9, 1.05e9, 4096),
    "v5e": Chip("v5e", 197e12, 16 * _GIB, 819e9, 50e9, 2, 16, 3.125e9, 1.5e9, 256),
    "v5p": Chip("v5p", 459e12, 95 * _GIB, 2765e9, 100e9, 3, 4, 6.25e9, 1.75e9, 6144),
    "v6e": Chip("v6e", 918e12, 32 * _GIB, 1638e9, 100e9, 2, 16, 12.5e9, 1.75e9, 256),
}

HOP = 1e-6  # seconds for a message from a chip to its neighbour: the order of magnitude, not a published figure
