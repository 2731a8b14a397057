"""Convolutions and linear layers: which device function computes one, with which tile, and how weights are packed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import tirx

from qcompile.targets.cpu.epilogue import Requantize
from qcompile.targets.cuda.launch import (
    Launch,
    Long,
    Number,
    at_least_one,
    ceil_div,
    each,
    image,
    kernel,
    margin,
    requantize,
    words,
)
from qcompile.targets.filters import ConvShape, Filters
from qcompile.targets.function import Kernel
from qcompile.targets.generator import Generator
from qcompile.targets.layout import Dim, align, product
from qcompile.targets.nvidia import Gpu

DEPTH, CHUNK = 64, 16  # bytes of a row of a tile, and of what is copied at once: as in device/multiply.cuh
MOST_ROWS = 8  # that `linear_rows` computes together
PIXELS = 4  # that a thread of `depthwise` computes
_UNKNOWN_PIXELS = 1 << 14  # stands for a dynamic number of them
_ROWS_WARPS = 4  # of a block of `linear_rows`


@dataclass(frozen=True)
class Tile:
    """The part of a product that a block computes: `tall` pixels, `wide` channels, in `down` x `right` warps; `shares`
    blocks each a share of its depth."""

    tall: int
    wide: int
    down: int
    right: int
    shares: int = 1

    @property
    def threads(self) -> int:
        return 32 * self.down * self.right

    def shared_bytes(self, gpu: Gpu) -> int:
        return max(gpu.stages * (self.tall + self.wide) * DEPTH, self.tall * (self.wide + CHUNK))

    def function(self, gpu: Gpu, access: int, residual: bool) -> str:
        """The template of device/convolution.cuh, with its arguments."""
        multiply = "TensorCores" if gpu.tensor_cores else "DotProducts"
        numbers = (self.tall, self.wide, self.down, self.right, gpu.stages, access)
        tile = f"qcompile::Tile<qcompile::{multiply}, {', '.join(map(str, numbers))}>"
        return f"{'convolution' if self.shares == 1 else 'split_convolution'}<{tile}, {str(residual).lower()}>"


_TENSOR_TILES = (
    Tile(256, 128, 4, 2),
    Tile(128, 256, 2, 4),
    Tile(128, 128, 2, 4),
    Tile(128, 64, 4, 2),
    Tile(64, 128, 2, 4),
    Tile(64, 64, 2, 2),
    Tile(32, 64, 1, 4),
    Tile(64, 32, 4, 1),
    Tile(32, 32, 2, 2),
    Tile(16, 64, 1, 4),
)
_DOT_TILES = (Tile(64, 64, 2, 4), Tile(32, 64, 2, 4), Tile(32, 32, 2, 2))
_SHARES = (1, 2, 4, 8)
_LEAST_SHARE = 4  # tiles of depth of a block

# For choosing among them. Tensor cores do 32 products of a tile of depth one (64 bytes) in a cycle; so long take, at
# least, a step through memory and barrier, and the meeting of blocks that share a tile; and for each product of a block
# its sum's way to memory and back (8 bytes, 16 a cycle). What a tile must use a byte of shared memory for, and the
# threads that a processor holds.
_STEP, _MEETING, _PARTIAL, _REUSE, _RESIDENT_THREADS = 3200, 64_000, 16, 48, 2048


def tiles(gpu: Gpu) -> list[Tile]:
    """Those that `gpu` can compute."""
    return [t for t in (_TENSOR_TILES if gpu.tensor_cores else _DOT_TILES) if t.shared_bytes(gpu) <= gpu.shared_bytes]


@dataclass(frozen=True)
class Reading:
    """How a row of the product is read, and so how weights are packed: see device/convolution.cuh.

    Attributes:
        segments: of a row of the filter.
        segment_bytes, chunks: how long a segment is, and its chunks.
        access: bytes that can be copied at once.
    """

    segments: int
    segment_bytes: int
    chunks: int
    access: int

    def depth_tiles(self, rows: int) -> int:
        return -(-rows * self.segments * self.chunks // (DEPTH // CHUNK))


def _reading(shape: ConvShape) -> Reading:
    columns, pitch = shape.kernel[1], int(shape.x.pitch)
    channels = align(shape.x.channels // shape.groups, min(pitch, CHUNK))
    access = math.gcd(pitch, CHUNK)
    if pitch < CHUNK and shape.dilation[1] == 1:
        return Reading(1, columns * pitch, -(-columns * pitch // CHUNK), access)
    return Reading(columns, channels, -(-channels // CHUNK), access)


def pack(weight: np.ndarray, reading: Reading, pitch: int, rows: int) -> np.ndarray:
    """(out channels, in channels, height, width) -> `rows` rows of whole tiles, flat; a pixel takes `pitch` bytes."""
    outputs, inputs, height, width = weight.shape
    taps = weight.transpose(0, 2, 3, 1)
    if reading.segments == 1 and width > 1:  # a segment is a row of taps
        taps = np.pad(taps, ((0, 0),) * 3 + ((0, pitch - inputs),)).reshape(outputs, height, 1, width * pitch)
    segment = reading.chunks * CHUNK
    taps = np.pad(taps, ((0, 0),) * 3 + ((0, segment - taps.shape[3]),)).reshape(outputs, -1)
    depth = reading.depth_tiles(height) * DEPTH
    return np.pad(taps, ((0, rows - outputs), (0, depth - taps.shape[1]))).reshape(-1)


def _is_rows(shape: ConvShape) -> bool:
    """Whether it is a product of few rows."""
    flat = shape.flat()
    rows = product(flat.x.extents)
    plain = flat.kernel == (1, 1) and not flat.x.channels_last and flat.groups == 1
    return plain and isinstance(rows, int) and 0 < rows <= MOST_ROWS and int(flat.x.pitch) % CHUNK == 0


def configs(shape: ConvShape, filters: Filters, gpu: Gpu) -> list[Tile]:
    """The tiles, those first that should be fastest."""
    pixels, depth = product(shape.y.extents), _reading(shape).depth_tiles(shape.kernel[0])
    known = isinstance(pixels, int)
    pixels = pixels if known else _UNKNOWN_PIXELS
    outputs = int(shape.y.pitch) // shape.groups
    shares = [n for n in _SHARES if n == 1 or (known and depth >= _LEAST_SHARE * n)]

    def cost(tile: Tile) -> float:
        """How long the busiest processor computes, in products of a tile of depth one."""
        blocks = -(-pixels // tile.tall) * -(-outputs // tile.wide) * shape.groups * tile.shares
        each = -(-blocks // gpu.processors)
        together = max(1, min(gpu.shared_bytes // tile.shared_bytes(gpu), _RESIDENT_THREADS // tile.threads))
        reuse = tile.tall * tile.wide / (tile.tall + tile.wide)
        busy = each * tile.tall * tile.wide * max(1.0, _REUSE / reuse)
        step = max(busy, _STEP * -(-each // together))
        meeting = _MEETING + max(2 * tile.shares, _PARTIAL * each) * tile.tall * tile.wide if tile.shares > 1 else 0
        return -(-depth // tile.shares) * step + meeting

    return sorted([replace(tile, shares=n) for tile in tiles(gpu) for n in shares], key=cost)


def _steps(shape: ConvShape) -> tuple[Dim, int, int, int, int, int]:
    """Bytes of x: from image to image, to the first byte, from row to row, column to column, and of the filter's."""
    height, width = shape.x.padded
    pitch = int(shape.x.pitch)
    top, left = shape.x.halo[0] - shape.padding[0], shape.x.halo[2] - shape.padding[1]
    line = width * pitch
    return (
        height * line,
        top * line + left * pitch,
        shape.stride[0] * line,
        shape.stride[1] * pitch,
        shape.dilation[0] * line,
        shape.dilation[1] * pitch,
    )


def _operands(shape: ConvShape) -> tuple[dict[str, tuple[Dim, str]], str]:
    """The inputs of the kernel; and which of them stands for a residual, where there is none: it is not read."""
    inputs = {"x": (shape.x.size, "int8")}
    if shape.residual is not None:
        inputs["residual"] = (shape.residual.size, "int8")
    return inputs, "x" if shape.residual is None else "residual"


def _numbers(filters: Filters, gpu: Gpu, pitch: int) -> dict[str, np.ndarray]:
    """bias and m, with zeros for the channels that are only allocated."""
    padding = (0, pitch - len(filters.weight))
    return {"bias": np.pad(filters.folded_bias(gpu), padding), "m": np.pad(filters.m.astype(np.float32), padding)}


def convolution(
    shape: ConvShape,
    filters: Filters,
    numbers: Requantize,
    gpu: Gpu,
    symbols: tuple[tirx.Var, ...] = (),
    config: Tile | None = None,
) -> Kernel:
    """The kernel of a convolution or linear layer by tiles."""
    tile, reading, pitch = config or configs(shape, filters, gpu)[0], _reading(shape), int(shape.y.pitch)
    inputs, residual = _operands(shape)
    image_step, first, down, right, filter_down, filter_right = _steps(shape)
    pixels, outputs = product(shape.y.extents), pitch // shape.groups if shape.groups > 1 else pitch
    rows, blocks = shape.kernel[0], (at_least_one(ceil_div(pixels, tile.tall)), -(-outputs // tile.wide))
    members: tuple[Number, ...] = (
        pixels,
        *shape.y.extents[1:],
        Long(image_step),
        first,
        down,
        right,
        filter_down,
        filter_right,
        reading.segments,
        rows,
        reading.segment_bytes,
        reading.chunks,
        shape.x.channels // shape.groups,
        outputs,
        reading.depth_tiles(rows),
        tile.shares,
        *image(shape.y),
        *image(shape.residual or shape.y),
        *margin(shape.y, numbers.zero_point),
        *requantize(numbers),
    )
    launch = Launch(
        "convolution.cuh",
        tile.function(gpu, reading.access, shape.residual is not None),
        "Convolution",
        ("x", residual, "weight", "bias", "m", *["tickets"] * (tile.shares > 1)),
        members,
        (*blocks, shape.groups * tile.shares),
        tile.threads,
        tile.shared_bytes(gpu),
    )
    constants = {"weight": pack(filters.weight, reading, int(shape.x.pitch), pitch), **_numbers(filters, gpu, pitch)}
    name, scratch = f"{shape.kind}_{_instruction(shape, filters, gpu)}_{tile.tall}x{tile.wide}", 0
    if tile.shares > 1:
        tiles = int(product(blocks)) * shape.groups
        name, scratch = f"{name}_{tile.shares}_shares", tiles * tile.shares * tile.tall * tile.wide
        # Of a type that no other constant has: equal constants are one, and these are written to.
        constants["tickets"] = np.zeros(4 * tiles, np.uint8)
    return kernel(name, [launch], inputs, (shape.y.size, "int8"), constants, symbols, scratch)


def _instruction(shape: ConvShape, filters: Filters, gpu: Gpu) -> str:
    return "mma" if gpu.tensor_cores else "dp4a"


def linear_rows(
    shape: ConvShape,
    filters: Filters,
    numbers: Requantize,
    gpu: Gpu,
    symbols: tuple[tirx.Var, ...] = (),
    config: Any = None,
) -> Kernel:
    """The kernel of a linear layer of few rows."""
    flat, (inputs, residual) = shape.flat(), _operands(shape)
    rows, reading, outputs = int(product(flat.x.extents)), _reading(flat), len(filters.weight)
    together = 1 << (rows - 1).bit_length()
    members = (
        rows,
        flat.x.pitch,
        flat.y.pitch,
        (flat.residual or flat.y).pitch,
        reading.chunks,
        outputs,
        reading.depth_tiles(1) * DEPTH,
        *requantize(numbers),
    )
    launch = Launch(
        "rows.cuh",
        f"linear_rows<{together}, {str(flat.residual is not None).lower()}>",
        "Rows",
        ("x", residual, "weight", "bias", "m"),
        members,
        (-(-outputs // _ROWS_WARPS), 1, 1),
        32 * _ROWS_WARPS,
    )
    weight = pack(filters.weight, reading, int(flat.x.pitch), outputs)
    constants = {"weight": weight, **_numbers(filters, gpu, outputs)}
    return kernel(f"gemm_dp4a_{rows}_rows", [launch], inputs, (shape.y.size, "int8"), constants, symbols)


def grouped(
    shape: ConvShape,
    filters: Filters,
    numbers: Requantize,
    gpu: Gpu,
    symbols: tuple[tirx.Var, ...] = (),
    config: Any = None,
) -> Kernel:
    """The kernel of a convolution of groups that tiles do not fit, or of one channel each."""
    inputs, residual = _operands(shape)
    image_step, first, *steps = _steps(shape)
    outputs, of_group, *_ = filters.weight.shape
    channels = align(outputs, 4)
    weight = np.pad(filters.weight, ((0, channels - outputs),) + ((0, 0),) * 3).transpose(2, 3, 1, 0)
    depthwise = _is_depthwise(shape)
    members = (
        shape.y.extents[0],
        channels,
        *steps[:2],
        *shape.kernel,
        *steps[2:],
        Long(image_step),
        first,
        of_group,
        outputs // shape.groups,
        shape.groups - 1,
        *image(shape.y),
        *image(shape.residual or shape.y),
        *margin(shape.y, numbers.zero_point),
        *requantize(numbers),
    )
    count = words(shape.y)
    if depthwise:
        weight = _own_bytes(weight[:, :, 0])
        count = product((*shape.y.extents[:2], ceil_div(shape.y.extents[2], PIXELS), channels // 4))
    launch = Launch(
        "grouped.cuh",
        _depthwise_function(shape) if depthwise else f"grouped<{str(shape.residual is not None).lower()}>",
        "Grouped",
        ("x", residual, "weight", "bias", "m"),
        members,
        each(count),
        roomy=depthwise,  # its loads are to be in flight together
    )
    constants = {"weight": weight.reshape(-1), **_numbers(filters, gpu, channels)}
    name = f"{'depthwise' if depthwise else 'grouped'}{shape.kernel[0]}x{shape.kernel[1]}"
    return kernel(name, [launch], inputs, (shape.y.size, "int8"), constants, symbols)


def _depthwise_function(shape: ConvShape) -> str:
    """The template of device/grouped.cuh, with its arguments."""
    (height, width), stride = shape.kernel, shape.stride[1]
    known = height == width in (3, 5) and stride in (1, 2) and shape.dilation[1] == 1
    of_filter = (width, stride) if known else (0, 0)
    return f"depthwise<{PIXELS}, {of_filter[0]}, {of_filter[1]}, {str(shape.residual is not None).lower()}>"


def _own_bytes(weight: np.ndarray) -> np.ndarray:
    """(..., channels) -> (..., channels, 4): each weight in the byte that its channel has among four, else zeros."""
    spread = np.zeros((*weight.shape, 4), np.int8)
    for byte in range(4):
        spread[..., byte::4, byte] = weight[..., byte::4]
    return spread


def _is_depthwise(shape: ConvShape) -> bool:
    return shape.groups == shape.x.channels == shape.y.channels and shape.groups > 1


def _fits_tiles(shape: ConvShape) -> bool:
    per_group = shape.x.channels // shape.groups, shape.y.channels // shape.groups
    return shape.groups == 1 or all(channels % CHUNK == 0 for channels in per_group)


def _only(shape: ConvShape, filters: Filters, gpu: Gpu) -> list[None]:
    return [None]


TILES = Generator("cuda_tiles", configs, convolution, _instruction)
ROWS = Generator("cuda_rows", _only, linear_rows, lambda *_: "dp4a")
GROUPED = Generator("cuda_grouped", _only, grouped, lambda *_: "dp4a")


def generator_for(shape: ConvShape, gpu: Gpu) -> Generator:
    """The fastest generator for this geometry."""
    if _is_rows(shape):
        return ROWS
    return TILES if _fits_tiles(shape) else GROUPED
