"""The borders of the integer graph: float32 -> int8 and int8 -> float32.

    quantize    q = rne(clamp(x * inv_scale, -128 - zp, 127 - zp)) + zp        NaN becomes zp
    dequantize  x = f32(q - zp) * scale

No ATen operator maps to them: `fuse_requantize` puts them where the graph turns from float to
integer and back (`quantize_call`, `dequantize_call`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from qcompile import arith
from qcompile.ir import QParams
from qcompile.ops.row import Act, Call, Row, Sample, Site, no_examples, random_int8


def quantize(x: Tensor, inv_scale: float, zero_point: int) -> Tensor:
    """Reference. x float32, any shape; `inv_scale` is float32(1 / scale)."""
    return arith.quantize(x, inv_scale, zero_point)


def quantize_fake(x: Tensor, inv_scale: float, zero_point: int) -> Tensor:
    return torch.empty_like(x, dtype=torch.int8)


def dequantize(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Reference. x int8, any shape; returns float32."""
    return arith.dequantize(x, scale, zero_point)


def dequantize_fake(x: Tensor, scale: float, zero_point: int) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32)


def quantize_call(node: fx.Node, qparams: QParams) -> Call:
    """The call that turns the float value of `node` into int8."""
    return QUANTIZE.op, (node, arith.inverse_scale(qparams.scale), qparams.zero_point), {}


def dequantize_call(node: fx.Node, qparams: QParams) -> Call:
    """The call that turns the int8 value of `node` into float32."""
    return DEQUANTIZE.op, (node, qparams.scale, qparams.zero_point), {}


def _fuse_quantize(site: Site) -> Call:
    return quantize_call(site.node, site.output)


def _fuse_dequantize(site: Site) -> Call:
    (x,) = site.inputs
    return dequantize_call(x.node, x.qparams)


_SHAPES = ((1,), (37,), (2, 100), (3, 17, 5), (1, 3, 11, 13), (2, 64, 7, 7), (3, 33, 1, 1))


def _samples_quantize(g: torch.Generator) -> Iterator[Sample]:
    for i, shape in enumerate(_SHAPES):
        x = torch.randn(shape, generator=g) * 3.0
        inv_scale = arith.inverse_scale(arith.float32(0.01 * (i + 1)))
        yield Sample((Act(x), inv_scale, 37 * i - 128), label="x".join(map(str, shape)))
    halves = torch.arange(-140, 140, dtype=torch.float32) / 2
    yield Sample((Act(halves), 1.0, 0), label="ties")
    # Non-finite, denormal and out-of-range values; 3e38 * 10 overflows float32.
    hard = [float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-45, -0.0, 12.65, -12.85, 0.05]
    yield Sample((Act(torch.tensor(hard)), 10.0, -3), label="special values")


def _samples_dequantize(g: torch.Generator) -> Iterator[Sample]:
    for i, shape in enumerate(_SHAPES):
        scale = arith.float32(0.0123 * (i + 1))
        yield Sample((Act(random_int8(g, *shape)), scale, 37 * i - 128), label="x".join(map(str, shape)))
    every = torch.arange(-128, 128, dtype=torch.int32).to(torch.int8)
    yield Sample((Act(every), arith.float32(1e-3), 127), label="every value")


QUANTIZE = Row(
    name="quantize",
    schema="(Tensor x, float inv_scale, int zero_point) -> Tensor",
    aten=(),
    reference=quantize,
    fake=quantize_fake,
    fuse=_fuse_quantize,
    samples=_samples_quantize,
    examples=no_examples,
)

DEQUANTIZE = Row(
    name="dequantize",
    schema="(Tensor x, float scale, int zero_point) -> Tensor",
    aten=(),
    reference=dequantize,
    fake=dequantize_fake,
    fuse=_fuse_dequantize,
    samples=_samples_dequantize,
    examples=no_examples,
)

ROWS = (QUANTIZE, DEQUANTIZE)
