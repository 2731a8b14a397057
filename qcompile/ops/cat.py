"""Concatenation: each operand is brought to the output's scale.

out = concat_i requantize(x_i - zp_i, ms[i])        ms[i] = f32(s_i / s_y)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompile import arith
from qcompile.ir import is_constant, shape_of
from qcompile.ops.conv import argument
from qcompile.ops.row import Act, Call, Example, Row, Sample, Site, random_int8

aten = torch.ops.aten


def cat(xs: list[Tensor], zero_points: list[int], ms: list[float], dim: int, zero_point: int) -> Tensor:
    """Reference. xs int8, equal but for `dim`; `ms` are float32 values."""
    parts = zip(xs, zero_points, ms, strict=True)
    return torch.cat([arith.requantize(x.to(torch.int32) - zp, m, zero_point) for x, zp, m in parts], dim)


def cat_fake(xs: list[Tensor], zero_points: list[int], ms: list[float], dim: int, zero_point: int) -> Tensor:
    return torch.cat(xs, dim)


def _operands(node: fx.Node) -> tuple[fx.Node, ...]:
    tensors: Any = node.args[0]
    return tuple(tensors)


def _decline(node: fx.Node) -> str | None:
    operands = _operands(node)
    if any(map(is_constant, operands)):
        return "an operand is constant"
    # torch.cat lets an empty 1-d tensor join anything.
    ranks = {len(shape_of(x)) for x in operands}
    return "its operands differ in rank" if len(ranks) > 1 else None


def _fuse(site: Site) -> Call:
    rank = len(shape_of(site.node))
    dim = argument(site.node, 1, 0) % rank
    zero_points = [x.qparams.zero_point for x in site.inputs]
    ms = [arith.float32(x.qparams.scale / site.output.scale) for x in site.inputs]
    return CAT.op, ([x.node for x in site.inputs], zero_points, ms, dim, site.output.zero_point), {}


_SHAPES: tuple[tuple[int, tuple[tuple[int, ...], ...]], ...] = (
    (1, ((1, 64, 7, 7), (1, 64, 7, 7))),
    (1, ((2, 3, 5, 7), (2, 17, 5, 7), (2, 1, 5, 7))),
    (1, ((3, 33, 1, 1), (3, 100, 1, 1))),
    (1, ((2, 5, 13), (2, 8, 13))),
    (1, ((3, 10), (3, 7), (3, 17), (3, 1))),
    (0, ((1, 5, 4, 4), (2, 5, 4, 4))),
    (2, ((1, 17, 3, 5), (1, 17, 4, 5))),
    (3, ((2, 4, 3, 5), (2, 4, 3, 1))),
    (0, ((11,), (6,))),
    (1, ((2, 19, 3, 3),)),
)


def _samples(g: torch.Generator) -> Iterator[Sample]:
    for dim, shapes in _SHAPES:
        zero_points = [int(v) for v in torch.randint(-128, 128, (len(shapes) + 1,), generator=g)]
        # A multiplier of exactly 1 and an equal zero point leave the operand as it is.
        ms = [1.0 if i == 1 else float(torch.rand(1, generator=g) + 0.3) for i in range(len(shapes))]
        if len(shapes) > 1:
            zero_points[1] = zero_points[-1]
        xs = [Act(random_int8(g, *shape)) for shape in shapes]
        label = " ".join("x".join(map(str, s)) for s in shapes) + f" dim {dim}"
        yield Sample((xs, zero_points[:-1], ms, dim, zero_points[-1]), label=label)


class _Cat(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *xs: Tensor) -> Tensor:
        return torch.cat(xs, self.dim)


def _examples(g: torch.Generator) -> Iterator[Example]:
    x, y = torch.randn(2, 5, 3, 3, generator=g), 0.1 * torch.randn(2, 4, 3, 3, generator=g)
    yield Example(_Cat(1), (x, y))
    yield Example(_Cat(-1), (x, x.flip(0), x))


CAT = Row(
    name="cat",
    schema="(Tensor[] xs, int[] zero_points, float[] ms, int dim, int zero_point) -> Tensor",
    aten=(aten.cat.default, aten.concat.default),
    reference=cat,
    fake=cat_fake,
    fuse=_fuse,
    samples=_samples,
    examples=_examples,
    decline=_decline,
    operands=_operands,
)

ROWS = (CAT,)
