"""Kernels of float operators that go along one dimension, for which TVM has none: running sums and products,
and the order of a stable sort. Tensors are dense; the dimension has `before` elements in front of each of its
lines and `after` behind: element k of a line lies at (line // after * extent + k) * after + line % after.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from qcompile.targets.cpu.elementwise import launch
from qcompile.targets.function import Kernel, function
from qcompile.targets.layout import Dim, product

Symbols = tuple[tirx.Var, ...]


def _parts(shape: tuple[Dim, ...], dim: int) -> tuple[Dim, Dim, Dim]:
    return product(shape[:dim]), shape[dim], product(shape[dim + 1 :])


def accumulate(
    operation: str, shape: tuple[Dim, ...], dim: int, types: tuple[str, str], symbols: Symbols = ()
) -> Kernel:
    """The kernel of a running sum ("cumsum") or product ("cumprod") along `dim`; `types` of input and result."""
    before, extent, after = _parts(shape, dim)
    with function(operation) as (args, done):
        x = args.buffer("x", product(shape), types[0])
        args.symbols(symbols)
        y = args.buffer("y", product(shape), types[1])
        with launch(before * after, product(shape)) as line:
            start = T.floordiv(line, after) * extent * after + T.floormod(line, after)
            total = T.alloc_buffer((1,), types[1], scope="local")
            T.buffer_store(total, T.cast(T.int32(operation == "cumprod"), types[1]), [0])
            with T.serial(0, extent) as k:
                value = T.cast(x[start + k * after], types[1])
                T.buffer_store(total, total[0] + value if operation == "cumsum" else total[0] * value, [0])
                T.buffer_store(y, total[0], [start + k * after])
    return Kernel(operation, done.result)


def _is_nan(value: Any, dtype: str) -> Any:
    # By its bits: a comparison of a value with itself would be simplified away.
    return T.bitwise_and(T.reinterpret("int32", value), 0x7FFFFFFF) > 0x7F800000 if dtype == "float32" else False


def _precedes(a: Any, b: Any, dtype: str, descending: bool) -> Any:
    """Whether `a` must come before `b`; NaN is larger than every number."""
    if descending:
        a, b = b, a
    if dtype != "float32":
        return a < b
    return T.Or(a < b, T.And(_is_nan(b, dtype), T.Not(_is_nan(a, dtype))))


def argsort(shape: tuple[Dim, ...], dim: int, dtype: str, descending: bool, symbols: Symbols = ()) -> Kernel:
    """The kernel of a stable sort's order along `dim` (its extent is a number): int64 indices.

    A merge sort from the bottom up; each pass merges neighbouring runs from one buffer into the other.
    """
    before, extent, after = _parts(shape, dim)
    widths = [1 << i for i in range(max(0, extent - 1).bit_length())]
    with function("argsort") as (args, done):
        x = args.buffer("x", product(shape), dtype)
        args.symbols(symbols)
        y = args.buffer("y", product(shape), "int64")
        with launch(before * after, product(shape)) as line:
            start = T.floordiv(line, after) * extent * after + T.floormod(line, after)
            buffers = [T.alloc_buffer((max(1, extent),), "int64", scope="global") for _ in range(2)]
            left, right, step = (T.alloc_buffer((1,), "int64", scope="local") for _ in range(3))
            with T.serial(0, extent) as k:
                T.buffer_store(buffers[0], T.cast(k, "int64"), [k])
            for i, width in enumerate(widths):
                source, target = buffers[i % 2], buffers[(i + 1) % 2]
                with T.serial(0, -(-extent // (2 * width))) as run:
                    low = T.cast(run, "int64") * (2 * width)
                    middle, high = T.min(low + width, T.int64(extent)), T.min(low + 2 * width, T.int64(extent))
                    T.buffer_store(left, low, [0])
                    T.buffer_store(right, middle, [0])
                    with T.serial(0, high - low) as k:
                        # Beyond its run an index is not used, but read all the same.
                        a, b = (source[T.min(side[0], T.int64(extent - 1))] for side in (left, right))
                        later = _precedes(x[start + b * after], x[start + a * after], dtype, descending)
                        takes_left = T.And(left[0] < middle, T.Or(right[0] >= high, T.Not(later)))
                        T.buffer_store(step, T.cast(takes_left, "int64"), [0])
                        T.buffer_store(target, T.Select(step[0] == 1, a, b), [low + k])
                        T.buffer_store(left, left[0] + step[0], [0])
                        T.buffer_store(right, right[0] + (1 - step[0]), [0])
            with T.serial(0, extent) as k:
                T.buffer_store(y, buffers[len(widths) % 2][k], [start + k * after])
    return Kernel("argsort", done.result)
