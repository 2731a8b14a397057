"""Pooling over height and width.

    max_pool2d           the largest q of each window; keeps the input's scale
    avg_pool2d           acc = sum over the window's in-image elements of (x - x_zp)
    adaptive_avg_pool2d  out = requantize(acc, m),  m = f32(ratio / count),  ratio = s_x / s_y in float64

`count` is what ATen divides by at that output position. A mean over height and width is
adaptive_avg_pool2d to 1x1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompile import arith
from qcompile.ir import shape_of
from qcompile.ops.conv import argument
from qcompile.ops.row import Act, Call, Example, Output, Row, Sample, Site, activations, random_int8

aten = torch.ops.aten
functional = nn.functional


def max_pool2d(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> Tensor:
    """Reference. x (N, C, H, W) int8. Padding is never a value; a window of padding alone gives -128."""
    best = functional.max_pool2d(x.to(torch.float32), kernel, stride, padding, dilation, ceil_mode)
    return best.clamp(min=float(arith.QMIN)).to(torch.int8)


def max_pool2d_fake(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> Tensor:
    like = functional.max_pool2d(x.to(torch.float32), kernel, stride, padding, dilation, ceil_mode)
    return x.new_empty(like.shape)


def window_counts(size: int, outputs: int, kernel: int, stride: int, padding: int, count_include_pad: bool) -> Tensor:
    """How many positions ATen counts in each window along one axis; int64 (outputs,).

    A window ends at the far padding even in ceil mode; without `count_include_pad` only the
    positions inside the image count.
    """
    begin = torch.arange(outputs) * stride - padding
    end = (begin + kernel).clamp(max=size + padding)
    if not count_include_pad:
        begin, end = begin.clamp(min=0), end.clamp(max=size)
    return end - begin


def avg_pool2d(
    x: Tensor,
    x_zero_point: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    ratio: float,
    zero_point: int,
) -> Tensor:
    """Reference. x (N, C, H, W) int8; `ratio` is float64. Sums of int8 are exact in float64."""
    centred = x.to(torch.float64) - x_zero_point
    acc = functional.avg_pool2d(centred, kernel, stride, padding, ceil_mode, divisor_override=1).to(torch.int32)
    if divisor_override is not None:
        return arith.requantize(acc, arith.multiplier(ratio, divisor_override), zero_point)
    rows, columns = (
        window_counts(x.shape[2 + i], acc.shape[2 + i], kernel[i], stride[i], padding[i], count_include_pad)
        for i in (0, 1)
    )
    m = torch.tensor(ratio, dtype=torch.float64) / (rows[:, None] * columns[None, :])
    return arith.requantize(acc, m.to(torch.float32), zero_point)


def avg_pool2d_fake(
    x: Tensor,
    x_zero_point: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    ratio: float,
    zero_point: int,
) -> Tensor:
    like = functional.avg_pool2d(x.to(torch.float32), kernel, stride, padding, ceil_mode)
    return x.new_empty(like.shape)


def adaptive_windows(size: int, outputs: int) -> list[tuple[int, int]]:
    """ATen's windows along one axis: [floor(i * size / outputs), ceil((i + 1) * size / outputs))."""
    return [(i * size // outputs, -(-(i + 1) * size // outputs)) for i in range(outputs)]


def adaptive_avg_pool2d(x: Tensor, x_zero_point: int, output_size: list[int], ratio: float, zero_point: int) -> Tensor:
    """Reference. x (N, C, H, W) int8 -> (N, C, *output_size) int8; `ratio` is float64."""
    centred = x.to(torch.int32) - x_zero_point
    rows, columns = (adaptive_windows(x.shape[2 + i], output_size[i]) for i in (0, 1))
    result = x.new_empty((*x.shape[:2], *output_size))
    for i, (top, bottom) in enumerate(rows):
        for j, (left, right) in enumerate(columns):
            acc = centred[:, :, top:bottom, left:right].sum((2, 3), dtype=torch.int64).to(torch.int32)
            m = arith.multiplier(ratio, (bottom - top) * (right - left))
            result[:, :, i, j] = arith.requantize(acc, m, zero_point)
    return result


def adaptive_avg_pool2d_fake(
    x: Tensor, x_zero_point: int, output_size: list[int], ratio: float, zero_point: int
) -> Tensor:
    return x.new_empty((*x.shape[:2], *output_size))


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value) * (2 // len(value))


def _decline(node: fx.Node) -> str | None:
    (x, *_) = activations(node)
    if len(shape_of(x)) != 4:
        return "its input is not (N, C, H, W)"
    sizes: Any = node.args[1]
    fixed = all(isinstance(size, int) for size in (sizes if isinstance(sizes, (list, tuple)) else [sizes]))
    return None if fixed else "its window is computed at run time"


def _too_many(elements: Any) -> str | None:
    """Why an average of so many values cannot be summed in int32; a dynamic number has no proof."""
    if not isinstance(elements, int):
        return "its window is computed at run time"
    largest = arith.INT32_MAX // (arith.QMAX - arith.QMIN)
    return f"the sum of its window of {elements} values could leave int32" if elements > largest else None


def _decline_avg(node: fx.Node) -> str | None:
    kernel = _pair(node.args[1])
    return _decline(node) or _too_many(kernel[0] * kernel[1])


def _decline_adaptive(node: fx.Node) -> str | None:
    declined = _decline(node)
    if declined is not None:
        return declined
    sizes = shape_of(activations(node)[0])[2:]
    if not all(isinstance(size, int) for size in sizes):
        return "its image size is dynamic"
    outputs = _pair(node.args[1])
    # A window spans at most one value more than its share.
    return _too_many(math.prod(-(-size // count) + 1 for size, count in zip(sizes, outputs, strict=True) if count))


def _kernel_stride(node: fx.Node) -> tuple[list[int], list[int]]:
    """Without a stride, ATen strides by the kernel."""
    kernel = _pair(node.args[1])
    return kernel, _pair(argument(node, 2, None) or kernel)


def _fuse_max(site: Site) -> Call:
    (x,) = site.inputs
    kernel, stride = _kernel_stride(site.node)
    padding, dilation = _pair(argument(site.node, 3, 0)), _pair(argument(site.node, 4, 1))
    return MAX_POOL2D.op, (x.node, kernel, stride, padding, dilation, argument(site.node, 5, False)), {}


def _fuse_avg(site: Site) -> Call:
    (x,) = site.inputs
    node = site.node
    geometry = (*_kernel_stride(node), _pair(argument(node, 3, 0)))
    counting = argument(node, 4, False), argument(node, 5, True), argument(node, 6, None)
    ratio = x.qparams.scale / site.output.scale
    return AVG_POOL2D.op, (x.node, x.qparams.zero_point, *geometry, *counting, ratio, site.output.zero_point), {}


def _fuse_adaptive(site: Site) -> Call:
    (x,) = site.inputs
    ratio = x.qparams.scale / site.output.scale
    args = x.node, x.qparams.zero_point, _pair(site.node.args[1]), ratio, site.output.zero_point
    return ADAPTIVE_AVG_POOL2D.op, args, {}


# (shape of x, kernel, stride, padding, dilation, ceil mode)
_MAX_GEOMETRIES = (
    ((1, 64, 14, 14), (3, 3), (2, 2), (1, 1), (1, 1), False),
    ((2, 3, 17, 19), (2, 2), (2, 2), (0, 0), (1, 1), False),
    ((1, 33, 11, 11), (3, 3), (2, 2), (0, 0), (1, 1), True),
    ((3, 1, 7, 13), (3, 2), (1, 2), (1, 0), (2, 1), False),
    ((1, 17, 9, 9), (5, 5), (1, 1), (2, 2), (1, 1), False),
    ((2, 5, 1, 1), (1, 1), (1, 1), (0, 0), (1, 1), False),
    ((1, 100, 5, 4), (2, 2), (2, 2), (1, 1), (1, 1), True),
    ((1, 64, 7, 7), (7, 7), (7, 7), (0, 0), (1, 1), False),
)

# (shape of x, kernel, stride, padding, ceil mode, count include pad, divisor override)
_AVG_GEOMETRIES = (
    ((1, 64, 14, 14), (2, 2), (2, 2), (0, 0), False, True, None),
    ((2, 3, 17, 19), (3, 3), (1, 1), (1, 1), False, True, None),
    ((1, 33, 11, 13), (3, 3), (2, 2), (1, 1), False, False, None),
    ((3, 1, 8, 10), (3, 3), (2, 2), (1, 1), True, True, None),
    ((1, 17, 8, 7), (3, 2), (2, 1), (1, 1), True, False, None),
    ((2, 5, 9, 9), (3, 3), (3, 3), (0, 0), False, True, 5),
    ((1, 100, 7, 7), (7, 7), (7, 7), (0, 0), False, True, None),
    ((2, 20, 1, 1), (1, 1), (1, 1), (0, 0), False, True, None),
)

_ADAPTIVE_GEOMETRIES = (
    ((1, 64, 7, 7), (1, 1)),
    ((3, 17, 13, 11), (1, 1)),
    ((2, 100, 1, 1), (1, 1)),
    ((1, 33, 7, 7), (3, 3)),
    ((2, 3, 5, 8), (5, 2)),
    ((1, 1, 10, 7), (7, 3)),
    ((1, 5, 3, 3), (7, 7)),
    ((1, 20, 31, 1), (2, 1)),
)


def _label(*parts: Any) -> str:
    return " ".join("x".join(map(str, p)) if isinstance(p, tuple) else str(p) for p in parts)


def _rescaling(g: torch.Generator, count: int) -> tuple[int, float, int]:
    """x_zero_point, ratio and zero_point that spread a mean of `count` random values over int8."""
    ratio = (0.7 + 0.6 * float(torch.rand(1, generator=g, dtype=torch.float64))) * max(1.0, count**0.5 / 2)
    reach = int(arith.QMAX / ratio)
    x_zp = int(torch.randint(-reach, reach + 1, (1,), generator=g))
    return x_zp, ratio, max(arith.QMIN, min(arith.QMAX, round(ratio * x_zp)))


def _samples_max(g: torch.Generator) -> Iterator[Sample]:
    for shape, *geometry, ceil_mode in _MAX_GEOMETRIES:
        args = (*(list(part) for part in geometry), ceil_mode)
        yield Sample((Act(random_int8(g, *shape)), *args), label=_label(shape, *geometry, ceil_mode))


def _samples_avg(g: torch.Generator) -> Iterator[Sample]:
    for shape, kernel, stride, padding, *counting in _AVG_GEOMETRIES:
        x_zp, ratio, zp = _rescaling(g, kernel[0] * kernel[1])
        geometry = [list(kernel), list(stride), list(padding)]
        args = (Act(random_int8(g, *shape)), x_zp, *geometry, *counting, ratio, zp)
        yield Sample(args, label=_label(shape, kernel, stride, padding, *counting))


def _samples_adaptive(g: torch.Generator) -> Iterator[Sample]:
    for shape, output_size in _ADAPTIVE_GEOMETRIES:
        rows, columns = (-(-shape[2 + i] // output_size[i]) for i in (0, 1))
        x_zp, ratio, zp = _rescaling(g, rows * columns)
        args = (Act(random_int8(g, *shape)), x_zp, list(output_size), ratio, zp)
        yield Sample(args, label=_label(shape, output_size))


def _examples_max(g: torch.Generator) -> Iterator[Example]:
    x = torch.randn(2, 5, 11, 9, generator=g)
    yield Example(nn.MaxPool2d(3, 2, 1), (x,))
    yield Example(nn.MaxPool2d((2, 3), ceil_mode=True), (x,))


def _examples_avg(g: torch.Generator) -> Iterator[Example]:
    x = torch.randn(2, 5, 11, 9, generator=g)
    yield Example(nn.AvgPool2d(2), (x,))
    yield Example(nn.AvgPool2d(3, 2, 1), (x,))
    yield Example(nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), (x,))
    yield Example(nn.AvgPool2d(3, 1, 1, divisor_override=7), (x,))


def _examples_adaptive(g: torch.Generator) -> Iterator[Example]:
    x = torch.randn(2, 5, 11, 9, generator=g)
    yield Example(nn.AdaptiveAvgPool2d(1), (x,))
    yield Example(nn.AdaptiveAvgPool2d((4, None)), (x,))


MAX_POOL2D = Row(
    name="max_pool2d",
    schema="(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode) -> Tensor",
    aten=(aten.max_pool2d.default,),
    reference=max_pool2d,
    fake=max_pool2d_fake,
    fuse=_fuse_max,
    samples=_samples_max,
    examples=_examples_max,
    decline=_decline,
    output=Output.SHARED,
)

AVG_POOL2D = Row(
    name="avg_pool2d",
    schema=(
        "(Tensor x, int x_zero_point, int[] kernel, int[] stride, int[] padding, bool ceil_mode, "
        "bool count_include_pad, int? divisor_override, float ratio, int zero_point) -> Tensor"
    ),
    aten=(aten.avg_pool2d.default,),
    reference=avg_pool2d,
    fake=avg_pool2d_fake,
    fuse=_fuse_avg,
    samples=_samples_avg,
    examples=_examples_avg,
    decline=_decline_avg,
)

ADAPTIVE_AVG_POOL2D = Row(
    name="adaptive_avg_pool2d",
    schema="(Tensor x, int x_zero_point, int[] output_size, float ratio, int zero_point) -> Tensor",
    aten=(aten.adaptive_avg_pool2d.default,),
    reference=adaptive_avg_pool2d,
    fake=adaptive_avg_pool2d_fake,
    fuse=_fuse_adaptive,
    samples=_samples_adaptive,
    examples=_examples_adaptive,
    decline=_decline_adaptive,
)

ROWS = (MAX_POOL2D, AVG_POOL2D, ADAPTIVE_AVG_POOL2D)
