"""Linear layers that quantize each row of their input when it is there: two kernels.

The first writes each row as the integers that the dot product takes, and its scale in the four bytes behind them:
so the second needs one buffer, and reads the scale from a cache line that it has just read. The second is the GEMM
of `qcompile.targets.cpu.conv`, with float output: y = fma(f32(acc), s[r] * scale[n], bias[n]).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from qcompile.arith import SMALLEST_ROW, WEIGHT_MAX
from qcompile.targets.base import InstructionSet
from qcompile.targets.cpu.conv import UNROLLED, configs, dot_of, pack
from qcompile.targets.cpu.elementwise import launch
from qcompile.targets.cpu.emit import Registers, llvm, load, splat, store, store_first, vector_type, widen
from qcompile.targets.cpu.tasks import split_row
from qcompile.targets.filters import ConvShape, Filters
from qcompile.targets.function import Kernel, function
from qcompile.targets.layout import Dim, Layout, align, dense

_ALIGNMENT = 16  # bytes: of a row, and of its scale
_WIDTH = 16  # values that are quantized at once
_MAGNITUDE, _INFINITY, _NAN = 0x7FFFFFFF, 0x7F800000, 0x7FC00000


def quantized_rows(rows: Dim, features: int) -> Layout:
    """The layout of `rows` rows of integers with their scales."""
    return Layout((rows, features), False, align(features, _ALIGNMENT) + _ALIGNMENT)


def quantize_rows(x: tuple[Dim, ...], y: Layout, isa: InstructionSet, symbols: tuple[tirx.Var, ...] = ()) -> Kernel:
    """The kernel of `arith.quantize_rows` on a dense float tensor.

    The largest magnitude is found among the bits, as integers: their order is that of the magnitudes, NaN above
    all, and the order of the comparisons does not matter.
    """
    rows, features = y.shape
    whole, rest = features // _WIDTH * _WIDTH, features % _WIDTH
    with function("quantize_rows") as (args, done):
        source = args.buffer("x", rows * features, "float32")
        args.symbols(symbols)
        out = args.buffer("y", y.size, isa.storage)

        def magnitude(offset: Any, lanes: int) -> Any:
            bits = T.reinterpret(vector_type("int32", lanes), load(source, offset, lanes))
            return T.bitwise_and(bits, splat(T.int32(_MAGNITUDE), lanes))

        def quantize(r: Any, k: Any, lanes: int, factor: Any) -> None:
            real = load(source, r * features + k, lanes) * splat(factor, lanes)
            q = llvm("int32", lanes, "llvm.lrint", real) + splat(T.int32(isa.offset), lanes)
            store(out, r * y.pitch + k, widen(q, isa.storage, lanes), lanes)

        with launch(rows, y.size) as r:
            largest, single = Registers(1, _WIDTH, "int32"), Registers(1, 1, "int32")
            largest[0], single[0] = splat(T.int32(0), _WIDTH), T.int32(0)
            if whole:
                with T.serial(0, whole // _WIDTH) as i:
                    largest[0] = T.max(largest[0], magnitude(r * features + i * _WIDTH, _WIDTH))
            if rest:
                with T.serial(0, rest) as i:
                    single[0] = T.max(single[0], magnitude(r * features + whole + i, 1))
            half = _WIDTH // 2
            while half:
                swapped = [(lane + half) % _WIDTH for lane in range(_WIDTH)]
                largest[0] = T.max(largest[0], T.Shuffle([largest[0]], swapped))
                half //= 2
            single[0] = T.max(single[0], T.Shuffle([largest[0]], [0]))
            scale = Registers(1, 1, "float32")
            scale[0] = T.float32(0)
            a, most = T.reinterpret("float32", single[0]), T.float32(WEIGHT_MAX)
            with T.If(T.And(a > T.float32(SMALLEST_ROW), single[0] < _INFINITY)):
                with T.Then():
                    factor = Registers(1, 1, "float32")
                    factor[0], scale[0] = most / a, a / most
                    if whole:
                        with T.serial(0, whole // _WIDTH) as i:
                            quantize(r, i * _WIDTH, _WIDTH, factor[0])
                    if rest:
                        with T.serial(0, rest) as i:
                            quantize(r, whole + i, 1, factor[0])
                with T.Else():
                    with T.serial(0, features) as i:
                        store(out, r * y.pitch + i, T.cast(T.int32(isa.offset), isa.storage), 1)
                    with T.If(single[0] >= _INFINITY), T.Then():
                        scale[0] = T.reinterpret("float32", T.int32(_NAN))
            store(out, r * y.pitch + (y.pitch - _ALIGNMENT), T.reinterpret(f"{isa.storage}x4", scale[0]), 4)
    return Kernel("quantize_rows", done.result)


def linear_dynamic(
    x: Layout,
    weight: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray,
    isa: InstructionSet,
    symbols: tuple[tirx.Var, ...] = (),
) -> Kernel:
    """The kernel of the product; `x` as `quantized_rows` has it, `weight` (N, K) int8, the others (N,) float32."""
    rows, features = x.shape[0], len(weight)
    shape = ConvShape(x, dense((rows, features)), None, (1, 1), (1, 1), (0, 0), (1, 1), 1)
    filters = Filters(weight[:, :, None, None], np.zeros(features, np.int32), scale, 0)
    config, dot = configs(shape, filters, isa)[0], dot_of(shape, filters, isa)
    packed = pack(filters.weight, shape, np.arange(config.vectors * isa.lanes), isa, dot)
    lanes, vectors = isa.lanes, config.vectors
    blocks, element = packed.data.shape[0], packed.data.shape[-1]
    padding = (0, blocks * vectors * lanes - features)
    constants = {
        "weights": packed.data.reshape(-1),
        "sums": np.pad(filters.folded_bias(isa, dot), padding),
        "scales": np.pad(scale, padding),
        "biases": np.pad(bias, padding),
    }
    panel_size = vectors * dot.planes * element
    with function("linear_dynamic") as (args, done):
        source = args.buffer("x", x.size, isa.storage)
        weights, sums, scales, biases = args.constants(**constants)
        args.symbols(symbols)
        y = args.buffer("y", rows * features, "float32")

        def tile(r: Any, b: Any, count: int) -> None:
            acc = Registers(count * vectors, lanes, "int32")
            for j in range(vectors):
                for i in range(count):
                    acc[i * vectors + j] = load(sums, (b * vectors + j) * lanes, lanes)

            def step(k: Any) -> None:
                panel = (b * packed.fours + k) * panel_size
                loaded = [
                    [load(weights, panel + (j * dot.planes + p) * element, element) for p in range(dot.planes)]
                    for j in range(vectors)
                ]
                for i in range(count):
                    four = dot.prepare(T.reinterpret("int32", load(source, (r + i) * x.pitch + k * 4, 4)))
                    for j in range(vectors):
                        acc[i * vectors + j] = dot.accumulate(acc[i * vectors + j], four, loaded[j])

            if packed.fours <= UNROLLED:
                for k in range(packed.fours):
                    step(k)
            else:
                with T.serial(0, packed.fours) as k:
                    step(k)
            for i in range(count):
                end = (r + i) * x.pitch + (x.pitch - _ALIGNMENT)
                row_scale = splat(T.reinterpret("float32", load(source, end, 4)), lanes)
                for j in range(vectors):
                    channel = (b * vectors + j) * lanes
                    factor = row_scale * load(scales, channel, lanes)
                    real = widen(acc[i * vectors + j], "float32", lanes)
                    value = llvm("float32", lanes, "llvm.fma", real, factor, load(biases, channel, lanes))
                    store_first(y, (r + i) * features, channel, value, lanes, features)

        split_row(rows, config.rows, blocks, config.order, tile)
    label = f"linear_dynamic_{dot.name}_{config.rows}x{vectors * lanes}"
    return Kernel(label, done.result, tuple(constants.values()))
