"""Elementwise operators on activations: add (and subtract), multiply, table lookup.

add   r = fma(f32(b - b_zp), b_m, f32(a - a_zp) * a_m), then clamp, round, zero point
mul   acc = (a - a_zp) * (b - b_zp), then requantize
lookup  one byte per value; the table is stored in the order and type that activations are
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from qcompile.targets.base import InstructionSet
from qcompile.targets.cpu import epilogue
from qcompile.targets.cpu.emit import llvm, load, parallel, splat, store, widen
from qcompile.targets.function import Kernel, function
from qcompile.targets.layout import Dim, Layout, align

SMALL = 1 << 14  # elements; below this a thread-pool launch costs more than it saves


def launch(extent: Dim, elements: Dim) -> Any:
    """A parallel loop over `extent` tasks unless the work is small."""
    return T.serial(0, extent) if isinstance(elements, int) and elements < SMALL else parallel(extent)


def _extents(layout: Layout) -> tuple[Dim, Dim, Dim, int]:
    return (*layout.extents, layout.channels)


def at(layout: Layout, out: Layout, n: Any, h: Any, w: Any, c: Any) -> tuple[Any, bool]:
    """The position of an operand's element for output element (n, h, w, c), broadcasting extents of one;
    and whether the operand has a single channel that is repeated."""
    mine, theirs = _extents(layout), _extents(out)
    index = [0 if isinstance(extent, int) and extent == 1 else i for extent, i in zip(mine, (n, h, w, c), strict=True)]
    repeated = mine[3] == 1 and theirs[3] != 1
    return layout.offset(*index), repeated


def _binary(
    name: str,
    a: Layout,
    b: Layout,
    y: Layout,
    isa: InstructionSet,
    symbols: tuple[tirx.Var, ...],
    constants: tuple[np.ndarray, np.ndarray],
    compute: Callable[[Any, Any, Any, Any], Any],
) -> Kernel:
    """`compute(a, b, integers, floats)` on vectors of stored values."""
    lanes = isa.lanes
    batch, height, width = y.extents
    vectors = align(y.channels, lanes) // lanes
    one_line = isinstance(batch * height, int) and batch * height == 1
    with function(name) as (args, done):
        buffers = (args.buffer("a", a.size, isa.storage), args.buffer("b", b.size, isa.storage))
        integers, floats = args.constants(integers=constants[0], floats=constants[1])
        args.symbols(symbols)
        out = args.buffer("y", y.size, isa.storage)

        def pixel(n: Any, h: Any, w: Any) -> None:
            with T.serial(0, vectors) as v:
                operands: list[Any] = []
                for buffer, layout in zip(buffers, (a, b), strict=True):
                    position, repeated = at(layout, y, n, h, w, v * lanes)
                    value = splat(buffer[position], lanes) if repeated else load(buffer, position, lanes)
                    operands.append(value)
                store(out, y.offset(n, h, w, v * lanes), compute(operands[0], operands[1], integers, floats), lanes)

        with launch(width if one_line else batch * height, y.size) as i:
            if one_line:
                pixel(0, 0, i)
            else:
                with T.serial(0, width) as w:
                    pixel(T.floordiv(i, height), T.floormod(i, height), w)
        epilogue.fill_halo(out, y, integers, isa)
    return Kernel(name, done.result, constants)


def add(
    a: Layout,
    b: Layout,
    y: Layout,
    a_zero_point: int,
    a_m: float,
    b_zero_point: int,
    b_m: float,
    numbers: epilogue.Requantize,
    isa: InstructionSet,
    symbols: tuple[tirx.Var, ...] = (),
) -> Kernel:
    """The kernel of an addition; subtraction is the same with -b_m."""
    lanes = isa.lanes

    def compute(left: Any, right: Any, integers: Any, floats: Any) -> Any:
        product = epilogue.centre(left, integers[2], lanes) * splat(floats[3], lanes)
        other = epilogue.centre(right, integers[1], lanes)
        real = llvm("float32", lanes, "llvm.fma", other, splat(floats[2], lanes), product)
        return epilogue.finish(real, integers, floats, isa, lanes)

    integers, floats = numbers.integers(isa), numbers.floats()
    integers[1:3] = b_zero_point + isa.offset, a_zero_point + isa.offset
    floats[2:4] = np.float32(b_m), np.float32(a_m)
    return _binary("add", a, b, y, isa, symbols, (integers, floats), compute)


def mul(
    a: Layout,
    b: Layout,
    y: Layout,
    a_zero_point: int,
    b_zero_point: int,
    m: float,
    numbers: epilogue.Requantize,
    isa: InstructionSet,
    symbols: tuple[tirx.Var, ...] = (),
) -> Kernel:
    """The kernel of a multiplication."""
    lanes = isa.lanes

    def compute(left: Any, right: Any, integers: Any, floats: Any) -> Any:
        factors = [widen(stored, "int32", lanes) - splat(integers[i], lanes) for stored, i in ((left, 2), (right, 1))]
        return epilogue.requantize(factors[0] * factors[1], splat(floats[3], lanes), integers, floats, isa, lanes)

    integers, floats = numbers.integers(isa), numbers.floats()
    integers[1:3] = b_zero_point + isa.offset, a_zero_point + isa.offset
    floats[3] = np.float32(m)
    return _binary("mul", a, b, y, isa, symbols, (integers, floats), compute)


def lookup(
    x: Layout, y: Layout, table: np.ndarray, zero_point: int, isa: InstructionSet, symbols: tuple[tirx.Var, ...] = ()
) -> Kernel:
    """The kernel of a 256-entry table, or one table per channel; `table` int8 (256,) or (C, 256).

    `zero_point` fills the halo.
    """
    per_channel = table.ndim == 2
    stored = (table.astype(np.int16) + isa.offset).astype(isa.storage).reshape(-1)
    batch, height, width = y.extents
    one_line = isinstance(batch * height, int) and batch * height == 1
    integers = epilogue.Requantize(zero_point).integers(isa)
    with function("lookup") as (args, done):
        source = args.buffer("x", x.size, isa.storage)
        entries, numbers = args.constants(table=stored, integers=integers)
        args.symbols(symbols)
        out = args.buffer("y", y.size, isa.storage)

        def pixel(n: Any, h: Any, w: Any) -> None:
            with T.serial(0, y.channels) as c:
                value = T.cast(source[x.offset(n, h, w, c)], "int32") + (128 - isa.offset)
                entry = entries[value + c * 256] if per_channel else entries[value]
                T.buffer_store(out, entry, [y.offset(n, h, w, c)])

        with launch(width if one_line else batch * height, y.size) as i:
            if one_line:
                pixel(0, 0, i)
            else:
                with T.serial(0, width) as w:
                    pixel(T.floordiv(i, height), T.floormod(i, height), w)
        epilogue.fill_halo(out, y, numbers, isa)
    return Kernel("lookup", done.result, (stored, integers))
