"""Depthwise convolution of real numbers: one filter per channel, a vector of channels at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx

from qcompile.targets.base import InstructionSet
from qcompile.targets.cpu.emit import llvm, load, store
from qcompile.targets.cpu.float_conv import Real
from qcompile.targets.cpu.real import clear_halo, narrow, real, to_real
from qcompile.targets.cpu.walk import Pixels, walk
from qcompile.targets.filters import ConvShape
from qcompile.targets.function import Kernel, function
from qcompile.targets.layout import align

_PIXELS = 7  # of a tile, so that pixels which share an input column load it once


def depthwise(shape: ConvShape, given: Real, isa: InstructionSet, symbols: tuple[tirx.Var, ...] = ()) -> Kernel:
    """The kernel of one depthwise convolution; its products are exact in float32, of bfloat16 too."""
    lanes, channels = isa.lanes, len(given.weight)
    padded = align(channels, lanes)
    pad = (0, padded - channels)
    taps = np.pad(given.weight.reshape(channels, -1).T, ((0, 0), pad))
    constants = {
        "weights": np.ascontiguousarray(taps, np.float32).reshape(-1),
        "bias": np.pad(given.bias, pad).astype(np.float32),
    }
    width = shape.y.extents[2]
    tiles = -(-width // _PIXELS) if isinstance(width, int) else 1
    pixels = -(-width // tiles) if isinstance(width, int) else 4
    kh, kw = shape.kernel
    with function("float_depthwise") as (args, done):
        x = args.buffer("x", shape.x.size, given.types[0])
        residual = args.buffer("residual", shape.residual.size, given.types[1]) if shape.residual else None
        weights, biases = args.constants(**constants)
        args.symbols(symbols)
        y = args.buffer("y", shape.y.size, given.types[2])

        def tile(places: Pixels, b: Any) -> None:
            c = b * lanes
            acc = [load(biases, c, lanes)] * len(places)
            for i_h, i_w in np.ndindex(kh, kw):
                factor = load(weights, (i_h * kw + i_w) * padded + c, lanes)
                for i, (n, h, w) in enumerate(places):
                    at = shape.x.offset(
                        n,
                        h * shape.stride[0] + i_h * shape.dilation[0] - shape.padding[0],
                        w * shape.stride[1] + i_w * shape.dilation[1] - shape.padding[1],
                        c,
                    )
                    acc[i] = llvm(
                        "float32", lanes, "llvm.fma", to_real(load(x, at, lanes), given.types[0], lanes), factor, acc[i]
                    )
            for place, value in zip(places, acc, strict=True):
                if residual is not None and shape.residual is not None:
                    other = load(residual, shape.residual.offset(*place, c), lanes)
                    value = value + to_real(other, given.types[1], lanes)
                value = narrow(real(value, given.lo, given.hi, lanes), given.types[2], lanes)
                store(y, shape.y.offset(*place, c), value, lanes)

        walk(shape.y, pixels, padded // lanes, "pixels", tile)
        clear_halo(y, shape.y, given.types[2])
    return Kernel(f"depthwise{kh}x{kw}_fma_{pixels}", done.result, tuple(constants.values()))
