"""Elementwise operators on activations, and pooling. Arguments are those of the kernels for CPUs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tvm import tirx

from qcompile.targets.cpu.elementwise import at
from qcompile.targets.cpu.epilogue import Requantize
from qcompile.targets.cuda.launch import Launch, Number, each, image, kernel, margin, requantize, words
from qcompile.targets.function import Kernel
from qcompile.targets.layout import Dim, Layout, align
from qcompile.targets.nvidia import Gpu

Symbols = tuple[tirx.Var, ...]


def _operand(layout: Layout, y: Layout) -> tuple[Number, ...]:
    """Operand: where the elements of an operand lie that may be repeated."""
    first, repeated = at(layout, y, 0, 0, 0, 0)
    steps = [at(layout, y, *index, 0)[0] - first for index in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    return first, *steps, 0 if repeated else 1


def _sizes(y: Layout) -> tuple[Dim, int]:
    """How many images and channels; whole words of these."""
    return y.extents[0], align(y.channels, 4)


def _binary(
    name: str, operation: str, a: Layout, b: Layout, y: Layout, a_zero_point: int, a_m: float, numbers: Requantize,
    symbols: Symbols,
) -> Kernel:  # fmt: skip
    members: tuple[Number, ...] = (
        *_sizes(y),
        *_operand(a, y),
        *_operand(b, y),
        a_zero_point,
        float(np.float32(a_m)),
        *image(y),
        *margin(y, numbers.zero_point),
        *requantize(numbers),
    )
    launch = Launch("elementwise.cuh", f"binary<qcompile::{operation}>", "Binary", ("a", "b"), members, each(words(y)))
    return kernel(name, [launch], {"a": (a.size, "int8"), "b": (b.size, "int8")}, (y.size, "int8"), {}, symbols)


def add(
    a: Layout,
    b: Layout,
    y: Layout,
    a_zero_point: int,
    a_m: float,
    b_zero_point: int,
    b_m: float,
    numbers: Requantize,
    gpu: Gpu,
    symbols: Symbols = (),
) -> Kernel:
    """The kernel of an addition; subtraction is the same with -b_m."""
    numbers = replace(numbers, other_m=b_m, other_zero_point=b_zero_point)
    return _binary("add", "Add", a, b, y, a_zero_point, a_m, numbers, symbols)


def mul(
    a: Layout,
    b: Layout,
    y: Layout,
    a_zero_point: int,
    b_zero_point: int,
    m: float,
    numbers: Requantize,
    gpu: Gpu,
    symbols: Symbols = (),
) -> Kernel:
    """The kernel of a multiplication."""
    numbers = replace(numbers, other_zero_point=b_zero_point)
    return _binary("mul", "Multiply", a, b, y, a_zero_point, m, numbers, symbols)


def lookup(x: Layout, y: Layout, table: np.ndarray, zero_point: int, gpu: Gpu, symbols: Symbols = ()) -> Kernel:
    """The kernel of a 256-entry table, or one table per channel."""
    tables = table.reshape(-1, 256)
    members = (
        *_sizes(y),
        len(tables),
        int(table.ndim == 2),
        *image(x),
        *image(y),
        *margin(y, zero_point),
    )
    launch = Launch("elementwise.cuh", "lookup", "Lookup", ("x", "table"), members, each(words(y)))
    constants = {"table": tables.astype(np.int8).reshape(-1)}
    return kernel("lookup", [launch], {"x": (x.size, "int8")}, (y.size, "int8"), constants, symbols)


def max_pool(
    x: Layout,
    y: Layout,
    window: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    zero_point: int,
    gpu: Gpu,
    symbols: Symbols = (),
) -> Kernel:
    """The kernel of a maximum over windows."""
    geometry = (*window, *stride, *padding, *dilation)
    members = (*_sizes(y), *geometry, *image(x), *image(y), *margin(y, zero_point))
    launch = Launch("pool.cuh", "max_pool", "Pool", ("x",), members, each(words(y)))
    name = f"max_pool{window[0]}x{window[1]}"
    return kernel(name, [launch], {"x": (x.size, "int8")}, (y.size, "int8"), {}, symbols)


def average_pool(
    x: Layout,
    y: Layout,
    rows: np.ndarray,
    columns: np.ndarray,
    m: np.ndarray,
    x_zero_point: int,
    zero_point: int,
    gpu: Gpu,
    symbols: Symbols = (),
) -> Kernel:
    """The kernel of an average over windows that are given by their first, and one past their last, row and column."""
    members = (
        *_sizes(y),
        x_zero_point,
        *image(x),
        *image(y),
        *margin(y, zero_point),
        *requantize(Requantize(zero_point)),
    )
    launch = Launch("pool.cuh", "average_pool", "Average", ("x", "rows", "columns", "m"), members, each(words(y)))
    constants = {
        "rows": rows.astype(np.int32).reshape(-1),
        "columns": columns.astype(np.int32).reshape(-1),
        "m": m.astype(np.float32).reshape(-1),
    }
    return kernel("average_pool", [launch], {"x": (x.size, "int8")}, (y.size, "int8"), constants, symbols)
