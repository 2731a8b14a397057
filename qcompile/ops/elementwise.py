"""Integer addition, subtraction and multiplication of two activations, with a fused clamp.

    add  r = fma(f32(b - b_zp), b_m, f32(a - a_zp) * a_m)        a_m = f32(s_a / s_y), b_m = f32(alpha * s_b / s_y)
    mul  acc = (a - a_zp) * (b - b_zp)                           m = f32(s_a * s_b / s_y)

Subtraction is addition with -b_m. A constant operand does not come here: it is a table (`unary`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompile import arith
from qcompile.ir import is_constant
from qcompile.ops.row import Act, Call, Example, Row, Sample, Site, random_clamp, random_int8

aten = torch.ops.aten


def add(
    a: Tensor,
    b: Tensor,
    a_zero_point: int,
    a_m: float,
    b_zero_point: int,
    b_m: float,
    zero_point: int,
    lo: int,
    hi: int,
) -> Tensor:
    """Reference. a, b int8, broadcast against each other; `a_m` and `b_m` are float32 values."""
    acc, other = torch.broadcast_tensors(a.to(torch.int32) - a_zero_point, b)
    return arith.requantize_residual(acc, a_m, other, b_zero_point, b_m, zero_point, lo, hi)


def add_fake(
    a: Tensor,
    b: Tensor,
    a_zero_point: int,
    a_m: float,
    b_zero_point: int,
    b_m: float,
    zero_point: int,
    lo: int,
    hi: int,
) -> Tensor:
    return torch.empty_like(a + b)


def mul(
    a: Tensor, b: Tensor, a_zero_point: int, b_zero_point: int, m: float, zero_point: int, lo: int, hi: int
) -> Tensor:
    """Reference. a, b int8, broadcast against each other; `m` is a float32 value."""
    acc = (a.to(torch.int32) - a_zero_point) * (b.to(torch.int32) - b_zero_point)
    return arith.requantize(acc, m, zero_point, lo, hi)


def mul_fake(
    a: Tensor, b: Tensor, a_zero_point: int, b_zero_point: int, m: float, zero_point: int, lo: int, hi: int
) -> Tensor:
    return torch.empty_like(a * b)


def both(node: fx.Node) -> tuple[fx.Node, ...]:
    """Both operands, one twice in x + x (which `all_input_nodes` would list once)."""
    return tuple(arg for arg in node.args[:2] if isinstance(arg, fx.Node))


def _decline(node: fx.Node) -> str | None:
    operands = both(node)
    if len(operands) < 2 or any(map(is_constant, operands)):
        return "an operand is constant"
    alpha = node.kwargs.get("alpha", 1)
    return "its alpha is computed at run time" if isinstance(alpha, fx.Node) else None


def _fuse_add(site: Site) -> Call:
    a, b = site.inputs
    alpha: Any = site.node.kwargs.get("alpha", 1)
    factor = -alpha if site.node.target is aten.sub.Tensor else alpha
    a_m = arith.float32(a.qparams.scale / site.output.scale)
    b_m = arith.float32(factor * b.qparams.scale / site.output.scale)
    zero_points = site.output.zero_point, site.lo, site.hi
    return ADD.op, (a.node, b.node, a.qparams.zero_point, a_m, b.qparams.zero_point, b_m, *zero_points), {}


def _fuse_mul(site: Site) -> Call:
    a, b = site.inputs
    m = arith.float32(a.qparams.scale * b.qparams.scale / site.output.scale)
    zero_points = a.qparams.zero_point, b.qparams.zero_point
    return MUL.op, (a.node, b.node, *zero_points, m, site.output.zero_point, site.lo, site.hi), {}


_SHAPES: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((1, 64, 7, 7), (1, 64, 7, 7)),
    ((2, 3, 11, 13), (2, 3, 11, 13)),
    ((3, 33, 1, 1), (3, 33, 1, 1)),
    ((1, 1, 5, 5), (1, 1, 5, 5)),
    ((2, 17, 5, 7), (2, 17, 1, 1)),
    ((2, 17, 1, 1), (2, 17, 5, 7)),
    ((1, 5, 4, 6), (1, 1, 4, 6)),
    ((2, 64, 3, 3), (1, 64, 1, 1)),
    ((2, 13, 100), (2, 13, 100)),
    ((2, 13, 33), (33,)),
    ((3, 100), (3, 100)),
    ((3, 1), (1, 31)),
    ((29,), (29,)),
)


def _integers(g: torch.Generator, n: int) -> list[int]:
    return [int(v) for v in torch.randint(-128, 128, (n,), generator=g)]


def _sample(g: torch.Generator, a: tuple[int, ...], b: tuple[int, ...], *scalars: Any) -> Sample:
    (zp,) = _integers(g, 1)
    lo, hi = random_clamp(g)
    label = " ".join("x".join(map(str, s)) for s in (a, b))
    return Sample((Act(random_int8(g, *a)), Act(random_int8(g, *b)), *scalars, zp, lo, hi), label=label)


def _samples_add(g: torch.Generator) -> Iterator[Sample]:
    for i, (a, b) in enumerate(_SHAPES):
        a_zp, b_zp = _integers(g, 2)
        a_m, b_m = (0.2 + 0.8 * torch.rand(2, generator=g)).tolist()
        yield _sample(g, a, b, a_zp, a_m, b_zp, -b_m if i % 3 == 2 else b_m)
    # Equal powers of two make every second sum a tie.
    yield _sample(g, (4, 64), (4, 64), 0, 0.5, 0, 0.5)


def _samples_mul(g: torch.Generator) -> Iterator[Sample]:
    for a, b in _SHAPES:
        a_zp, b_zp = _integers(g, 2)
        yield _sample(g, a, b, a_zp, b_zp, arith.float32(0.003 + 0.01 * float(torch.rand(1, generator=g))))


class _Sum(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class _Difference(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.sub(a, b, alpha=2)


class _Double(nn.Module):
    def forward(self, a: Tensor) -> Tensor:
        return a + a


class _ClampedSum(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.relu(a + b)


class _Product(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b


def _examples_add(g: torch.Generator) -> Iterator[Example]:
    x, y = torch.randn(2, 5, 7, 3, generator=g), torch.randn(2, 5, 1, 1, generator=g)
    yield Example(_Sum(), (x, x.flip(0)))
    yield Example(_Sum(), (x, y))
    yield Example(_ClampedSum(), (y, x))
    yield Example(_Difference(), (x, y))
    yield Example(_Double(), (x,))


def _examples_mul(g: torch.Generator) -> Iterator[Example]:
    x, y = torch.randn(2, 5, 7, 3, generator=g), torch.randn(2, 5, 1, 1, generator=g)
    yield Example(_Product(), (x, y))
    yield Example(_Product(), (x, x.flip(0)))


ADD = Row(
    name="add",
    schema=(
        "(Tensor a, Tensor b, int a_zero_point, float a_m, int b_zero_point, float b_m, "
        "int zero_point, int lo, int hi) -> Tensor"
    ),
    aten=(aten.add.Tensor, aten.sub.Tensor),
    reference=add,
    fake=add_fake,
    fuse=_fuse_add,
    samples=_samples_add,
    examples=_examples_add,
    decline=_decline,
    operands=both,
    absorbs_clamp=True,
)

MUL = Row(
    name="mul",
    schema=(
        "(Tensor a, Tensor b, int a_zero_point, int b_zero_point, float m, int zero_point, int lo, int hi) -> Tensor"
    ),
    aten=(aten.mul.Tensor,),
    reference=mul,
    fake=mul_fake,
    fuse=_fuse_mul,
    samples=_samples_mul,
    examples=_examples_mul,
    decline=_decline,
    operands=both,
    absorbs_clamp=True,
)

ROWS = (ADD, MUL)
