"""Pooling: maximum over a window, and averages over fixed or adaptive windows."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from qcompile.targets.base import InstructionSet
from qcompile.targets.cpu import epilogue
from qcompile.targets.cpu.elementwise import launch
from qcompile.targets.cpu.emit import Registers, load, splat, store, widen
from qcompile.targets.function import Kernel, function
from qcompile.targets.layout import Layout, align


def max_pool(
    x: Layout,
    y: Layout,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    zero_point: int,
    isa: InstructionSet,
    symbols: tuple[tirx.Var, ...] = (),
) -> Kernel:
    """The kernel of a maximum over windows; `zero_point` fills the halo.

    A tap outside the image is replaced by the nearest tap inside it, which leaves the maximum
    unchanged: padding is never a value, and no branch is needed.
    """
    batch, height, width = y.extents
    size = x.extents[1:]
    lanes = next(n for n in (64, 32, 16) if x.pitch % n == 0 and y.pitch % n == 0)
    vectors = align(y.channels, lanes) // lanes

    def taps(axis: int, out: Any) -> tuple[Any, Any]:
        """The first and last tap of a window that lie inside the image."""
        start, step = out * stride[axis] - padding[axis], dilation[axis]
        first = T.max(T.floordiv(step - 1 - start, step), 0)
        return first, T.min(T.floordiv(size[axis] - 1 - start, step), kernel[axis] - 1)

    def tap(axis: int, out: Any, k: Any) -> Any:
        first, last = taps(axis, out)
        index = out * stride[axis] - padding[axis] + T.min(T.max(k, first), last) * dilation[axis]
        return T.max(T.min(index, size[axis] - 1), 0) if empty else index

    def any_empty(axis: int) -> bool:
        """Whether some window holds nothing but padding."""
        outputs = y.extents[1 + axis]
        if not (isinstance(size[axis], int) and isinstance(outputs, int)):
            return True
        starts = np.arange(outputs) * stride[axis] - padding[axis]
        inside = [(0 <= s + k * dilation[axis] < size[axis]) for s in starts for k in range(kernel[axis])]
        return not np.reshape(inside, (outputs, kernel[axis])).any(1).all()

    empty = any_empty(0) or any_empty(1)
    integers = epilogue.Requantize(zero_point).integers(isa)
    with function("max_pool") as (args, done):
        source = args.buffer("x", x.size, isa.storage)
        (numbers,) = args.constants(integers=integers)
        args.symbols(symbols)
        out = args.buffer("y", y.size, isa.storage)
        with launch(batch * height, y.size) as line:
            n, h = T.floordiv(line, height), T.floormod(line, height)
            with T.serial(0, width) as w, T.serial(0, vectors) as v:
                best = None
                for i in range(kernel[0]):
                    for j in range(kernel[1]):
                        value = load(source, x.offset(n, tap(0, h, i), tap(1, w, j), v * lanes), lanes)
                        best = value if best is None else T.max(best, value)
                if empty:
                    (top, bottom), (left, right) = taps(0, h), taps(1, w)
                    lowest = splat(T.cast(T.int32(isa.offset - 128), isa.storage), lanes)
                    best = T.if_then_else(T.And(top <= bottom, left <= right), best, lowest)
                store(out, y.offset(n, h, w, v * lanes), best, lanes)
        epilogue.fill_halo(out, y, numbers, isa)
    return Kernel(f"max_pool{kernel[0]}x{kernel[1]}", done.result, (integers,))


def average_pool(
    x: Layout,
    y: Layout,
    rows: np.ndarray,
    columns: np.ndarray,
    m: np.ndarray,
    x_zero_point: int,
    zero_point: int,
    isa: InstructionSet,
    symbols: tuple[tirx.Var, ...] = (),
) -> Kernel:
    """The kernel of an average: an integer sum over each window, then requantize.

    `rows` (OH, 2) and `columns` (OW, 2) hold the first and one past the last input row and column of
    each window, clipped to the image; `m` (OH, OW) float32 holds the multiplier of each position.
    """
    lanes = isa.lanes
    batch, height, width = y.extents
    vectors = align(y.channels, lanes) // lanes
    numbers = epilogue.Requantize(zero_point)
    integers = numbers.integers(isa, np.concatenate([rows.reshape(-1), columns.reshape(-1)]))
    integers[2] = x_zero_point + isa.offset
    floats = numbers.floats(m.reshape(-1))
    column_base = epilogue.HEAD + rows.size
    with function("average_pool") as (args, done):
        source = args.buffer("x", x.size, isa.storage)
        ints, reals = args.constants(integers=integers, floats=floats)
        args.symbols(symbols)
        out = args.buffer("y", y.size, isa.storage)
        with launch(batch * height * vectors, x.size) as task:
            v = T.floormod(task, vectors)
            line = T.floordiv(task, vectors)
            n, h = T.floordiv(line, height), T.floormod(line, height)
            with T.serial(0, width) as w:
                top, bottom = (ints[epilogue.HEAD + h * 2 + i] for i in (0, 1))
                left, right = (ints[column_base + w * 2 + i] for i in (0, 1))
                acc = Registers(1, lanes, "int32")
                count = (bottom - top) * (right - left)
                acc[0] = splat(T.int32(0) - ints[2] * count, lanes)
                with T.serial(0, bottom - top) as i, T.serial(0, right - left) as j:
                    value = widen(load(source, x.offset(n, top + i, left + j, v * lanes), lanes), "int32", lanes)
                    acc[0] = acc[0] + value
                factor = splat(reals[epilogue.HEAD + h * width + w], lanes)
                value = epilogue.requantize(acc[0], factor, ints, reals, isa, lanes)
                store(out, y.offset(n, h, w, v * lanes), value, lanes)
        epilogue.fill_halo(out, y, ints, isa)
    return Kernel("average_pool", done.result, (integers, floats))
