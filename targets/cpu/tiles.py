"""The register tiles of a convolution: which there are for a shape, and how long each should take."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.targets.base import DotProduct, InstructionSet
from qcompile.targets.cpu.filters import ConvShape
from qcompile.targets.layout import align

MOST_ROWS, MOST_VECTORS = 8, 8  # larger tiles gain nothing, and overlap less with the next one


@dataclass(frozen=True)
class ConvConfig:
    """What tuning may choose; every value gives the same bits.

    Attributes:
        rows: output pixels of a register tile.
        vectors: vectors of output channels of a register tile.
        channels_outer: a thread keeps one block of weights and walks over the image (else it keeps a
            row of the image and walks over the weights).
    """

    rows: int
    vectors: int
    channels_outer: bool


def tiles(shape: ConvShape, isa: InstructionSet, dot: DotProduct, steps: int) -> list[ConvConfig]:
    """Every tile that fits the registers, the one of fewest cycles by a simple count first.

    `steps`: taps x groups of four channels. A step takes as long as its dot products, its loads or the
    latency of the accumulators, whichever is the longest; storing takes three instructions for a vector of
    sums and six for one of bytes, two a cycle.
    """
    total = align(shape.y.channels, isa.lanes) // isa.lanes
    width = shape.y.extents[2]
    width = width if isinstance(width, int) else 16 * MOST_ROWS
    spare = 1 + dot.planes  # the prepared activations, and the products

    def tile(rows: int, vectors: int) -> float:
        step = max(dot.instructions * rows * vectors, dot.planes * vectors + rows, 5)
        store = rows * (3 * vectors + 6 * len(isa.narrows_for(vectors))) / 2
        return steps * step + store + 16 if rows else 0.0

    def cycles(config: tuple[int, int]) -> float:
        rows, vectors = config
        return total // vectors * (width // rows * tile(rows, vectors) + tile(width % rows, vectors))

    limit = total if shape.groups == 1 else max(1, shape.y.channels // shape.groups // isa.lanes)
    able = [
        (rows, vectors)
        for vectors in range(1, min(MOST_VECTORS, limit) + 1)
        for rows in range(1, min(MOST_ROWS, max(1, width)) + 1)
        if total % vectors == 0 and (rows + dot.planes) * vectors + spare <= isa.registers
    ]
    outer = steps * 4 * total * isa.lanes > isa.l2_bytes // 2  # the weights alone fill half of the cache
    return [ConvConfig(*tile, order) for tile in sorted(able, key=cycles) for order in (outer, not outer)]
