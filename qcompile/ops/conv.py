"""Integer convolution, 2-d and 1-d: any stride, padding, dilation and groups; fused clamp and residual.

    acc[n, c] = bias[c] + sum_k (x[n, k] - x_zero_point) * weight[c, k]        int32, padding adds 0
    out       = requantize(acc, m[c])                  or, with a residual, requantize_residual(...)

Padding is the zero point, so it contributes nothing. Products of int8 fit float64 exactly, hence
the reference is a float64 convolution.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompile import arith
from qcompile.errors import QuantizationError
from qcompile.ir import is_constant, shape_of, source, where
from qcompile.ops.row import Act, Call, Example, Row, Sample, Site, random_clamp, random_int8, with_random_parameters

aten = torch.ops.aten

_EPILOGUE = (
    "int x_zero_point, int zero_point, int lo, int hi, {geometry}, int groups, "
    "Tensor? residual=None, int residual_zero_point=0, float residual_m=0.0) -> Tensor"
)
_SCHEMA_2D = "(Tensor x, Tensor weight, Tensor bias, Tensor m, " + _EPILOGUE.format(
    geometry="int[] stride, int[] padding, int[] dilation"
)
_SCHEMA_1D = "(Tensor x, Tensor weight, Tensor bias, Tensor m, " + _EPILOGUE.format(
    geometry="int stride, int[] padding, int dilation"
)


def finish_accumulator(
    acc: Tensor,
    m: Tensor,
    zero_point: int,
    lo: int,
    hi: int,
    residual: Tensor | None,
    residual_zero_point: int,
    residual_m: float,
) -> Tensor:
    """The epilogue that convolutions and linear share."""
    if residual is None:
        return arith.requantize(acc, m, zero_point, lo, hi)
    return arith.requantize_residual(acc, m, residual, residual_zero_point, residual_m, zero_point, lo, hi)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    m: Tensor,
    x_zero_point: int,
    zero_point: int,
    lo: int,
    hi: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    residual: Tensor | None = None,
    residual_zero_point: int = 0,
    residual_m: float = 0.0,
) -> Tensor:
    """Reference. x (N, C, H, W) int8, weight (O, C/groups, KH, KW) int8, bias (O,) int32, m (O,) float32.

    `padding` is (top, bottom, left, right).
    """
    top, bottom, left, right = padding
    centred = nn.functional.pad((x.to(torch.float64) - x_zero_point), (left, right, top, bottom))
    acc = nn.functional.conv2d(centred, weight.to(torch.float64), bias.to(torch.float64), stride, 0, dilation, groups)
    return finish_accumulator(
        acc.to(torch.int32), m[:, None, None], zero_point, lo, hi, residual, residual_zero_point, residual_m
    )


def _extent(size: Any, before: int, after: int, kernel: int, stride: int, dilation: int) -> Any:
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


def conv2d_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    m: Tensor,
    x_zero_point: int,
    zero_point: int,
    lo: int,
    hi: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    residual: Tensor | None = None,
    residual_zero_point: int = 0,
    residual_m: float = 0.0,
) -> Tensor:
    kh, kw = weight.shape[2:]
    height = _extent(x.shape[2], padding[0], padding[1], kh, stride[0], dilation[0])
    width = _extent(x.shape[3], padding[2], padding[3], kw, stride[1], dilation[1])
    return x.new_empty((x.shape[0], weight.shape[0], height, width))


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    m: Tensor,
    x_zero_point: int,
    zero_point: int,
    lo: int,
    hi: int,
    stride: int,
    padding: list[int],
    dilation: int,
    groups: int,
    residual: Tensor | None = None,
    residual_zero_point: int = 0,
    residual_m: float = 0.0,
) -> Tensor:
    """Reference. x (N, C, L) int8, weight (O, C/groups, K) int8; `padding` is (before, after)."""
    other = None if residual is None else residual[:, :, None]
    return conv2d(
        x[:, :, None],
        weight[:, :, None],
        bias,
        m,
        x_zero_point,
        zero_point,
        lo,
        hi,
        [1, stride],
        [0, 0, *padding],
        [1, dilation],
        groups,
        other,
        residual_zero_point,
        residual_m,
    )[:, :, 0]


def conv1d_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    m: Tensor,
    x_zero_point: int,
    zero_point: int,
    lo: int,
    hi: int,
    stride: int,
    padding: list[int],
    dilation: int,
    groups: int,
    residual: Tensor | None = None,
    residual_zero_point: int = 0,
    residual_m: float = 0.0,
) -> Tensor:
    length = _extent(x.shape[2], padding[0], padding[1], weight.shape[2], stride, dilation)
    return x.new_empty((x.shape[0], weight.shape[0], length))


def weighted(site: Site) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The leading arguments (x, weight, bias, m, zero points, clamp) and the residual keywords that
    convolutions and linear share; proves that the accumulator cannot overflow.

    Raises:
        QuantizationError: some int8 input could overflow the int32 accumulator.
    """
    assert site.weight is not None
    (x, *_) = site.inputs
    name = where(site.node) or site.node.name
    scale = x.qparams.scale * site.weight.scale.to(torch.float64)
    bias = site.bias if site.bias is not None else torch.zeros(site.weight.q.shape[0])
    bias_q = arith.bias_to_int32(bias, scale)
    largest = arith.largest_accumulator(site.weight.q, bias_q, x.qparams.zero_point)
    if largest > arith.INT32_MAX:
        raise QuantizationError(
            f"an int32 accumulator could reach {largest}, more than {arith.INT32_MAX}",
            where=name,
            source=source(site.node),
            remedy="split the layer along its input channels, or exclude it from quantization",
        )
    args = (
        x.node,
        site.constant(f"{name}_weight", site.weight.q),
        site.constant(f"{name}_bias", bias_q),
        site.constant(f"{name}_m", arith.multiplier(scale, site.output.scale)),
        x.qparams.zero_point,
        site.output.zero_point,
        site.lo,
        site.hi,
    )
    if site.residual is None:
        return args, {}
    other = site.residual
    return args, {
        "residual": other.node,
        "residual_zero_point": other.qparams.zero_point,
        "residual_m": arith.float32(other.qparams.scale / site.output.scale),
    }


def argument(node: fx.Node, index: int, default: Any) -> Any:
    """Positional argument `index` of a normalized ATen call, or its default."""
    return node.args[index] if len(node.args) > index else default


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value) * (2 // len(value))


def geometry(conv: fx.Node, kernel: Sequence[int]) -> tuple[list[int], list[tuple[int, int]], list[int]]:
    """Stride, padding (before, after) and dilation of an ATen convolution, axis by axis of its `kernel`."""

    def axes(value: Any) -> list[int]:
        return [value] * len(kernel) if isinstance(value, int) else list(value) * (len(kernel) // len(value))

    stride, padding, dilation = (argument(conv, i, default) for i, default in ((3, 1), (4, 0), (5, 1)))
    if padding == "same":  # an odd total pads one more at the end
        totals = [d * (k - 1) for d, k in zip(axes(dilation), kernel, strict=True)]
        pads = [(total // 2, total - total // 2) for total in totals]
    else:
        pads = [(p, p) for p in axes(0 if padding == "valid" else padding)]
    return axes(stride), pads, axes(dilation)


def _geometry(site: Site) -> tuple[list[int], list[int], list[int]]:
    assert site.weight is not None
    stride, pads, dilation = geometry(site.node, site.weight.q.shape[2:])
    return stride, [p for pair in pads for p in pair], dilation


def _fuse_2d(site: Site) -> Call:
    args, kwargs = weighted(site)
    return CONV2D.op, (*args, *_geometry(site), argument(site.node, 6, 1)), kwargs


def _fuse_1d(site: Site) -> Call:
    args, kwargs = weighted(site)
    (stride,), padding, (dilation,) = _geometry(site)
    return CONV1D.op, (*args, stride, padding, dilation, argument(site.node, 6, 1)), kwargs


def constant_weight(node: fx.Node) -> str | None:
    """The objection of operators that need a constant weight."""
    weight = node.args[1]
    return None if isinstance(weight, fx.Node) and is_constant(weight) else "its weight is computed at run time"


def _decline(node: fx.Node) -> str | None:
    x, weight = node.args[:2]
    if isinstance(x, fx.Node) and isinstance(weight, fx.Node) and len(shape_of(x)) != len(shape_of(weight)):
        return "its input has no batch dimension"
    return constant_weight(node)


def sample_weighted(
    g: torch.Generator, weight_shape: tuple[int, ...], residual: Tensor | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Random weight, bias, m, zero points and clamp for a sample: the arguments after x."""
    out_channels = weight_shape[0]
    taps = max(1, int(torch.tensor(weight_shape[1:]).prod()))
    weight = random_int8(g, *weight_shape, lo=-127)
    bias = torch.randint(-3000, 3000, (out_channels,), generator=g, dtype=torch.int32)
    m = (torch.rand(out_channels, generator=g) + 0.1) * (2.0 / (127 * taps**0.5))
    x_zp, zp = (int(v) for v in torch.randint(-128, 128, (2,), generator=g))
    lo, hi = random_clamp(g)
    kwargs: dict[str, Any] = {}
    if residual is not None:
        kwargs = {
            "residual": Act(residual),
            "residual_zero_point": int(torch.randint(-128, 128, (1,), generator=g)),
            "residual_m": arith.float32(0.1 + float(torch.rand(1, generator=g))),
        }
    return (weight, bias, m, x_zp, zp, lo, hi), kwargs


# (channels, height, width, out channels, kernel, stride, padding, dilation, groups, batch, residual)
_GEOMETRIES = (
    (64, 14, 14, 64, (3, 3), 1, (1, 1, 1, 1), 1, 1, 1, True),
    (3, 19, 23, 32, (3, 3), 2, (1, 1, 1, 1), 1, 1, 2, False),
    (3, 31, 31, 16, (7, 7), 2, (3, 3, 3, 3), 1, 1, 1, False),
    (1, 11, 13, 5, (5, 5), 1, (0, 0, 0, 0), 1, 1, 1, False),
    (16, 7, 7, 40, (1, 1), 1, (0, 0, 0, 0), 1, 1, 3, True),
    (33, 9, 5, 37, (1, 1), 2, (0, 0, 0, 0), 1, 1, 1, False),
    (32, 13, 13, 32, (3, 3), 1, (1, 1, 1, 1), 1, 32, 1, False),  # depthwise
    (19, 15, 14, 19, (5, 5), 2, (2, 2, 2, 2), 1, 19, 1, True),  # depthwise, odd
    (8, 9, 9, 24, (3, 3), 1, (1, 1, 1, 1), 1, 8, 1, False),  # depthwise with multiplier
    (32, 8, 8, 48, (3, 3), 1, (1, 1, 1, 1), 1, 4, 1, False),  # grouped
    (12, 8, 8, 18, (3, 3), 1, (1, 0, 2, 1), 1, 3, 1, False),  # odd groups, asymmetric padding
    (17, 12, 10, 21, (3, 2), (2, 1), (2, 2, 1, 1), (2, 3), 1, 1, False),  # dilated, rectangular
    (20, 1, 1, 10, (1, 1), 1, (0, 0, 0, 0), 1, 1, 1, False),  # a 1x1 image
    (4096, 1, 1, 7, (1, 1), 1, (0, 0, 0, 0), 1, 1, 1, False),
    (5, 3, 3, 6, (3, 3), 1, (2, 2, 2, 2), 1, 1, 1, False),  # more padding than image
)


def _samples_2d(g: torch.Generator) -> Iterator[Sample]:
    for c, h, w, o, kernel, stride, padding, dilation, groups, batch, with_residual in _GEOMETRIES:
        geometry = (_pair(stride), list(padding), _pair(dilation), groups)
        x = random_int8(g, batch, c, h, w)
        shape = (o, c // groups, *kernel)
        like = conv2d_fake(x, torch.empty(shape), x, x, 0, 0, 0, 0, geometry[0], geometry[1], geometry[2], groups)
        residual = random_int8(g, *like.shape) if with_residual else None
        args, kwargs = sample_weighted(g, shape, residual)
        yield Sample((Act(x), *args, *geometry), kwargs, f"{c}x{h}x{w}->{o} k{kernel} s{stride} g{groups}")


def _samples_1d(g: torch.Generator) -> Iterator[Sample]:
    for c, length, o, kernel, stride, padding, dilation, groups, with_residual in (
        (16, 40, 32, 3, 1, (1, 1), 1, 1, False),
        (7, 29, 13, 5, 2, (2, 2), 2, 1, False),
        (12, 17, 12, 3, 1, (2, 0), 1, 12, True),
        (1, 50, 4, 9, 3, (0, 0), 1, 1, False),
    ):
        x = random_int8(g, 2, c, length)
        out = _extent(length, *padding, kernel, stride, dilation)
        residual = random_int8(g, 2, o, out) if with_residual else None
        args, kwargs = sample_weighted(g, (o, c // groups, kernel), residual)
        yield Sample((Act(x), *args, stride, list(padding), dilation, groups), kwargs, f"{c}x{length}->{o}")


def _examples_2d(g: torch.Generator) -> Iterator[Example]:
    yield Example(with_random_parameters(nn.Conv2d(3, 8, 3, padding=1), g), (torch.randn(1, 3, 9, 9, generator=g),))
    yield Example(
        with_random_parameters(nn.Conv2d(8, 8, 3, stride=2, groups=8, bias=False), g),
        (torch.randn(2, 8, 9, 9, generator=g),),
    )
    yield Example(
        with_random_parameters(nn.Conv2d(6, 4, (3, 1), dilation=2, groups=2), g),
        (torch.randn(1, 6, 9, 7, generator=g),),
    )
    yield Example(
        with_random_parameters(nn.Conv2d(3, 4, (4, 3), padding="same"), g), (torch.randn(1, 3, 7, 8, generator=g),)
    )
    yield Example(
        with_random_parameters(nn.Conv2d(3, 4, 3, padding="valid"), g), (torch.randn(1, 3, 7, 8, generator=g),)
    )


def _examples_1d(g: torch.Generator) -> Iterator[Example]:
    yield Example(
        with_random_parameters(nn.Conv1d(5, 8, 3, padding=1, stride=2), g), (torch.randn(2, 5, 19, generator=g),)
    )
    yield Example(
        with_random_parameters(nn.Conv1d(5, 5, 4, padding="same", groups=5), g), (torch.randn(2, 5, 19, generator=g),)
    )


CONV2D = Row(
    name="conv2d",
    schema=_SCHEMA_2D,
    aten=(aten.conv2d.default, aten.conv2d.padding),
    reference=conv2d,
    fake=conv2d_fake,
    fuse=_fuse_2d,
    samples=_samples_2d,
    examples=_examples_2d,
    decline=_decline,
    weight_arg=1,
    bias_arg=2,
    absorbs_clamp=True,
    absorbs_residual=True,
)

CONV1D = Row(
    name="conv1d",
    schema=_SCHEMA_1D,
    aten=(aten.conv1d.default, aten.conv1d.padding),
    reference=conv1d,
    fake=conv1d_fake,
    fuse=_fuse_1d,
    samples=_samples_1d,
    examples=_examples_1d,
    decline=_decline,
    weight_arg=1,
    bias_arg=2,
    absorbs_clamp=True,
    absorbs_residual=True,
)

ROWS = (CONV2D, CONV1D)
