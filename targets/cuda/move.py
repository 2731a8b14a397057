"""Moving values between layouts, and in and out of float. Arguments are those of the kernels for CPUs."""

from __future__ import annotations

import numpy as np
from tvm import tirx

from qcompile.targets.cpu.epilogue import Requantize
from qcompile.targets.cuda.launch import Launch, Long, Number, each, image, kernel, margin, requantize
from qcompile.targets.function import Kernel
from qcompile.targets.layout import NO_HALO, Dim, Layout, dense, product
from qcompile.targets.nvidia import Gpu
from qcompile.targets.take import Take, identity

Symbols = tuple[tirx.Var, ...]
_RANK = 6  # dimensions of Move
_C_TYPES = {1: "int8_t", 2: "int16_t", 4: "float", 8: "double"}  # to copy elements of so many bytes


def _unit(rank: int, dim: int) -> tuple[int, ...]:
    return tuple(int(d == dim) for d in range(rank))


def _move(
    x_name: str,
    x: Layout,
    y: Layout,
    take: tuple[Take, ...],
    convert: tuple[str, str, str],
    zero_point: int,
    place: tuple[int, ...] | None = None,
    shape: tuple[Dim, ...] | None = None,
    x_zero_point: int = 0,
    factor: float = 1.0,
) -> Launch:
    """y[place + index] = convert(x[take(index)]) for every index of `shape` (default: all of y). `convert`: the C types
    of x and y, and the struct that converts; `zero_point`: of y."""
    shape = y.shape if shape is None else shape
    rank = len(shape)
    if rank > _RANK:
        raise NotImplementedError(f"it has {rank} dimensions, and kernels for GPUs know {_RANK}")
    start = place or (0,) * rank
    origin = tuple(t.start for t in take)
    from_first, to_first = x.position(origin), y.position(start)
    from_steps, to_steps = [], []
    for dim in range(rank):
        moved = tuple(t.start + t.step if t.dim == dim else t.start for t in take)
        from_steps.append(x.position(moved) - from_first)
        to_steps.append(y.position(tuple(s + u for s, u in zip(start, _unit(rank, dim), strict=True))) - to_first)
    order = sorted(range(rank), key=lambda d: d == _inner(y))  # neighbouring threads write neighbours
    ones = _RANK - rank
    members: tuple[Number, ...] = (
        *(1,) * ones,
        *[shape[d] for d in order],
        *(0,) * ones,
        *[from_steps[d] for d in order],
        *(0,) * ones,
        *[to_steps[d] for d in order],
        from_first,
        to_first,
        *image(y),
        *margin(y, zero_point),
        x_zero_point,
        float(np.float32(factor)),
        *requantize(Requantize(zero_point)),
    )
    function = f"move<{convert[0]}, {convert[1]}, qcompile::{convert[2]}>"
    return Launch("move.cuh", function, "Move", (x_name,), members, each(product(tuple(shape))))


def _inner(layout: Layout) -> int:
    rank = len(layout.shape)
    return 1 if layout.channels_last and rank > 1 else rank - 1


def gather(
    x: Layout,
    y: Layout,
    take: tuple[Take, ...],
    types: tuple[str, str],
    zero_point: int,
    gpu: Gpu,
    symbols: Symbols = (),
    place: tuple[int, ...] | None = None,
    fill_value: int | None = None,
) -> Kernel:
    """The kernel y[place + index] = x[take(index)]; what no index reaches holds `fill_value`, the halo `zero_point`."""
    launches = []
    if fill_value is not None:
        launches.append(Launch("move.cuh", "fill", "Fill", (), (Long(y.size), fill_value), each(y.size)))
    shape = None if fill_value is None else x.shape
    launches.append(_move("x", x, y, take, ("int8_t", "int8_t", "Same"), zero_point, place, shape))
    return kernel("gather", launches, {"x": (x.size, "int8")}, (y.size, "int8"), {}, symbols)


def copied(shape: tuple[Dim, ...], dtype: str) -> Kernel:
    """The kernel y = x, dense."""
    flat = dense((product(shape),))
    c_type = _C_TYPES[np.dtype(dtype).itemsize]
    launch = _move("x", flat, flat, identity(flat.shape, flat.shape), (c_type, c_type, "Same"), 0)
    return kernel("copy", [launch], {"x": (flat.size, dtype)}, (flat.size, dtype))


def cat(
    xs: tuple[Layout, ...],
    y: Layout,
    zero_points: list[int],
    ms: list[float],
    dim: int,
    zero_point: int,
    gpu: Gpu,
    symbols: Symbols = (),
) -> Kernel:
    """The kernel that writes each input, requantized, to its place along `dim` (not symbolic)."""
    launches, place, rank = [], 0, len(y.shape)
    for i, x in enumerate(xs):
        same = ms[i] == 1.0 and zero_points[i] == zero_point
        start = tuple(place if d == dim % rank else 0 for d in range(rank))
        convert = ("int8_t", "int8_t", "Same" if same else "Rescaled")
        take = tuple(Take(d) for d in range(rank))
        launches.append(_move(f"x{i}", x, y, take, convert, zero_point, start, x.shape, zero_points[i], ms[i]))
        place += int(x.shape[dim])
    return kernel("cat", launches, {f"x{i}": (x.size, "int8") for i, x in enumerate(xs)}, (y.size, "int8"), {}, symbols)


def quantize(
    x: Layout, dtype: str, y: Layout, inv_scale: float, zero_point: int, gpu: Gpu, symbols: Symbols = ()
) -> Kernel:
    """The kernel float32 activation -> stored activation."""
    _only_float32(dtype)
    inputs, output = {"x": (x.size, dtype)}, (y.size, "int8")
    numbers = Requantize(zero_point)
    if x.channels_last or len(x.shape) != 4 or not y.channels_last or y.pitch != 4:
        take = tuple(Take(d) for d in range(len(x.shape)))
        launch = _move("x", x, y, take, ("float", "int8_t", "Quantized"), zero_point, factor=inv_scale)
        return kernel("quantize", [launch], inputs, output, {}, symbols)
    members = (
        y.extents[0],
        y.channels,
        float(np.float32(inv_scale)),
        *image(y),
        *margin(y, zero_point),
        *requantize(numbers),
    )
    launch = Launch("move.cuh", "quantize_planes", "Planes", ("x",), members, each(product(y.extents)))
    return kernel("quantize", [launch], inputs, output, {}, symbols)


def dequantize(
    x: Layout, scale: float, zero_point: int, y: Layout, dtype: str, gpu: Gpu, symbols: Symbols = ()
) -> Kernel:
    """The kernel stored activation -> float32 activation."""
    _only_float32(dtype)
    assert y.halo == NO_HALO
    take = tuple(Take(d) for d in range(len(x.shape)))
    launch = _move("x", x, y, take, ("int8_t", "float", "Dequantized"), 0, x_zero_point=zero_point, factor=scale)
    return kernel("dequantize", [launch], {"x": (x.size, "int8")}, (y.size, dtype), {}, symbols)


def _only_float32(dtype: str) -> None:
    if dtype != "float32":
        raise NotImplementedError(f"activations of {dtype} have no kernels for GPUs")
