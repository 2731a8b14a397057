"""Integer matrix product with a constant weight; fused clamp and residual.

acc[..., n] = bias[n] + sum_k (x[..., k] - x_zero_point) * weight[n, k]        int32
out         = requantize(acc, m[n])         or, with a residual, requantize_residual(...)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

from qcompile.ir import shape_of
from qcompile.ops.conv import constant_weight, finish_accumulator, sample_weighted, weighted
from qcompile.ops.row import Act, Call, Example, Row, Sample, Site, activations, random_int8, with_random_parameters

aten = torch.ops.aten

_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor bias, Tensor m, int x_zero_point, int zero_point, int lo, int hi, "
    "Tensor? residual=None, int residual_zero_point=0, float residual_m=0.0) -> Tensor"
)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    m: Tensor,
    x_zero_point: int,
    zero_point: int,
    lo: int,
    hi: int,
    residual: Tensor | None = None,
    residual_zero_point: int = 0,
    residual_m: float = 0.0,
) -> Tensor:
    """Reference. x (..., K) int8, weight (N, K) int8, bias (N,) int32, m (N,) float32 -> (..., N) int8.

    Products of int8 and their sums fit float64 exactly, hence a float64 product.
    """
    centred = x.to(torch.float64) - x_zero_point
    acc = centred @ weight.to(torch.float64).T + bias.to(torch.float64)
    return finish_accumulator(acc.to(torch.int32), m, zero_point, lo, hi, residual, residual_zero_point, residual_m)


def linear_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    m: Tensor,
    x_zero_point: int,
    zero_point: int,
    lo: int,
    hi: int,
    residual: Tensor | None = None,
    residual_zero_point: int = 0,
    residual_m: float = 0.0,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _decline(node: fx.Node) -> str | None:
    (x, *_) = activations(node)
    if len(shape_of(x)) < 2:
        return "its input has no batch dimension"
    return constant_weight(node)


def _fuse(site: Site) -> Call:
    args, kwargs = weighted(site)
    return LINEAR.op, args, kwargs


# (shape of x, out features, with residual)
_GEOMETRIES: tuple[tuple[tuple[int, ...], int, bool], ...] = (
    ((1, 64), 64, False),
    ((3, 100), 10, True),
    ((2, 1), 1, False),
    ((2, 5), 3, False),
    ((1, 17), 33, True),
    ((7, 33), 17, False),
    ((2, 13, 64), 48, True),
    ((3, 5, 31), 7, False),
    ((2, 3, 5, 40), 100, False),
    ((1, 1031), 5, False),
)


def _samples(g: torch.Generator) -> Iterator[Sample]:
    for shape, out_features, with_residual in _GEOMETRIES:
        residual = random_int8(g, *shape[:-1], out_features) if with_residual else None
        args, kwargs = sample_weighted(g, (out_features, shape[-1]), residual)
        label = f"{'x'.join(map(str, shape))}->{out_features}" + ("+residual" if with_residual else "")
        yield Sample((Act(random_int8(g, *shape)), *args), kwargs, label)


def _examples(g: torch.Generator) -> Iterator[Example]:
    yield Example(with_random_parameters(nn.Linear(20, 7), g), (torch.randn(3, 20, generator=g),))
    yield Example(with_random_parameters(nn.Linear(16, 16, bias=False), g), (torch.randn(2, 5, 16, generator=g),))


LINEAR = Row(
    name="linear",
    schema=_SCHEMA,
    aten=(aten.linear.default,),
    reference=linear,
    fake=linear_fake,
    fuse=_fuse,
    samples=_samples,
    examples=_examples,
    decline=_decline,
    weight_arg=1,
    bias_arg=2,
    absorbs_clamp=True,
    absorbs_residual=True,
)

ROWS = (LINEAR,)
