"""The register tiles of a convolution: which there are for a shape, and how long each should take."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.targets.base import DotProduct, InstructionSet, Products
from qcompile.targets.cpu.tasks import Order
from qcompile.targets.filters import ConvShape
from qcompile.targets.layout import align

MOST_ROWS, MOST_VECTORS = 14, 8  # larger tiles gain nothing, and overlap less with the next one
LATENCY = 5  # cycles until a sum can be added to again
LOOP = 1  # cycles that a step of many instructions loses to its loop and to imperfect order
HIDDEN = 24  # cycles of storing that out-of-order execution hides; of two multiplications a cycle, a quarter
L2_BYTES_A_CYCLE = 24  # as streams of weights reach it, of 32 at best


@dataclass(frozen=True)
class ConvConfig:
    """What tuning may choose; every value gives the same bits.

    Attributes:
        rows: output pixels of a register tile; more than a row of the image has are some whole rows.
        vectors: vectors of output channels of a register tile.
        order: what a thread takes, and how it goes over it.
    """

    rows: int
    vectors: int
    order: Order


def tiles(shape: ConvShape, isa: InstructionSet, dot: DotProduct | Products, steps: int) -> list[ConvConfig]:
    """Every tile that fits the registers, the one of fewest cycles by a simple count first.

    `steps`: taps x words of four bytes of activations. A step takes as long as its dot products, its loads, the latency
    of the accumulators, or its weights from the second-level cache, whichever is the longest. Storing takes
    three instructions for a vector of sums and six for one of bytes, two a cycle; what a small tile stores is
    hidden behind the next one's first steps. Where processors differ in how many vectors they multiply in a cycle,
    a tile counts by the sum of what it takes on each, relative to the best tile there.
    """
    total = align(shape.y.channels, isa.lanes) // isa.lanes
    height, width = (size if isinstance(size, int) else None for size in shape.y.extents[1:])
    height, width = height or 1, width or 16 * MOST_ROWS
    spare = 1 + dot.planes  # the prepared activations, and the products
    width_of_vector = 4 * isa.lanes  # bytes
    heavy = steps * total * width_of_vector > isa.l2_bytes // 2  # the weights alone fill half of the cache
    orders: tuple[Order, ...] = ("channels", "pixels") if heavy else ("pixels", "channels")

    def tile(rows: int, vectors: int, issue: int) -> float:
        weights = dot.planes * vectors  # loaded in a step
        reused = weights if heavy else dot.planes * total  # before the loop comes back to them
        far = weights * width_of_vector / L2_BYTES_A_CYCLE if steps * reused * width_of_vector > isa.l1_bytes else 0.0
        step = max(dot.cycles * rows * vectors / issue, (weights + rows) / issue, LATENCY, far) + LOOP
        store = rows * (3 * vectors + 6 * len(isa.narrows_for(vectors))) / 2
        return steps * step + max(0.0, store - HIDDEN / issue**2) if rows else 0.0

    def cycles(config: tuple[int, int], issue: int) -> float:
        rows, vectors = config
        if rows <= width:
            full, rest, again = width // rows, width % rows, height
        else:
            full, rest, again = height // (rows // width), height % (rows // width) * width, 1
        return total // vectors * again * (full * tile(rows, vectors, issue) + tile(rest, vectors, issue))

    limit = total if shape.groups == 1 else max(1, shape.y.channels // shape.groups // isa.lanes)
    able = [
        (rows, vectors)
        for vectors in range(1, min(MOST_VECTORS, limit) + 1)
        for rows in (*range(1, min(MOST_ROWS, width) + 1), *range(2 * width, min(MOST_ROWS, height * width) + 1, width))
        if total % vectors == 0 and (rows + dot.planes) * vectors + spare <= isa.registers
    ]
    least = {issue: min(cycles(tile, issue) for tile in able) for issue in isa.issue}

    def rank(tile: tuple[int, int]) -> tuple[float, int]:
        return sum(cycles(tile, issue) / least[issue] for issue in isa.issue), -tile[1]  # of equals, fewer blocks

    ranked = sorted(able, key=rank)
    return [ConvConfig(*tile, order) for tile in ranked for order in orders]
