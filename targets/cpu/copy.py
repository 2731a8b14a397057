"""Moving values between layouts, and in and out of float: reformat, cat, quantize, dequantize.

One generator walks the logical indices; where both sides have their channels innermost it moves
vectors of channels, else one value at a time. Quantizing an image of up to four channels, the usual
input of a network, has a path of its own: it reads each float plane by vectors of pixels and writes
the interleaved bytes of whole pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from qcompile.targets.base import InstructionSet
from qcompile.targets.cpu import epilogue
from qcompile.targets.cpu.elementwise import launch
from qcompile.targets.cpu.emit import fill, llvm, load, splat, store, vector_type, widen
from qcompile.targets.cpu.real import clear_halo, narrow, to_real
from qcompile.targets.function import Kernel, function
from qcompile.targets.layout import Dim, Layout, product
from qcompile.targets.take import Take, identity

Convert = Callable[[Any, int], Any]  # (value, lanes) -> value of the destination's type


def _chunks(extent: int, widest: int) -> Iterator[tuple[int, int, int]]:
    """(start, lanes, repeats) that cover `extent` exactly with vectors no wider than `widest`."""
    start, lanes = 0, widest
    while start < extent:
        while lanes > extent - start:
            lanes //= 2
        repeats = (extent - start) // lanes
        yield start, lanes, repeats
        start += lanes * repeats


def _walk(shape: tuple[Dim, ...], inner: int, widest: int, body: Callable[[tuple[Any, ...], int], None]) -> None:
    """Call `body(index, lanes)` for every logical index, vectors along dimension `inner`."""
    if any(isinstance(extent, int) and extent == 0 for extent in shape):
        return
    order = [d for d in range(len(shape)) if d != inner]
    outer, rest = order[:2], order[2:]
    tasks = product(tuple(shape[d] for d in outer))

    def nest(dims: list[int], index: dict[int, Any]) -> None:
        if dims:
            with T.serial(0, shape[dims[0]]) as i:
                nest(dims[1:], {**index, dims[0]: i})
        elif not isinstance(shape[inner], int):
            with T.serial(0, shape[inner]) as i:
                body(tuple({**index, inner: i}[d] for d in range(len(shape))), 1)
        else:
            for start, lanes, repeats in _chunks(shape[inner], widest):
                with T.serial(0, repeats) as i:
                    full = {**index, inner: start + i * lanes}
                    body(tuple(full[d] for d in range(len(shape))), lanes)

    with launch(tasks, product(shape)) as task:
        index: dict[int, Any] = {}
        if len(outer) == 2:
            index = {outer[0]: T.floordiv(task, shape[outer[1]]), outer[1]: T.floormod(task, shape[outer[1]])}
        elif outer:
            index = {outer[0]: task}
        nest(rest, index)


def _inner_dim(layout: Layout) -> int:
    rank = len(layout.shape)
    return 1 if layout.channels_last and rank > 1 else rank - 1


def move(
    x_buffer: Any,
    x: Layout,
    y_buffer: Any,
    y: Layout,
    take: tuple[Take, ...],
    convert: Convert,
    widest: int,
    place: tuple[int, ...] | None = None,
    shape: tuple[Dim, ...] | None = None,
) -> None:
    """Emit y[place + index] = convert(x[take(index)]) for every index of `shape` (default: all of y)."""
    shape = y.shape if shape is None else shape
    if not shape:
        store(y_buffer, 0, convert(x_buffer[x.position(tuple(t.start for t in take))], 1), 1)
        return
    inner = _inner_dim(y)
    along = [d for d, t in enumerate(take) if t.dim == inner]
    repeated = not along
    contiguous = repeated or (along == [_inner_dim(x)] and take[along[0]].step == 1)

    def body(index: tuple[Any, ...], lanes: int) -> None:
        source = tuple(t.start if t.dim is None else t.start + index[t.dim] * t.step for t in take)
        value = load(x_buffer, x.position(source), 1 if repeated else lanes)
        target = index if place is None else tuple(i + s for i, s in zip(index, place, strict=True))
        store(y_buffer, y.position(target), convert(splat(value, lanes) if repeated else value, lanes), lanes)

    _walk(shape, inner, widest if contiguous else 1, body)


def gather(
    x: Layout,
    y: Layout,
    take: tuple[Take, ...],
    types: tuple[str, str],
    zero_point: int,
    isa: InstructionSet,
    symbols: tuple[tirx.Var, ...] = (),
    place: tuple[int, ...] | None = None,
    fill_value: int | None = None,
) -> Kernel:
    """The kernel y[place + index] = x[take(index)]: slices, permutations, repetition, padding, changes of
    layout. `types` are those of x and y: the stored type, or int8 at the border of the graph. With
    `fill_value` (int8), what no index reaches holds it; then `place` says where x goes. `zero_point` fills
    the halo."""
    integers = epilogue.Requantize(zero_point).integers(isa)
    before, after = (isa.offset if t == isa.storage else 0 for t in types)

    def convert(value: Any, lanes: int) -> Any:
        if before == after:
            return value
        return widen(widen(value, "int32", lanes) + splat(T.int32(after - before), lanes), types[1], lanes)

    with function("gather") as (args, done):
        source = args.window("x", x.size, types[0])
        (numbers,) = args.constants(integers=integers)
        args.symbols(symbols)
        out = args.buffer("y", y.size, types[1])
        if fill_value is not None:
            with T.serial(0, y.size) as i:
                T.buffer_store(out, T.cast(T.int32(fill_value + after), types[1]), [i])
        move(source, x, out, y, take, convert, 16, place, None if fill_value is None else x.shape)
        epilogue.fill_halo(out, y, numbers, isa)
    return Kernel("gather", done.result, (integers,))


def copied(shape: tuple[Dim, ...], dtype: str) -> Kernel:
    """The kernel y = x, dense."""
    with function("copy") as (args, done):
        x, y = (args.buffer(name, product(shape), dtype) for name in ("x", "y"))
        with T.serial(0, product(shape)) as i:
            T.buffer_store(y, x[i], [i])
    return Kernel("copy", done.result)


def joined(count: int, size: int, dtype: str) -> Kernel:
    """The kernel that lays `count` arrays of `size` elements end to end."""
    with function("join") as (args, done):
        parts = [args.buffer(f"x{i}", size, dtype) for i in range(count)]
        y = args.buffer("y", count * size, dtype)
        with launch(size, y.shape[0]) as i:
            for place, part in enumerate(parts):
                T.buffer_store(y, part[i], [place * size + i])
    return Kernel("join", done.result)


def cat(
    xs: tuple[Layout, ...],
    y: Layout,
    zero_points: list[int],
    ms: list[float],
    dim: int,
    zero_point: int,
    isa: InstructionSet,
    symbols: tuple[tirx.Var, ...] = (),
) -> Kernel:
    """The kernel that writes each input, requantized, to its place along `dim` (not symbolic)."""
    integers = epilogue.Requantize(zero_point).integers(isa, np.asarray(zero_points) + isa.offset)
    floats = epilogue.Requantize(zero_point).floats(np.asarray(ms, np.float32))
    with function("cat") as (args, done):
        sources = [args.buffer(f"x{i}", x.size, isa.storage) for i, x in enumerate(xs)]
        ints, reals = args.constants(integers=integers, floats=floats)
        args.symbols(symbols)
        out = args.buffer("y", y.size, isa.storage)
        place = 0
        for i, (source, x) in enumerate(zip(sources, xs, strict=True)):

            def convert(value: Any, lanes: int, i: int = i) -> Any:
                if ms[i] == 1.0 and zero_points[i] == zero_point:
                    return value  # the same scale: requantizing is the identity
                acc = widen(value, "int32", lanes) - splat(ints[epilogue.HEAD + i], lanes)
                return epilogue.requantize(acc, splat(reals[epilogue.HEAD + i], lanes), ints, reals, isa, lanes)

            start = tuple(place if d == dim % len(y.shape) else 0 for d in range(len(y.shape)))
            move(source, x, out, y, identity(x.shape, x.shape), convert, isa.lanes, start, x.shape)
            place += int(x.shape[dim])
        epilogue.fill_halo(out, y, ints, isa)
    return Kernel("cat", done.result, (integers, floats))


def _to_int(value: Any, inv_scale: Any, ints: Any, reals: Any, lanes: int) -> Any:
    """float32 -> int32 of the stored value: NaN becomes the zero point."""
    real = value * splat(inv_scale, lanes)
    # By its bits: a comparison of a value with itself would be simplified away.
    bits = T.bitwise_and(T.reinterpret(vector_type("int32", lanes), value), splat(T.int32(0x7FFFFFFF), lanes))
    real = T.Select(bits > splat(T.int32(0x7F800000), lanes), splat(T.float32(0), lanes), real)
    clamped = T.min(T.max(real, splat(reals[0], lanes)), splat(reals[1], lanes))
    return llvm("int32", lanes, "llvm.lrint", clamped) + splat(ints[0], lanes)


def moved(x: Layout, y: Layout, types: tuple[str, str], symbols: tuple[tirx.Var, ...] = ()) -> Kernel:
    """The kernel y = x of real numbers: in another layout and perhaps type. Zero in the halo, and beyond the channels
    of x."""

    def convert(value: Any, lanes: int) -> Any:
        return value if types[0] == types[1] else narrow(to_real(value, types[0], lanes), types[1], lanes)

    with function("move") as (args, done):
        source = args.buffer("x", x.size, types[0])
        args.symbols(symbols)
        out = args.buffer("y", y.size, types[1])
        clear(out, y, types[1])
        move(source, x, out, y, identity(x.shape, y.shape), convert, 16)
    return Kernel("move", done.result)


def clear(buffer: Any, layout: Layout, dtype: str) -> None:
    """Zeros where no real value will be written."""
    channels = layout.shape[_inner_dim(layout)] if layout.shape else 1
    if str(channels) == str(layout.pitch):  # either may be an expression
        clear_halo(buffer, layout, dtype)
    else:
        fill(buffer, 0, layout.size, T.cast(T.int32(0), dtype))


def quantize(
    x: Layout,
    dtype: str,
    y: Layout,
    inv_scale: float,
    zero_point: int,
    isa: InstructionSet,
    symbols: tuple[tirx.Var, ...] = (),
) -> Kernel:
    """The kernel real activation (`dtype`: how it is stored) -> stored activation."""
    numbers = epilogue.Requantize(zero_point)
    integers, floats = numbers.integers(isa), numbers.floats()
    floats[3] = np.float32(inv_scale)
    with function("quantize") as (args, done):
        source = args.window("x", x.size, dtype)
        ints, reals = args.constants(integers=integers, floats=floats)
        args.symbols(symbols)
        out = args.buffer("y", y.size, isa.storage)
        planes = not x.channels_last and dtype == "float32" and len(x.shape) == 4 and isinstance(x.shape[3], int)
        if planes and y.channels_last and y.pitch <= 4:
            _interleave(source, x.shape, out, y, ints, reals, isa)
        else:

            def convert(value: Any, lanes: int) -> Any:
                real = to_real(value, dtype, lanes)
                return widen(_to_int(real, reals[3], ints, reals, lanes), isa.storage, lanes)

            move(source, x, out, y, identity(x.shape, x.shape), convert, isa.lanes)
        epilogue.fill_halo(out, y, ints, isa)
    return Kernel("quantize", done.result, (integers, floats))


def _interleave(
    source: Any, shape: tuple[Dim, ...], out: Any, y: Layout, ints: Any, reals: Any, isa: InstructionSet
) -> None:
    """Float planes -> pixels of up to four bytes: the channels of a pixel are the low bytes of one int32."""
    batch, channels, height, width = shape
    with launch(batch * height, y.size) as line:
        n, h = T.floordiv(line, height), T.floormod(line, height)
        for start, lanes, repeats in _chunks(width, isa.lanes):
            with T.serial(0, repeats) as i:
                w = start + i * lanes
                word = splat(T.int32(0), lanes)
                for c in range(channels):
                    plane = ((n * channels + c) * height + h) * width + w
                    byte = _to_int(load(source, plane, lanes), reals[3], ints, reals, lanes)
                    byte = T.bitwise_and(byte, splat(T.int32(255), lanes))
                    word = T.bitwise_or(word, T.shift_left(byte, splat(T.int32(8 * c), lanes)))
                pixels = T.reinterpret(vector_type(isa.storage, 4 * lanes), word)
                if y.pitch < 4:
                    kept = [4 * pixel + c for pixel in range(lanes) for c in range(y.pitch)]
                    pixels = T.Shuffle([pixels], kept)
                store(out, y.offset(n, h, w, 0), pixels, y.pitch * lanes)


def dequantize(
    x: Layout,
    scale: float,
    zero_point: int,
    y: Layout,
    dtype: str,
    isa: InstructionSet,
    symbols: tuple[tirx.Var, ...] = (),
) -> Kernel:
    """The kernel stored activation -> real activation (`dtype`: how it is stored)."""
    numbers = epilogue.Requantize(zero_point)
    integers, floats = numbers.integers(isa), numbers.floats()
    floats[3] = np.float32(scale)
    with function("dequantize") as (args, done):
        source = args.buffer("x", x.size, isa.storage)
        ints, reals = args.constants(integers=integers, floats=floats)
        args.symbols(symbols)
        out = args.buffer("y", y.size, dtype)

        def convert(value: Any, lanes: int) -> Any:
            return narrow(epilogue.centre(value, ints[0], lanes) * splat(reals[3], lanes), dtype, lanes)

        clear(out, y, dtype)
        move(source, x, out, y, identity(x.shape, x.shape), convert, isa.lanes)
    return Kernel("dequantize", done.result, (integers, floats))
