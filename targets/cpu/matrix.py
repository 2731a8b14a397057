"""Convolution and GEMM on a matrix unit: registers that hold a tile of a matrix, and multiply as matrices.

A block computes `tall` x `wide` register tiles, each of up to 16 neighbouring output pixels x one vector of output
channels. The sum is the one of `conv`, with a step of up to 16 groups of four input channels:

    acc[i, j] = bias[j];  for every tap (kh, kw) and step k:
        acc[i, j] += x[pixels i, tap, channels of k] @ weight[channels of k, tap, j]

How pixels and channels are cut so that nothing outside is read: `qcompile.targets.cpu.cuts`. How strides leave tiles
full: `qcompile.targets.cpu.phases`. The weights are zero for channels that the step before has summed, and for bytes
between the channels of neighbouring taps. The sums go through memory to the epilogue, one pixel at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from qcompile.targets.base import InstructionSet, MatrixUnit, TileRegisters
from qcompile.targets.cpu import epilogue
from qcompile.targets.cpu.conv import channel_order, dot_name, per_channel
from qcompile.targets.cpu.cuts import Cut, Runs
from qcompile.targets.cpu.emit import only_if
from qcompile.targets.cpu.phases import Phases
from qcompile.targets.cpu.tasks import Order, best_order, split
from qcompile.targets.filters import ConvShape, Filters
from qcompile.targets.function import Kernel, function
from qcompile.targets.generator import Generator, tile_name
from qcompile.targets.layout import Dim, align

FEWEST_PIXELS = 4  # of a run: the weights are loaded for each part anew
WORTH = 0.8  # of the time of multiplying that putting the pixels in another order must leave


@dataclass(frozen=True)
class MatrixConfig:
    """What tuning may choose; every value gives the same bits.

    Attributes:
        tall: register tiles of pixels in a block.
        vectors: register tiles of output channels in a block.
    """

    tall: int
    vectors: int


@dataclass(frozen=True)
class Laid:
    """A convolution in the order in which its pixels are read.

    Attributes:
        shape: as one long row of pixels where that has a known length.
        phases: from which it reads them, where strides would leave too much of the registers empty.
    """

    shape: ConvShape
    phases: Phases | None = None

    @classmethod
    def of(cls, given: ConvShape, unit: MatrixUnit) -> Laid:
        plain = cls(_flat(given))
        if given.stride == (1, 1) or given.dilation != (1, 1) or not all(map(_positive, given.y.extents)):
            return plain
        phases = Phases.of(given)
        ordered = cls(_flat(phases.shape), phases)
        return ordered if ordered._cycles(unit) <= WORTH * plain._cycles(unit) else plain

    def _cycles(self, unit: MatrixUnit) -> int:
        """In proportion."""
        return self.shape.y.extents[0] * Runs.of(self.shape, unit).cycles(unit)

    @property
    def images(self) -> int:
        """How many, or one where that is not known."""
        batch = self.shape.y.extents[0]
        return batch if isinstance(batch, int) else 1

    @property
    def activation_bytes(self) -> int:
        """Of all that the kernel reads and writes; of one image where their number is not known."""
        layouts = [layout for layout in (self.shape.x, self.shape.y, self.shape.residual) if layout is not None]
        dims = [(layout.extents[0], *layout.padded, layout.pitch) for layout in layouts]
        return sum(math.prod(dim for dim in each if isinstance(dim, int)) for each in dims)

    @property
    def joined(self) -> int:
        """How many taps of a row of the kernel are summed as one: all, where their pixels lie side by side. The bytes
        between their channels are multiplied by zero."""
        return self.shape.kernel[1] if self.shape.dilation[1] == 1 and self.phases is None else 1

    def tap(self, n: Any, i_h: Any, i_w: Any) -> tuple[Any, Any, Any]:
        """(image of x, rows down, columns right) of a tap."""
        if self.phases is not None:
            return self.phases.tap(n, i_h, i_w)
        return n, i_h * self.shape.dilation[0], i_w * self.shape.dilation[1]

    def cuts(self, unit: MatrixUnit) -> tuple[Runs, Cut]:
        """Of the pixels, and of the sum over the channels of a tap."""
        bytes_of_tap = (self.joined - 1) * self.shape.x.pitch + align(self.shape.x.channels, 4)
        return Runs.of(self.shape, unit), Cut.of(bytes_of_tap // 4, unit.depth)


def _flat(shape: ConvShape) -> ConvShape:
    flat = shape.flat()
    return flat if isinstance(flat.y.extents[2], int) else shape


def _positive(extent: Dim) -> bool:
    return isinstance(extent, int) and extent > 0


def suits(shape: ConvShape, isa: InstructionSet) -> bool:
    """Whether the kernel can compute this convolution, and has work enough for whole tiles."""
    if isa.matrix is None or shape.groups > 1 or shape.x.pitch % 4:
        return False
    if not all(map(_positive, (*_flat(shape).y.extents[1:], shape.x.channels))):
        return False
    return Laid.of(shape, isa.matrix).cuts(isa.matrix)[0].cut.size >= FEWEST_PIXELS


def configs(shape: ConvShape, filters: Filters, isa: InstructionSet) -> list[MatrixConfig]:
    """Every block that fits the registers, the one of fewest cycles by a simple count first.

    A step takes as long as its products, a cycle for a row of a tile, or the latency of the sums, or its loads, two
    rows a cycle, or its weights from the second-level cache. Storing takes as in `tiles`, and the way through memory
    as much again.
    """
    unit = _unit(isa)
    laid = Laid.of(shape, unit)
    shape, (runs, sum_of) = laid.shape, laid.cuts(unit)
    rows = runs.cut.size
    total = align(shape.y.channels, isa.lanes) // isa.lanes
    steps = int(np.prod(shape.kernel)) // laid.joined * sum_of.count
    tile_bytes = 4 * isa.lanes * sum_of.size

    def cycles(config: tuple[int, int]) -> float:
        tall, wide = config
        far = wide * tile_bytes / unit.l2_bytes_a_cycle if steps * wide * tile_bytes > isa.l1_bytes // 2 else 0.0
        step = max(tall * wide * rows, unit.latency, (tall * rows + wide * sum_of.size) / 2, far)
        return (steps * step + tall * rows * (4 * wide + 3 * len(isa.narrows_for(wide)))) / (tall * wide)

    able = [
        (tall, wide)
        for tall, wide in itertools.product(range(1, min(3, runs.parts) + 1), range(1, 7))
        if total % wide == 0 and tall * wide + tall + 1 <= unit.tiles
    ]
    return [MatrixConfig(*block) for block in sorted(able, key=cycles)]


def _unit(isa: InstructionSet) -> MatrixUnit:
    assert isa.matrix is not None
    return isa.matrix


def pack(weight: np.ndarray, laid: Laid, order: np.ndarray, sum_of: Cut, lanes: int) -> np.ndarray:
    """(out channels, in channels, KH, KW) int8 -> (block, tap row, tap column, step, vector, four, lanes * 4).

    `order`: which channel of a block each lane of its vectors holds.
    """
    oc, per_in, kh, kw = weight.shape
    block, joined, pitch = len(order), laid.joined, laid.shape.x.pitch
    taps = np.zeros((align(oc, block), kh, kw, pitch), np.int8)
    taps[:oc, ..., :per_in] = weight.transpose(0, 2, 3, 1)
    taps = taps.reshape(-1, kh, kw // joined, joined * pitch)[..., : 4 * sum_of.total]
    kw //= joined
    ordered = taps.reshape(-1, block, kh, kw, sum_of.total, 4)[:, order]
    steps = []
    for k in range(sum_of.count):
        start = min(k * sum_of.size, sum_of.total - sum_of.size)
        step = ordered[..., start : start + sum_of.size, :].copy()
        step[..., : k * sum_of.size - start, :] = 0
        steps.append(step)
    stepped = np.stack(steps, 4).reshape(-1, block // lanes, lanes, kh, kw, sum_of.count, sum_of.size, 4)
    packed = stepped.transpose(0, 3, 4, 5, 1, 6, 2, 7)
    return np.ascontiguousarray(packed.reshape(*packed.shape[:6], -1))


def conv(
    shape: ConvShape,
    filters: Filters,
    numbers: epilogue.Requantize,
    isa: InstructionSet,
    symbols: tuple[tirx.Var, ...] = (),
    config: MatrixConfig | None = None,
) -> Kernel:
    """The kernel of one convolution."""
    config = config or configs(shape, filters, isa)[0]
    unit = _unit(isa)
    laid = Laid.of(shape, unit)
    runs, sum_of = laid.cuts(unit)
    lanes = channel_order(config.vectors, isa)
    packed = pack(filters.weight, laid, lanes, sum_of, isa.lanes)
    tiles = laid.images * runs.tiles(config.tall)
    order = best_order(packed.nbytes, laid.activation_bytes, tiles, len(packed), isa.l2_bytes)
    constants = {"weights": packed.reshape(-1), **per_channel(filters, numbers, isa, lanes)}
    steps = numbers.steps(filters.largest_accumulators(), filters.m, isa)
    func = _build(laid, config, order, isa, (runs, sum_of), packed.shape, constants, symbols, steps)
    tile = tile_name(config.tall * runs.cut.size, len(lanes), order)
    return Kernel(f"{shape.kind}_{unit.name}_{tile}", func, tuple(constants.values()))


def _build(
    laid: Laid,
    config: MatrixConfig,
    order: Order,
    isa: InstructionSet,
    cuts: tuple[Runs, Cut],
    packed: tuple[int, ...],
    constants: dict[str, np.ndarray],
    symbols: tuple[tirx.Var, ...],
    steps: epilogue.Steps,
) -> tirx.PrimFunc:
    runs, sum_of = cuts
    shape, phases = laid.shape, laid.phases
    registers = _unit(isa).registers(config.tall, config.vectors, runs.cut.size, sum_of.size)
    with function("conv") as (args, done):
        x = args.buffer("x", (phases.given if phases else shape).x.size, isa.storage)
        residual = args.buffer("residual", shape.residual.size, isa.storage) if shape.residual else None
        weights, integers, floats = args.constants(**constants)
        args.symbols(symbols)
        y = args.buffer("y", shape.y.size, isa.storage)
        if phases:
            given, x = x, T.alloc_buffer((shape.x.size,), isa.storage, scope="global")
            phases.arrange(given, x)
        finish = epilogue.Finish(y, residual, shape.y, shape.residual, integers, floats, isa, config.vectors, steps)
        tile = Tile(laid, config, order, runs, sum_of, packed[1:3], isa.lanes, registers, x, weights, integers, finish)
        tiles, blocks = shape.y.extents[0] * tile.of_image, packed[0]

        def task(at: Any, b: Any) -> None:
            n, t = T.floordiv(at, tile.of_image), T.floormod(at, tile.of_image)
            tile.multiply(n, t, b)
            tile.store(n, t, b)

        split(tiles, blocks, order, task, _shaped(registers))
        epilogue.fill_halo(y, shape.y, integers, isa)
    return done.result


@contextmanager
def _shaped(registers: TileRegisters) -> Iterator[None]:
    """Within, a thread has the registers."""
    with T.attr(0, "pragma_import_llvm", registers.code):
        registers.begin()
    yield
    registers.end()


@dataclass(frozen=True)
class Tile:
    """What a kernel does for tile `t` of image `n` and block `b` of output channels.

    Attributes:
        taps: rows and columns of the packed kernel.
        x, weights, integers: buffers.
        finish: stores the sums.
    """

    laid: Laid
    config: MatrixConfig
    order: Order
    runs: Runs
    sum_of: Cut
    taps: tuple[int, ...]
    lanes: int
    registers: TileRegisters
    x: Any
    weights: Any
    integers: Any
    finish: epilogue.Finish

    @property
    def of_image(self) -> int:
        """How many tiles an image has."""
        return self.runs.tiles(self.config.tall)

    def multiply(self, n: Any, t: Any, b: Any) -> None:
        """Let the registers hold the sums."""
        shape, registers = self.laid.shape, self.registers
        self._load_bias(b)
        kh, kw = self.taps
        with T.serial(0, kh) as i_h, T.serial(0, kw) as i_w, T.serial(0, self.sum_of.count) as k:
            image, down, right = self.laid.tap(n, i_h, i_w)
            for i, (_, run, first) in enumerate(self._parts(t)):
                pixel = shape.x.offset(
                    image,
                    run * shape.stride[0] + down - shape.padding[0],
                    first * shape.stride[1] + right - shape.padding[1],
                    self.sum_of.start(k) * 4,
                )
                registers.load_pixels(i, T.address_of(self.x[pixel]), shape.stride[1] * shape.x.pitch)
            panel = (((b * kh + i_h) * kw + i_w) * self.sum_of.count + k) * self.config.vectors
            if self.order != "pixels":
                self._prefetch(t, panel)
            line = 4 * self.lanes  # bytes
            for j in range(self.config.vectors):
                registers.load_weights(j, T.address_of(self.weights[(panel + j) * self.sum_of.size * line]), line)
                for i in range(self.config.tall):
                    registers.multiply(i, j)

    def store(self, n: Any, t: Any, b: Any) -> None:
        """Store the sums, but for what another tile has stored and for what lies beyond the width."""
        runs, tall, vectors = self.runs, self.config.tall, self.config.vectors
        memory = self.registers.memory(tall * vectors)
        for i, j in np.ndindex(tall, vectors):
            self.registers.store_sum(i, j, memory, i * vectors + j)
        for i, (part, run, first) in enumerate(self._parts(t)):
            with T.serial(0, runs.cut.size) as row:
                pixel = first + row
                own = [part >= t * tall] if runs.parts % tall else []
                if runs.cut.overlaps:
                    own.append(pixel >= T.floormod(part, runs.cut.count) * runs.cut.size)
                h, w = runs.place(run, pixel)
                if runs.gaps:
                    own.append(w < runs.width)
                with only_if(*own):
                    sums = [self.registers.sums(memory, i * vectors + v, row) for v in range(vectors)]
                    self.finish.store((n, h, w), b, sums)

    def _parts(self, t: Any) -> list[tuple[Any, Any, Any]]:
        """The number of each part of a tile, its run, and its first pixel there. The last tile starts early too."""
        runs, tall = self.runs, self.config.tall
        first = T.min(t * tall, runs.parts - tall) if runs.parts % tall else t * tall
        numbers = [first + i for i in range(tall)]
        return [(p, T.floordiv(p, runs.cut.count), runs.cut.start(T.floormod(p, runs.cut.count))) for p in numbers]

    def _load_bias(self, b: Any) -> None:
        block = self.config.vectors * self.lanes
        for j in range(self.config.vectors):
            bias = T.address_of(self.integers[epilogue.HEAD + b * block + j * self.lanes])
            for i in range(self.config.tall):
                self.registers.load_sum(i, j, bias, 0)  # every row the same

    def _prefetch(self, t: Any, panel: Any) -> None:
        """Fetch this tile's share of what the next block of channels will multiply with, where `panel` is now."""
        vectors, size = self.config.vectors, self.sum_of.size
        lines = vectors * size  # of the weights of a step
        share = -(-lines // self.of_image)
        with only_if(t * share < lines):
            following = (panel + self.taps[0] * self.taps[1] * self.sum_of.count * vectors) * size + t * share
            for line in range(share):
                self.registers.prefetch(T.address_of(self.weights[(following + line) * (4 * self.lanes)]))


MATRIX = Generator("matrix", configs, conv, dot_name)
