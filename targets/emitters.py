"""One emitter per integer operator: reads the node's arguments, asks for its inputs in the layout the
kernel wants, and defines the node. Emitters know nothing of instruction sets; kernels know nothing of graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx
from tvm import tirx

from qcompile.ops.pool import adaptive_windows, window_counts
from qcompile.targets.base import Target
from qcompile.targets.cpu.emitters_linear import FLOAT_LINEAR
from qcompile.targets.cpu.epilogue import Requantize
from qcompile.targets.cpu.float_emitters import FLOAT_EMITTERS
from qcompile.targets.filters import ConvShape, Filters
from qcompile.targets.layout import Layout, align, dense
from qcompile.targets.lowering import Lowering, Value
from qcompile.targets.nvidia import Gpu
from qcompile.targets.plan import PITCH, padding_of, takes_tight
from qcompile.targets.real_lower import define_real, layout_of
from qcompile.targets.real_plan import PlannedReal
from qcompile.targets.take import Take, identity

q, aten = torch.ops.qcompile, torch.ops.aten
Emitter = Callable[[Lowering, fx.Node], None]


def _residual(low: Lowering, node: fx.Node, channels_last: bool) -> tuple[list[Value], dict[str, Any]]:
    other = node.kwargs.get("residual")
    if not isinstance(other, fx.Node):
        return [], {}
    numbers = {
        "other_zero_point": node.kwargs.get("residual_zero_point", 0),
        "other_m": node.kwargs.get("residual_m", 0.0),
    }
    return [low.use(other, channels_last)], numbers


def _convolution(low: Lowering, node: fx.Node) -> None:
    a: Any = node.args
    two = node.target is q.conv2d.default
    weight = low.tensor(a[1])
    weight = weight if two else weight[:, :, None]
    stride, dilation = (tuple(v) if two else (1, v) for v in (a[8], a[10]))
    groups, halo = a[11], padding_of(node)
    residual, numbers = _residual(low, node, True)
    x = low.use(a[0], True, halo, fill=a[4], pitch=4 if groups == 1 else PITCH, tight=takes_tight(node))
    assert x.layout is not None
    shape = ConvShape(
        x.layout,
        low.layout(node),
        residual[0].layout if residual else None,
        tuple(weight.shape[2:]),
        stride,
        (halo[0], halo[2]),
        dilation,
        groups,
    )
    requantize = Requantize(a[5], a[6], a[7], **numbers)
    filters = Filters(weight, low.tensor(a[2]), low.tensor(a[3]), a[4])
    low.define_tuned(node, low.kernels.generator_for(shape, low.target.isa), shape, filters, requantize, [x, *residual])


def _linear(low: Lowering, node: fx.Node) -> None:
    a: Any = node.args
    residual, numbers = _residual(low, node, False)
    x = low.use(a[0], False)
    assert x.layout is not None
    filters = Filters(low.tensor(a[1])[:, :, None, None], low.tensor(a[2]), low.tensor(a[3]), a[4])
    other = residual[0].layout if residual else None
    shape = ConvShape(x.layout, low.layout(node), other, (1, 1), (1, 1), (0, 0), (1, 1), 1)
    requantize = Requantize(a[5], a[6], a[7], **numbers)
    low.define_tuned(node, low.kernels.generator_for(shape, low.target.isa), shape, filters, requantize, [x, *residual])


def _operand(low: Lowering, node: fx.Node, operand: fx.Node) -> Value:
    """An elementwise operand in the kind of layout of the result, its rank made equal and its broadcast
    one that the kernel understands."""
    out = low.layout(node)
    value = low.use(operand, out.channels_last)
    assert value.layout is not None
    shape = value.layout.shape
    if len(shape) < len(out.shape):
        plain = low.dense(operand)
        shape = (1,) * (len(out.shape) - len(shape)) + tuple(shape)
        value = Value(plain.expr, Layout(shape, False, shape[-1]), plain.dtype)
        channels = int(shape[1] if out.channels_last else shape[-1])
        wanted = Layout(shape, out.channels_last, align(channels, PITCH))
        value = low.copy(operand, value, wanted, 0)
    assert value.layout is not None
    leading = value.layout.shape[:-1]
    same = all(str(a) == str(b) for a, b in zip(leading, out.shape[:-1], strict=True))
    if not out.channels_last and not same and any(not (isinstance(d, int) and d == 1) for d in leading):
        repeated = Layout((*out.shape[:-1], value.layout.shape[-1]), False, value.layout.pitch)
        value = low.copy(operand, value, repeated, 0)
    return value


def _layouts(values: list[Value]) -> list[Layout]:
    return [v.layout for v in values if v.layout is not None]


def _add(low: Lowering, node: fx.Node) -> None:
    a: Any = node.args
    values = [_operand(low, node, operand) for operand in a[:2]]
    left, right = _layouts(values)
    kernel = low.kernels.add(
        left,
        right,
        low.layout(node),
        a[2],
        a[3],
        a[4],
        a[5],
        Requantize(a[6], a[7], a[8]),
        low.target.isa,
        low.symbol_args,
    )
    low.define(node, kernel, values)


def _mul(low: Lowering, node: fx.Node) -> None:
    a: Any = node.args
    values = [_operand(low, node, operand) for operand in a[:2]]
    left, right = _layouts(values)
    kernel = low.kernels.mul(
        left,
        right,
        low.layout(node),
        a[2],
        a[3],
        a[4],
        Requantize(a[5], a[6], a[7]),
        low.target.isa,
        low.symbol_args,
    )
    low.define(node, kernel, values)


def _lookup(low: Lowering, node: fx.Node) -> None:
    x: Any = node.args[0]
    table = low.tensor(node.args[1])  # type: ignore[arg-type]
    value = low.use(x, low.layout(node).channels_last)
    if table.ndim == 2 and len(low.shape(node)) not in (2, 3, 4):
        raise low.error(node, "a table per channel needs a 2-d, 3-d or 4-d activation")
    (layout,) = _layouts([value])
    kernel = low.kernels.lookup(layout, low.layout(node), table, low.fill(node), low.target.isa, low.symbol_args)
    low.define(node, kernel, [value])


def _cat(low: Lowering, node: fx.Node) -> None:
    xs, zero_points, ms, dim, zero_point = node.args
    values = [low.use(x, low.layout(node).channels_last) for x in xs]  # type: ignore[union-attr,arg-type]
    dim = int(dim) % len(low.shape(node))  # type: ignore[arg-type]
    if not all(isinstance(v.layout.shape[dim], int) for v in values if v.layout):
        raise low.error(node, "it concatenates along a dynamic dimension")
    kernel = low.kernels.cat(
        tuple(_layouts(values)),
        low.layout(node),
        list(zero_points),  # type: ignore[arg-type]
        list(ms),  # type: ignore[arg-type]
        dim,
        int(zero_point),  # type: ignore[arg-type]
        low.target.isa,
        low.symbol_args,
    )
    low.define(node, kernel, values)


def _max_pool2d(low: Lowering, node: fx.Node) -> None:
    a: Any = node.args
    value = low.use(a[0], True)
    (layout,) = _layouts([value])
    kernel_size, stride, padding, dilation = (tuple(v) for v in a[1:5])
    kernel = low.kernels.max_pool(
        layout,
        low.layout(node),
        kernel_size,
        stride,
        padding,
        dilation,
        low.fill(node),
        low.target.isa,
        low.symbol_args,
    )
    low.define(node, kernel, [value])


def _image(low: Lowering, node: fx.Node) -> tuple[int, int]:
    height, width = low.shape(node)[2:]
    if not (isinstance(height, int) and isinstance(width, int)):
        raise low.error(node, "its image size is dynamic")
    return height, width


def _average(
    low: Lowering,
    node: fx.Node,
    windows: list[np.ndarray],
    counts: np.ndarray,
    x_zero_point: int,
    ratio: float,
    zp: int,
) -> None:
    """`windows`: per axis the (begin, end) of each window inside the image; `counts` (OH, OW): the divisors."""
    value = low.use(node.args[0], True)  # type: ignore[arg-type]
    (layout,) = _layouts([value])
    m = (np.float64(ratio) / counts.astype(np.float64)).astype(np.float32)
    rows, columns = (w.astype(np.int32) for w in windows)
    kernel = low.kernels.average_pool(
        layout, low.layout(node), rows, columns, m, x_zero_point, zp, low.target.isa, low.symbol_args
    )
    low.define(node, kernel, [value])


def _avg_pool2d(low: Lowering, node: fx.Node) -> None:
    x, x_zero_point, kernel, stride, padding, _ceil, include_pad, divisor, ratio, zero_point = node.args
    geometry = list(zip(_image(low, x), low.shape(node)[2:], kernel, stride, padding, strict=True))  # type: ignore[arg-type]
    windows = []
    for size, outputs, k, s, p in geometry:
        begin = np.arange(outputs) * s - p
        windows.append(np.stack([begin, begin + k], 1).clip(0, size))
    per_axis = [window_counts(*axis, include_pad).numpy() for axis in geometry]  # type: ignore[arg-type]
    counts = per_axis[0][:, None] * per_axis[1][None, :]
    counts = np.full_like(counts, divisor) if divisor is not None else counts
    _average(low, node, windows, counts, int(x_zero_point), float(ratio), int(zero_point))  # type: ignore[arg-type]


def _adaptive_avg_pool2d(low: Lowering, node: fx.Node) -> None:
    x, x_zero_point, sizes, ratio, zero_point = node.args
    axes = zip(_image(low, x), sizes, strict=True)  # type: ignore[arg-type]
    windows = [np.asarray(adaptive_windows(size, outputs)).reshape(-1, 2) for size, outputs in axes]
    extents = [w[:, 1] - w[:, 0] for w in windows]
    counts = extents[0][:, None] * extents[1][None, :]
    _average(low, node, windows, counts, int(x_zero_point), float(ratio), int(zero_point))  # type: ignore[arg-type]


def _quantize(low: Lowering, node: fx.Node) -> None:
    x, inv_scale, zero_point = node.args
    kernel = low.kernels.quantize(
        layout_of(low, x),  # type: ignore[arg-type]
        low.values[x].dtype,  # type: ignore[index]
        low.layout(node),
        float(inv_scale),  # type: ignore[arg-type]
        int(zero_point),  # type: ignore[arg-type]
        low.target.isa,
        low.symbol_args,
    )
    low.define(node, kernel, [low.values[x]])  # type: ignore[index]


def _dequantize(low: Lowering, node: fx.Node) -> None:
    x, scale, zero_point = node.args
    value = low.values[x]  # type: ignore[index]
    (layout,) = _layouts([value])
    real = low.planned_real.get(node) or PlannedReal(dense(layout.shape), "float32")
    kernel = low.kernels.dequantize(
        layout,
        float(scale),  # type: ignore[arg-type]
        int(zero_point),  # type: ignore[arg-type]
        real.layout,
        real.dtype,
        low.target.isa,
        low.symbol_args,
    )
    if node in low.planned_real:
        define_real(low, node, kernel, [value])
    else:
        low.define_real(node, kernel, [value])


# --- operators that only move values ----------------------------------------------------------------


def _view(low: Lowering, node: fx.Node) -> None:
    low.define_view(node, node.args[0])  # type: ignore[arg-type]


def _permute_with(order: Callable[[Any, int], list[int]]) -> Emitter:
    def emit(low: Lowering, node: fx.Node) -> None:
        x: Any = node.args[0]
        rank = len(low.shape(x))
        dims = [d % rank for d in order(node.args, rank)]
        take = [Take(None)] * rank
        for y_dim, x_dim in enumerate(dims):
            take[x_dim] = Take(y_dim)
        low.gather(node, x, tuple(take))

    return emit


def _swapped(args: Any, rank: int) -> list[int]:
    dims = list(range(rank))
    a, b = args[1] % rank, args[2] % rank
    dims[a], dims[b] = dims[b], dims[a]
    return dims


def _slice(low: Lowering, node: fx.Node) -> None:
    a: Any = node.args
    shape = low.shape(a[0])
    dim = (a[1] if len(a) > 1 else 0) % len(shape)
    start, step = a[2] if len(a) > 2 and a[2] is not None else 0, a[4] if len(a) > 4 else 1
    size = shape[dim]
    if isinstance(size, int):
        start = min(max(start + size if start < 0 else start, 0), size)
    elif start < 0:
        start = tirx.max(size + start, tirx.const(0, "int64"))
    take = tuple(Take(d, start, step) if d == dim else Take(d) for d in range(len(shape)))
    low.gather(node, a[0], take)


def _select(low: Lowering, node: fx.Node) -> None:
    x, dim, index = node.args[:3]
    shape = low.shape(x)  # type: ignore[arg-type]
    dim = int(dim) % len(shape)  # type: ignore[arg-type]
    index = int(index)  # type: ignore[arg-type]
    at = index if index >= 0 else shape[dim] + index
    take = tuple(Take(None, at) if d == dim else Take(d - (d > dim)) for d in range(len(shape)))
    low.gather(node, x, take)  # type: ignore[arg-type]


def _expand(low: Lowering, node: fx.Node) -> None:
    x: Any = node.args[0]
    before, after = low.shape(x), low.shape(node)
    added = len(after) - len(before)
    aligned = identity((*after[:added], *before), after)[added:]
    low.gather(node, x, aligned)


def _pad(low: Lowering, node: fx.Node) -> None:
    x, pads, value = list[Any](node.args[:3])
    rank = len(low.shape(x))
    before = [0] * rank
    for i, amount in enumerate(pads[::2]):
        before[rank - 1 - i] = int(amount)
    take = tuple(Take(d) for d in range(rank))
    low.gather(node, x, take, tuple(before), int(value))


_INTEGER: dict[Any, Emitter] = {
    q.quantize.default: _quantize,
    q.dequantize.default: _dequantize,
    q.conv2d.default: _convolution,
    q.conv1d.default: _convolution,
    q.linear.default: _linear,
    q.add.default: _add,
    q.mul.default: _mul,
    q.lookup.default: _lookup,
    q.cat.default: _cat,
    q.max_pool2d.default: _max_pool2d,
    q.avg_pool2d.default: _avg_pool2d,
    q.adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
    aten.permute.default: _permute_with(lambda a, rank: list(a[1])),
    aten.transpose.int: _permute_with(_swapped),
    aten.t.default: _permute_with(lambda a, rank: list(range(rank))[::-1]),
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.expand.default: _expand,
    aten.constant_pad_nd.default: _pad,
    **dict.fromkeys(
        (
            aten.reshape.default,
            aten.view.default,
            aten.flatten.using_ints,
            aten.unflatten.int,
            aten.squeeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.unsqueeze.default,
            aten.clone.default,
        ),
        _view,
    ),
}

_WITH_FLOAT = {**_INTEGER, **FLOAT_EMITTERS, **FLOAT_LINEAR}


def emitters_for(target: Target) -> dict[Any, Emitter]:
    """The emitter of each operator that `target` has kernels for."""
    return _INTEGER if isinstance(target.isa, Gpu) else _WITH_FLOAT
