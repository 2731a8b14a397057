"""Depthwise convolution by dot products: four taps of each channel in one instruction.

The four taps are four rows of one input column. Zipping the bytes of these rows puts the taps of a
channel side by side, and one zipped column serves every output it touches:

    quad[g] = zip(x[row 4g], x[row 4g + 1], x[row 4g + 2], x[row 4g + 3])      one column, many channels
    acc[r, w] = dot(acc[r, w], quad[g], weights[kx, g, r])                     kx = column - w * stride

where weights[kx, g, r] holds the taps of kernel column kx that meet the rows of group g in output row
r, and zeros elsewhere. A tile computes a few output rows, so that few of those are zeros, and sweeps over
the columns; an output is stored as soon as its last column has passed, which frees its registers.
Zipping leaves the channels in the order that narrowing puts right (see `qcompile.targets.base.Narrow`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from qcompile.targets.base import InstructionSet, TapDot
from qcompile.targets.cpu import epilogue
from qcompile.targets.cpu.conv import dot_name
from qcompile.targets.cpu.emit import Registers, load, parallel, store
from qcompile.targets.filters import ConvShape, Filters
from qcompile.targets.function import Kernel, function
from qcompile.targets.generator import Generator
from qcompile.targets.layout import align

PART = 16  # bytes that zipping and narrowing keep together
MOST_ROWS, MOST_COLUMNS = 4, 16  # of a tile: code grows with them


@dataclass(frozen=True)
class DepthwiseDotConfig:
    """The outputs of a tile: `rows` x `columns` pixels. Every value gives the same bits."""

    rows: int
    columns: int


@dataclass(frozen=True)
class Taps:
    """The input rows of a tile, in groups of four, and which kernel row each of them is for an output row."""

    groups: list[list[int]]
    kernel_rows: dict[tuple[int, int], list[int | None]]  # (group, output row) -> per row of the group

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return list(self.kernel_rows)


def taps(shape: ConvShape, rows: int) -> Taps:
    """The taps of a tile of `rows` output rows."""
    stride, dilation, kernel = shape.stride[0], shape.dilation[0], shape.kernel[0]
    needed = sorted({r * stride + i * dilation for r in range(rows) for i in range(kernel)})
    groups = [needed[i : i + 4] for i in range(0, len(needed), 4)]
    place = {i * dilation: i for i in range(kernel)}
    kernel_rows = {
        (g, r): [place.get(row - r * stride) for row in group] for g, group in enumerate(groups) for r in range(rows)
    }
    return Taps(groups, {key: found for key, found in kernel_rows.items() if found != [None] * len(found)})


def configs(shape: ConvShape, filters: Filters, isa: InstructionSet) -> list[DepthwiseDotConfig]:
    """The tiles that fit the registers, the one of fewest instructions for an output first."""
    _, height, width = shape.y.extents
    open_columns = -(-((shape.kernel[1] - 1) * shape.dilation[1] + 1) // shape.stride[1])

    def cost(rows: int) -> float:
        found = taps(shape, rows)
        zips = 12 * len(found.groups) * min(shape.stride[1], shape.kernel[1])
        return (zips + 4 * shape.kernel[1] * len(found.pairs)) / rows

    def fits(rows: int) -> bool:
        return 4 * (rows * open_columns + len(taps(shape, rows).groups) + 1) <= isa.registers

    most = min(MOST_ROWS, height) if isinstance(height, int) else 1
    able = [rows for rows in range(1, most + 1) if rows == 1 or fits(rows)]
    columns = [4, 1, 2, 8]
    if isinstance(width, int):  # equal parts of a row, long ones first: neighbours zip the columns between them twice
        usual = -(-width // 14)
        parts = sorted(range(-(-width // MOST_COLUMNS), width + 1), key=lambda n: abs(n - usual))
        columns = list(dict.fromkeys(-(-width // n) for n in parts))
    return [DepthwiseDotConfig(rows, count) for rows in sorted(able, key=cost) for count in columns]


@dataclass(frozen=True)
class Chunk:
    """Channels [start, start + 4 * lanes * count): `count` times the width of `dot`."""

    start: int
    count: int
    dot: TapDot


def chunks(channels: int, isa: InstructionSet) -> Iterator[Chunk]:
    """The channels, widest vectors first."""
    start, left = 0, align(channels, PART)
    for dot in isa.tap_dots:
        count = left // (4 * dot.lanes)
        if count:
            yield Chunk(start, count, dot)
        start, left = start + count * 4 * dot.lanes, left % (4 * dot.lanes)


def in_order(per_channel: np.ndarray, isa: InstructionSet) -> np.ndarray:
    """(channels, ...) padded with zeros, in the order of the lanes."""
    pad = align(len(per_channel), PART) - len(per_channel)
    padded = np.pad(per_channel, [(0, pad)] + [(0, 0)] * (per_channel.ndim - 1))
    parts = []
    for chunk in chunks(len(per_channel), isa):
        size = 4 * chunk.dot.lanes
        part = padded[chunk.start : chunk.start + chunk.count * size]
        ordered = part.reshape(chunk.count, size, *part.shape[1:])[:, chunk.dot.narrow.order]
        parts.append(ordered.reshape(part.shape))
    return np.concatenate(parts)


def pack(weight: np.ndarray, shape: ConvShape, found: Taps, isa: InstructionSet) -> np.ndarray:
    """`weight` (C, 1, KH, KW) int8 -> flat: per chunk of channels (kernel column, pair, lane, tap)."""
    channels, _, _, kw = weight.shape
    spread = np.zeros((channels, kw, len(found.pairs), 4), np.int8)
    for p, kernel_rows in enumerate(found.kernel_rows.values()):
        for tap, row in enumerate(kernel_rows):
            if row is not None:
                spread[:, :, p, tap] = weight[:, 0, row, :]
    ordered, parts = in_order(spread, isa), []
    for chunk in chunks(channels, isa):
        size = 4 * chunk.dot.lanes
        part = ordered[chunk.start : chunk.start + chunk.count * size]
        parts.append(part.reshape(chunk.count, size, kw, len(found.pairs), 4).transpose(0, 2, 3, 1, 4).reshape(-1))
    return np.concatenate(parts)


def depthwise_dot(
    shape: ConvShape,
    filters: Filters,
    numbers: epilogue.Requantize,
    isa: InstructionSet,
    symbols: tuple[tirx.Var, ...] = (),
    config: DepthwiseDotConfig | None = None,
) -> Kernel:
    """The kernel of one depthwise convolution."""
    config = config or configs(shape, filters, isa)[0]
    height = shape.y.extents[1]
    tail = height % config.rows if isinstance(height, int) else 0
    constants = {
        "weights": pack(filters.weight, shape, taps(shape, config.rows), isa),
        "integers": numbers.integers(isa, in_order(filters.folded_bias(isa), isa)),
        "floats": numbers.floats(in_order(filters.m, isa)),
    }
    if tail:
        constants["tail"] = pack(filters.weight, shape, taps(shape, tail), isa)
    steps = numbers.steps(filters.largest_accumulators(), filters.m, isa)
    func = _build(shape, config, isa, constants, symbols, steps)
    dot, (kh, kw) = isa.tap_dots[0].name, shape.kernel
    name = f"depthwise{kh}x{kw}_{dot}_{config.rows}x{config.columns}"
    return Kernel(name, func, tuple(constants.values()))


def _zip(pair: list[Any], unit: int, high: bool, size: int) -> Any:
    """Units of `unit` bytes of two vectors in turn, from the low or high half of every part."""
    indices = []
    for part in range(0, size, PART):
        for at in range(0, PART // 2, unit):
            first = part + at + (PART // 2 if high else 0)
            indices += [*range(first, first + unit), *range(size + first, size + first + unit)]
    return T.Shuffle(pair, indices)


def _quad(rows: list[Any], size: int) -> list[Any]:
    """Four vectors of bytes -> four vectors with the four bytes of each channel side by side."""
    pairs = [[_zip(pair, 1, high, size) for pair in (rows[:2], rows[2:])] for high in (False, True)]
    return [_zip(pair, 2, high, size) for pair in pairs for high in (False, True)]


def _build(
    shape: ConvShape,
    config: DepthwiseDotConfig,
    isa: InstructionSet,
    constants: dict[str, np.ndarray],
    symbols: tuple[tirx.Var, ...],
    steps: epilogue.Steps,
) -> tirx.PrimFunc:
    batch, height, width = shape.y.extents
    kw, stride, dilation = shape.kernel[1], shape.stride[1], shape.dilation[1]
    with function("depthwise") as (args, done):
        x = args.buffer("x", shape.x.size, isa.storage)
        residual = args.buffer("residual", shape.residual.size, isa.storage) if shape.residual else None
        weights, integers, floats, *more = args.constants(**constants)
        args.symbols(symbols)
        y = args.buffer("y", shape.y.size, isa.storage)

        def tile(n: Any, h: Any, w: Any, c: Any, dot: TapDot, found: Taps, panel: Any, rows: int, columns: int) -> None:
            """rows x columns outputs from (n, h, w), 4 * dot.lanes channels from `c`; `panel`: their weights."""
            lanes, size = dot.lanes, 4 * dot.lanes

            def column_load(row: int, column: int) -> Any:
                at_row = h * shape.stride[0] + row - shape.padding[0]
                return load(x, shape.x.offset(n, at_row, w * stride + column - shape.padding[1], c), size)

            def finish(r: int, i: int) -> None:
                ms = [epilogue.channel_load(floats, c + j * lanes, lanes) for j in range(4)]
                other = None
                if residual is not None and shape.residual is not None:
                    other = load(residual, shape.residual.offset(n, h + r, w + i, c), size)
                accs = [acc[r, i][j] for j in range(4)]
                value = epilogue.requantize_many(accs, ms, integers, floats, isa, lanes, dot.narrow, steps, other)
                store(y, shape.y.offset(n, h + r, w + i, c), value, size)

            acc: dict[tuple[int, int], Registers] = {}
            for column in sorted({i * stride + k * dilation for i in range(columns) for k in range(kw)}):
                meets = {i: (column - i * stride) // dilation for i in range(columns)}
                meets = {i: k for i, k in meets.items() if i * stride + k * dilation == column and 0 <= k < kw}
                for i, k in meets.items():
                    for r in range(rows) if k == 0 else ():
                        acc[r, i] = Registers(4, lanes, "int32")
                        for j in range(4):
                            acc[r, i][j] = epilogue.channel_load(integers, c + j * lanes, lanes)
                for g, group in enumerate(found.groups):
                    loaded = [column_load(row, column) for row in group]
                    quad = Registers(4, size, isa.storage)
                    for j, vector in enumerate(_quad((loaded + loaded[-1:] * 3)[:4], size)):
                        quad[j] = vector
                    for (i, k), (p, (of, r)) in ((a, b) for a in meets.items() for b in enumerate(found.pairs)):
                        for j in range(4) if of == g else ():
                            at = ((k * len(found.pairs) + p) * 4 + j) * size
                            acc[r, i][j] = dot.accumulate(
                                acc[r, i][j], quad[j], load(weights_of(rows), panel + at, size)
                            )
                for i, k in meets.items():
                    for r in range(rows) if k == kw - 1 else ():
                        finish(r, i)

        def weights_of(rows: int) -> Any:
            return weights if rows == config.rows else more[0]

        def line(n: Any, h: Any, rows: int) -> None:
            """`rows` output rows from `h`, whole width, all channels."""
            found = taps(shape, rows)
            per_channel = kw * len(found.pairs) * 4
            for chunk in chunks(shape.y.channels, isa):
                with T.serial(0, chunk.count) as i:
                    c = chunk.start + i * 4 * chunk.dot.lanes
                    panel = c * per_channel
                    with T.serial(0, width // config.columns) as w:
                        tile(n, h, w * config.columns, c, chunk.dot, found, panel, rows, config.columns)
                    if not isinstance(width, int):
                        with T.serial(0, width % config.columns) as w:
                            at = width // config.columns * config.columns + w
                            tile(n, h, at, c, chunk.dot, found, panel, rows, 1)
                    elif rest := width % config.columns:
                        tile(n, h, width - rest, c, chunk.dot, found, panel, rows, rest)

        tiles = height // config.rows
        with parallel(batch * tiles) as task:
            line(T.floordiv(task, tiles), T.floormod(task, tiles) * config.rows, config.rows)
        if more:
            rest = height % config.rows
            with parallel(batch) as n:
                line(n, height - rest, rest)
        epilogue.fill_halo(y, shape.y, integers, isa)
    return done.result


DEPTHWISE_DOT = Generator("depthwise_dot", configs, depthwise_dot, dot_name)
