"""Specifications of TPU chips.

Source: docs.cloud.google.com/tpu/docs, pages v4, v5e, v5p and v6e (key specifications; read November 2026). The
interconnect bandwidth is published for all links of a chip and, recently, for both directions together; the table has
one link in one direction. For v5e and v6e the data center network is that of a host with eight chips.

Not published: the network of v4, assumed equal to v5p's. Clocks, derived from the peak and the matrix units at two
FLOPs per cell and cycle (per chip, v4 and v5p: 8 of 128 x 128, v5e: 4). v6e, with two of 256 x 256, would need twice
the clock in the table, which is the one at which the compiler counts for v5p. The slices that form rings: multiples of
4 along a dimension for v4 and v5p, of 16 for v5e and v6e.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Specification of a TPU chip.

    Attributes:
      kind: JAX's name for it in topologies.
      peak_flops: peak bfloat16 FLOP/s.
      memory: HBM size in bytes.
      bandwidth: HBM bandwidth in bytes/s.
      link: bytes/s of one interconnect link in one direction; a chip has two links along each dimension.
      dimensions: number of dimensions of the interconnect.
      ring: the links along a dimension form a ring if the slice's size there is a multiple of this.
      network: bytes/s per chip to other slices, in one direction.
      clock: cycles/s that the compiler's cycle estimates refer to.
      largest: number of chips in the largest slice.
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

HOP = 1e-6  # seconds of latency between neighbouring chips: an order of magnitude, not a published figure
