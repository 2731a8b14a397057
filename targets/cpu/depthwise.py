"""Depthwise convolution: one filter per channel, a vector of channels at a time.

    acc[i] = bias;  for every tap: acc[i] += int32(x[pixel i, tap]) * int32(weight[tap])

Both factors fit 16 bits, so LLVM multiplies with the 16-bit multiply-add of the processor. A tile of
neighbouring pixels is written out, so that pixels which share an input column load it once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from qcompile.targets.base import InstructionSet
from qcompile.targets.cpu import epilogue
from qcompile.targets.cpu.conv import dot_name
from qcompile.targets.cpu.emit import load, parallel, widen
from qcompile.targets.filters import ConvShape, Filters
from qcompile.targets.function import Kernel, function
from qcompile.targets.generator import Generator
from qcompile.targets.layout import align


@dataclass(frozen=True)
class DepthwiseConfig:
    """Pixels of a tile; every value gives the same bits."""

    pixels: int


def is_depthwise(shape: ConvShape) -> bool:
    return shape.groups == shape.x.channels == shape.y.channels and shape.groups > 1


def configs(shape: ConvShape, filters: Filters, isa: InstructionSet) -> list[DepthwiseConfig]:
    """First as many accumulators as leave half of the registers to weights and inputs."""
    width = shape.y.extents[2]
    most = min(8, isa.registers // 2)
    usual = 4
    if isinstance(width, int):
        tiles = -(-width // most)
        usual = -(-width // tiles)
    return [DepthwiseConfig(pixels) for pixels in sorted(range(1, most + 1), key=lambda n: abs(n - usual))]


def depthwise(
    shape: ConvShape,
    filters: Filters,
    numbers: epilogue.Requantize,
    isa: InstructionSet,
    symbols: tuple[tirx.Var, ...] = (),
    config: DepthwiseConfig | None = None,
) -> Kernel:
    """The kernel of one depthwise convolution."""
    config = config or configs(shape, filters, isa)[0]
    channels = len(filters.weight)
    padded = align(channels, isa.lanes)
    pad = (0, padded - channels)
    taps = np.pad(filters.weight.reshape(channels, -1).T, ((0, 0), pad)).astype(np.int16)
    constants = {
        "weights": np.ascontiguousarray(taps).reshape(-1),
        "integers": numbers.integers(isa, np.pad(filters.folded_bias(isa), pad)),
        "floats": numbers.floats(np.pad(filters.m, pad)),
    }
    func = _build(shape, config, isa, constants, symbols)
    return Kernel(f"depthwise{shape.kernel[0]}x{shape.kernel[1]}_{config.pixels}", func, tuple(constants.values()))


def _build(
    shape: ConvShape,
    config: DepthwiseConfig,
    isa: InstructionSet,
    constants: dict[str, np.ndarray],
    symbols: tuple[tirx.Var, ...],
) -> tirx.PrimFunc:
    lanes, pixels = isa.lanes, config.pixels
    batch, height, width = shape.y.extents
    kh, kw = shape.kernel
    padded = align(shape.y.channels, lanes)
    with function("depthwise") as (args, done):
        x = args.buffer("x", shape.x.size, isa.storage)
        residual = args.buffer("residual", shape.residual.size, isa.storage) if shape.residual else None
        weights, integers, floats = args.constants(**constants)
        args.symbols(symbols)
        y = args.buffer("y", shape.y.size, isa.storage)

        def tile(n: Any, h: Any, w: Any, c: Any, count: int) -> None:
            acc = [epilogue.channel_load(integers, c, lanes)] * count
            for i_h in range(kh):
                for i_w in range(kw):
                    factor = widen(load(weights, (i_h * kw + i_w) * padded + c, lanes), "int32", lanes)
                    for i in range(count):
                        pixel = shape.x.offset(
                            n,
                            h * shape.stride[0] + i_h * shape.dilation[0] - shape.padding[0],
                            (w + i) * shape.stride[1] + i_w * shape.dilation[1] - shape.padding[1],
                            c,
                        )
                        acc[i] = acc[i] + widen(load(x, pixel, lanes), "int32", lanes) * factor
            m = epilogue.channel_load(floats, c, lanes)
            for i in range(count):
                other = None
                if residual is not None and shape.residual is not None:
                    other = load(residual, shape.residual.offset(n, h, w + i, c), lanes)
                value = epilogue.requantize(acc[i], m, integers, floats, isa, lanes, other)
                T.buffer_store(y, value, [T.ramp(shape.y.offset(n, h, w + i, c), 1, lanes)])

        with parallel(batch * height) as line:
            n, h = T.floordiv(line, height), T.floormod(line, height)
            with T.serial(0, padded // lanes) as c:
                with T.serial(0, width // pixels) as w:
                    tile(n, h, w * pixels, c * lanes, pixels)
                if isinstance(width, int):
                    if width % pixels:
                        tile(n, h, width // pixels * pixels, c * lanes, width % pixels)
                else:
                    with T.serial(0, width % pixels) as w:
                        tile(n, h, width // pixels * pixels + w, c * lanes, 1)
        epilogue.fill_halo(y, shape.y, integers, isa)
    return done.result


DEPTHWISE = Generator("depthwise", configs, depthwise, dot_name)
