"""Convolution and GEMM of real numbers: implicit GEMM as in `conv`, with float32 accumulators.

    acc[i, j] = bias[j];  for every tap (kh, kw) and step k:
        acc[i, j] += x[pixel i, tap, k] * weight[j, tap, k]

A step takes one 32-bit word of activations: one float32, or two bfloat16. Activations and results are float32, or
bfloat16 as uint16. The input's halo stands for the padding. Channels beyond the logical ones hold zero, never NaN,
where a step could read them: kernels write whole vectors, of zero weights and zero bias.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from qcompile.targets.base import InstructionSet, Products
from qcompile.targets.cpu.conv import channel_ranges
from qcompile.targets.cpu.emit import Registers, load, splat, store
from qcompile.targets.cpu.real import clear_halo, narrow, real, to_real
from qcompile.targets.cpu.tiles import ConvConfig, tiles
from qcompile.targets.cpu.walk import Pixels, walk
from qcompile.targets.filters import ConvShape
from qcompile.targets.function import Kernel, function
from qcompile.targets.layout import align

UNROLLED = 16  # steps of a sum that are written out: a loop of few steps costs more than its body


@dataclass(frozen=True)
class Real:
    """What a convolution of real numbers is given besides its geometry.

    Attributes:
        weight: (out channels, in channels / groups, kernel height, kernel width) float32.
        bias: (out channels,) float32.
        lo, hi: the clamp, perhaps infinite.
        types: of x, residual and y as they are stored: "float32", or "uint16" for bfloat16.
    """

    weight: np.ndarray
    bias: np.ndarray
    lo: float
    hi: float
    types: tuple[str, str, str]


def _first_channels(shape: ConvShape, block: int, products: Products) -> tuple[list[int], int]:
    """For each block of output channels the first input channel it reads, and its steps."""
    if shape.groups == 1:
        return [0], align(shape.x.channels, products.depth) // products.depth
    starts, fours = channel_ranges(shape, block)
    return starts, fours * 4 // products.depth


def _pack(shape: ConvShape, given: Real, block: int, products: Products) -> tuple[np.ndarray, list[int], int]:
    """Weights as 32-bit words (block, tap row, tap column, step, channel), the first channels, and the steps."""
    oc, per_in, kh, kw = given.weight.shape
    starts, steps = _first_channels(shape, block, products)
    blocks, per_out = align(oc, block) // block, oc // shape.groups
    full = np.zeros((blocks * block, kh, kw, steps * products.depth), np.float32)
    taps = given.weight.transpose(0, 2, 3, 1)
    for c in range(oc) if shape.groups > 1 else ():
        at = c // per_out * per_in - starts[c // block]
        full[c, :, :, at : at + per_in] = taps[c]
    if shape.groups == 1:
        full[:oc, :, :, :per_in] = taps
    words = products.pack(full.reshape(blocks, block, kh, kw, steps, products.depth))
    return np.ascontiguousarray(words.transpose(0, 2, 3, 4, 1)), starts, steps


def importing(products: Products) -> Any:
    """Within, the function under construction may call what `products` calls."""
    return T.attr(0, "pragma_import_llvm", products.calls) if products.calls else nullcontext()


def configs(shape: ConvShape, isa: InstructionSet, products: Products) -> list[ConvConfig]:
    """Every tile, the most promising first."""
    steps = math.prod(shape.kernel) * _first_channels(shape, isa.lanes, products)[1]
    return tiles(shape.flat(), isa, products, steps)


def conv(
    shape: ConvShape,
    given: Real,
    isa: InstructionSet,
    products: Products,
    symbols: tuple[tirx.Var, ...] = (),
    config: ConvConfig | None = None,
) -> Kernel:
    """The kernel of one convolution."""
    config = config or configs(shape, isa, products)[0]
    shape = shape.flat()
    lanes, vectors = isa.lanes, config.vectors
    words, starts, steps = _pack(shape, given, vectors * lanes, products)
    bias = np.pad(given.bias, (0, words.shape[0] * vectors * lanes - len(given.bias)))
    constants = {"weights": words.reshape(-1), "bias": bias.astype(np.float32)}
    if shape.groups > 1:
        constants["starts"] = np.asarray(starts, np.int32)
    func = _build(shape, given, config, isa, products, steps, constants, symbols)
    return Kernel(f"{shape.kind}_{products.name}_{config.rows}x{vectors * lanes}", func, tuple(constants.values()))


def _build(
    shape: ConvShape,
    given: Real,
    config: ConvConfig,
    isa: InstructionSet,
    products: Products,
    steps: int,
    constants: dict[str, np.ndarray],
    symbols: tuple[tirx.Var, ...],
) -> tirx.PrimFunc:
    lanes, vectors = isa.lanes, config.vectors
    kh, kw = shape.kernel
    block = vectors * lanes
    with function("float_conv") as (args, done):
        x = args.buffer("x", shape.x.size, given.types[0])
        residual = args.buffer("residual", shape.residual.size, given.types[1]) if shape.residual else None
        weights, biases, *more = args.constants(**constants)
        args.symbols(symbols)
        y = args.buffer("y", shape.y.size, given.types[2])

        def word(offset: Any) -> Any:
            """The 32-bit word of activations from `offset` on, in every lane."""
            if products.depth == 1:
                return splat(T.reinterpret("int32", to_real(load(x, offset, 1), given.types[0], 1)), lanes)
            return splat(T.reinterpret("int32", load(x, offset, 2)), lanes)

        def tile(pixels: Pixels, b: Any) -> None:
            count = len(pixels)
            acc = Registers(count * vectors, lanes, "float32")
            for j in range(vectors):
                for i in range(count):
                    acc[i * vectors + j] = load(biases, b * block + j * lanes, lanes)
            first = more[0][b] if more else 0

            def tap(i_h: Any, i_w: Any, k: Any) -> None:
                panel = (((b * kh + i_h) * kw + i_w) * steps + k) * block
                loaded = [load(weights, panel + j * lanes, lanes) for j in range(vectors)]
                for i, (n, h, w) in enumerate(pixels):
                    at = shape.x.offset(
                        n,
                        h * shape.stride[0] + i_h * shape.dilation[0] - shape.padding[0],
                        w * shape.stride[1] + i_w * shape.dilation[1] - shape.padding[1],
                        first + k * products.depth,
                    )
                    repeated = word(at)
                    for j in range(vectors):
                        acc[i * vectors + j] = products.accumulate(acc[i * vectors + j], repeated, loaded[j], lanes)

            if kh * kw * steps <= UNROLLED:
                for i_h, i_w, k in np.ndindex(kh, kw, steps):
                    tap(i_h, i_w, k)
            else:
                with T.serial(0, kh) as i_h, T.serial(0, kw) as i_w, T.serial(0, steps) as k:
                    tap(i_h, i_w, k)
            for i, pixel in enumerate(pixels):
                for j in range(vectors):
                    channel = b * block + j * lanes
                    value = acc[i * vectors + j]
                    if residual is not None and shape.residual is not None:
                        other = load(residual, shape.residual.offset(*pixel, channel), lanes)
                        value = value + to_real(other, given.types[1], lanes)
                    value = narrow(real(value, given.lo, given.hi, lanes), given.types[2], lanes)
                    store(y, shape.y.offset(*pixel, channel), value, lanes)

        with importing(products):
            walk(shape.y, config.rows, constants["bias"].size // block, config.order, tile)
        clear_halo(y, shape.y, given.types[2])
    return done.result
