"""Implicit-GEMM convolution and GEMM: one generator for every geometry and instruction set.

A register tile computes `rows` neighbouring output pixels x `vectors` vectors of output channels:

    acc[i, j] = bias[j];  for every tap (kh, kw) and group of four input channels k:
        acc[i, j] = dot(acc[i, j], x[pixel i, tap, 4k .. 4k + 3], weight[j, tap, k])

The input's halo stands for the padding. A grouped convolution reads, for each block of output
channels, the range of input channels that its groups cover; weights outside a group are zero.
Where pixels have no bytes between them, a row of taps is one tap of more channels: 7 x 3 channels are
six groups of four, not seven. A linear layer is a 1x1 convolution over one long row of pixels; so is
any 1x1 convolution with stride 1 between tensors without halo. The zero point of the input is folded
into the bias: sum (x - zp) w = sum x w - zp sum w, exact in wrapping int32 because the true value fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from qcompile.targets.base import DotProduct, InstructionSet
from qcompile.targets.cpu import epilogue
from qcompile.targets.cpu.emit import Registers, load
from qcompile.targets.cpu.tiles import ConvConfig, tiles
from qcompile.targets.cpu.walk import Pixels, walk
from qcompile.targets.filters import ConvShape, Filters
from qcompile.targets.function import Kernel, function
from qcompile.targets.generator import Generator, tile_name
from qcompile.targets.layout import align

UNROLLED = 16  # steps of a sum that are written out: a loop of few steps costs more than its body


def channel_ranges(shape: ConvShape, block: int) -> tuple[list[int], int]:
    """For each block of output channels the first input channel it reads, and how many groups of four."""
    ic, oc = shape.x.channels, shape.y.channels
    if shape.groups == 1:
        return [0], align(shape.joined * ic, 4) // 4
    per_in, per_out = ic // shape.groups, oc // shape.groups
    first, last = [], []
    for start in range(0, oc, block):
        end = min(start + block, oc) - 1
        first.append(start // per_out * per_in // 4 * 4)
        last.append(align((end // per_out + 1) * per_in, 4))
    fours = max(b - a for a, b in zip(first, last, strict=True)) // 4
    # A range must end inside the pixel; moved down it still covers its groups.
    return [min(a, shape.x.pitch - 4 * fours) for a in first], fours


def channel_order(vectors: int, isa: InstructionSet) -> np.ndarray:
    """Which channel of a block each lane of its vectors holds."""
    order: list[np.ndarray] = []
    for narrow in isa.narrows_for(vectors):
        order.append(sum(map(len, order)) + (np.arange(isa.lanes) if narrow is None else narrow.order))
    return np.concatenate(order)


@dataclass(frozen=True)
class PackedWeights:
    """Weights in the order the kernel reads them: (block, tap row, tap column, k, vector, plane, element)."""

    data: np.ndarray
    starts: list[int]
    fours: int


def pack(
    weight: np.ndarray, shape: ConvShape, order: np.ndarray, isa: InstructionSet, dot: DotProduct
) -> PackedWeights:
    """`weight` (out channels, in channels / groups, KH, KW) int8 -> the kernel's order.

    `order`: which channel of a block each lane of its vectors holds.
    """
    oc, block = len(weight), len(order)
    starts, fours = channel_ranges(shape, block)
    blocks = align(oc, block) // block
    per_out = oc // shape.groups
    taps = in_fours(weight, shape)
    kh, kw, per_in = taps.shape[1:]
    full = np.zeros((blocks * block, kh, kw, fours * 4), np.int8)
    for c in range(oc) if shape.groups > 1 else ():
        at = c // per_out * per_in - starts[c // block]
        full[c, :, :, at : at + per_in] = taps[c]
    if shape.groups == 1:
        full[:oc] = taps
    ordered = full.reshape(blocks, block, kh, kw, fours, 4)[:, order]
    grouped = ordered.reshape(blocks, block // isa.lanes, isa.lanes, kh, kw, fours, 4).transpose(0, 3, 4, 5, 1, 2, 6)
    return PackedWeights(dot.pack(grouped), starts, fours)


def per_channel(
    filters: Filters,
    numbers: epilogue.Requantize,
    isa: InstructionSet,
    order: np.ndarray,
    dot: DotProduct | None = None,
) -> dict[str, np.ndarray]:
    """The constants of whole blocks of channels, each in the `order` of its lanes; `dot`: the way to multiply."""

    def in_lanes(values: np.ndarray) -> np.ndarray:
        padded = np.pad(values, (0, -len(values) % len(order)))
        return padded.reshape(-1, len(order))[:, order].reshape(-1)

    return {
        "integers": numbers.integers(isa, in_lanes(filters.folded_bias(isa, dot))),
        "floats": numbers.floats(in_lanes(filters.m)),
    }


def in_fours(weight: np.ndarray, shape: ConvShape) -> np.ndarray:
    """(out channels, in channels / groups, KH, KW) -> (out channels, KH, taps, channels), with rows of taps joined.

    Ungrouped, the channels are a multiple of four. Those of joined taps end with the last four bytes of the row,
    so that nothing beyond it is read; what the last two groups of four both cover counts once.
    """
    oc, per_in, kh, kw = weight.shape
    taps = weight.transpose(0, 2, 3, 1).reshape(oc, kh, kw // shape.joined, per_in * shape.joined)
    if shape.groups > 1:
        return taps
    rest = taps.shape[3] % 4
    last = taps.shape[3] - (rest if shape.joined > 1 else 0)
    zeros = np.zeros((*taps.shape[:3], -rest % 4), np.int8)
    return np.concatenate([taps[..., :last], zeros, taps[..., last:]], 3)


def dot_of(shape: ConvShape, filters: Filters, isa: InstructionSet) -> DotProduct:
    """The fastest dot product that is exact for these weights."""
    taps = in_fours(filters.weight, shape)
    taps = np.pad(taps, [(0, 0)] * 3 + [(0, -taps.shape[3] % 4)])
    return isa.dot_for(taps.reshape(*taps.shape[:3], -1, 4))


def dot_name(shape: ConvShape, filters: Filters, isa: InstructionSet) -> str:
    """What these weights are multiplied with."""
    return dot_of(shape, filters, isa).name


def configs(shape: ConvShape, filters: Filters, isa: InstructionSet) -> list[ConvConfig]:
    """Every tile for these filters, the most promising first."""
    steps = int(np.prod(shape.kernel)) // shape.joined * channel_ranges(shape, isa.lanes)[1]
    return tiles(shape.flat(), isa, dot_of(shape, filters, isa), steps)


def conv(
    shape: ConvShape,
    filters: Filters,
    numbers: epilogue.Requantize,
    isa: InstructionSet,
    symbols: tuple[tirx.Var, ...] = (),
    config: ConvConfig | None = None,
) -> Kernel:
    """The kernel of one convolution."""
    config = config or configs(shape, filters, isa)[0]
    shape, dot = shape.flat(), dot_of(shape, filters, isa)
    order = channel_order(config.vectors, isa)
    packed = pack(filters.weight, shape, order, isa, dot)
    constants = {"weights": packed.data.reshape(-1), **per_channel(filters, numbers, isa, order, dot)}
    if shape.groups > 1:
        constants["starts"] = np.asarray(packed.starts, np.int32)
    steps = numbers.steps(filters.largest_accumulators(), filters.m, isa)
    func = _build(shape, config, isa, dot, packed, constants, symbols, steps)
    label = f"{shape.kind}_{dot.name}_{tile_name(config.rows, len(order), config.order)}"
    return Kernel(label, func, tuple(constants.values()))


def _build(
    shape: ConvShape,
    config: ConvConfig,
    isa: InstructionSet,
    dot: DotProduct,
    packed: PackedWeights,
    constants: dict[str, np.ndarray],
    symbols: tuple[tirx.Var, ...],
    steps: epilogue.Steps,
) -> tirx.PrimFunc:
    lanes, rows, vectors = isa.lanes, config.rows, config.vectors
    blocks, kh, kw, fours = packed.data.shape[:4]
    block = vectors * lanes
    element = packed.data.shape[-1]
    panel_size = vectors * dot.planes * element  # elements of weight per (tap, k)
    row = shape.joined * shape.x.channels
    overlapping = shape.joined > 1 and row % 4 != 0  # the last two groups of four
    with function("conv") as (args, done):
        x = args.buffer("x", shape.x.size, isa.storage)
        residual = args.buffer("residual", shape.residual.size, isa.storage) if shape.residual else None
        weights, integers, floats, *more = args.constants(**constants)
        starts = more[0] if more else None
        args.symbols(symbols)
        y = args.buffer("y", shape.y.size, isa.storage)
        finish = epilogue.Finish(y, residual, shape.y, shape.residual, integers, floats, isa, vectors, steps)

        def tile(pixels: Pixels, b: Any) -> None:
            """`pixels` and block `b` of output channels."""
            count = len(pixels)
            acc = Registers(count * vectors, lanes, "int32")
            for j in range(vectors):
                bias = epilogue.channel_load(integers, b * block + j * lanes, lanes)
                for i in range(count):
                    acc[i * vectors + j] = bias
            first = starts[b] if starts is not None else 0

            def taps(i_h: Any, i_w: Any, k: Any) -> None:
                panel = (((b * kh + i_h) * kw + i_w) * fours + k) * panel_size
                loaded = [
                    [load(weights, panel + (j * dot.planes + p) * element, element) for p in range(dot.planes)]
                    for j in range(vectors)
                ]
                for i, (n, h, w) in enumerate(pixels):
                    at = shape.x.offset(
                        n,
                        h * shape.stride[0] + i_h * shape.dilation[0] - shape.padding[0],
                        w * shape.stride[1] + i_w * shape.dilation[1] - shape.padding[1],
                        first + (T.min(k * 4, row - 4) if overlapping else k * 4),
                    )
                    four = dot.prepare(T.reinterpret("int32", load(x, at, 4)))
                    for j in range(vectors):
                        acc[i * vectors + j] = dot.accumulate(acc[i * vectors + j], four, loaded[j])

            if kh * kw * fours <= UNROLLED:
                for i_h, i_w, k in np.ndindex(kh, kw, fours):
                    taps(i_h, i_w, k)
            else:
                with T.serial(0, kh) as i_h, T.serial(0, kw) as i_w, T.serial(0, fours) as k:
                    taps(i_h, i_w, k)
            for i, pixel in enumerate(pixels):
                finish.store(pixel, b, [acc[i * vectors + v] for v in range(vectors)])

        walk(shape.y, rows, blocks, config.order, tile)
        epilogue.fill_halo(y, shape.y, integers, isa)
    return done.result


CONV = Generator("conv", configs, conv, dot_name)
