"""Operators that only move values: the same ATen operator, applied to int8 at the same scale.

These rows have no schema. Their reference is the ATen operator itself, so `fuse` only replaces the
activation by its int8 node (and, in padding, 0.0 by the zero point).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompile.ops.conv import argument
from qcompile.ops.row import Act, Call, Example, Output, Row, Sample, Site, no_objection, random_int8

aten = torch.ops.aten

_Geometry = tuple[tuple[int, ...], tuple[Any, ...]]  # shape of x, the other arguments


class _Apply(nn.Module):
    """A float model with one shape operator between two that compute."""

    def __init__(self, target: Any, args: tuple[Any, ...]) -> None:
        super().__init__()
        self.target, self.args = target, args

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.target(torch.relu(x), *self.args))


def _same(target: Any) -> Callable[[Site], Call]:
    """Call `target` as the ATen node does, on the int8 node."""

    def fuse(site: Site) -> Call:
        (x,) = site.inputs
        return target, (x.node, *site.node.args[1:]), dict(site.node.kwargs)

    return fuse


def _row(
    *targets: Any,
    geometries: Iterable[_Geometry],
    fuse: Callable[[Site], Call] | None = None,
    decline: Callable[[fx.Node], str | None] = no_objection,
    models: tuple[tuple[Any, _Geometry], ...] = (),
) -> Row:
    """A shape row; the integer graph calls `targets[0]`, and `fuse` brings the others to it.

    `models`: operator and geometry of the float examples, where they are not the first of `geometries`.
    """
    target, cases = targets[0], tuple(geometries)

    def samples(g: torch.Generator) -> Iterator[Sample]:
        for shape, args in cases:
            yield Sample((Act(random_int8(g, *shape)), *args), label=f"{'x'.join(map(str, shape))} {args}")

    def examples(g: torch.Generator) -> Iterator[Example]:
        for applied, (shape, args) in models or ((target, cases[0]),):
            yield Example(_Apply(applied, args), (torch.randn(shape, generator=g),))

    return Row(
        name=str(target).removeprefix("aten.").removesuffix(".default"),
        schema=None,
        aten=targets,
        reference=target,
        fake=target,
        fuse=fuse or _same(target),
        samples=samples,
        examples=examples,
        decline=decline,
        output=Output.SHARED,
    )


def _fuse_pad(site: Site) -> Call:
    """Padding with 0.0 is padding with the zero point."""
    (x,) = site.inputs
    return aten.constant_pad_nd.default, (x.node, site.node.args[1], x.qparams.zero_point), {}


def _decline_pad(node: fx.Node) -> str | None:
    general = node.target is aten.pad.default  # (x, pads, mode, value) against (x, pads, value)
    mode = argument(node, 2, "constant") if general else "constant"
    value = argument(node, 3, None) if general else argument(node, 2, 0)
    amounts: Any = node.args[1]
    if mode != "constant":
        return f"its padding mode is {mode!r}"
    if value:
        return f"it pads with {value}: only 0 is sure to be a quantized value"
    if not all(isinstance(amount, int) and amount >= 0 for amount in amounts):
        return "it crops, or its padding is computed at run time"
    return None


_4D, _3D, _2D = (2, 17, 5, 7), (2, 5, 13), (3, 100)
_END = 2**63 - 1  # "to the end" as torch.export writes it

ROWS: tuple[Row, ...] = (
    _row(
        aten.reshape.default,
        aten.view.default,
        aten._unsafe_view.default,
        geometries=(
            (_4D, ([2, -1],)),
            (_4D, ([2, 17, 35],)),
            ((1, 64, 3, 3), ([1, 8, 8, 9],)),
            ((3, 33, 1, 1), ([3, 33],)),
            (_3D, ([10, 13],)),
            (_2D, ([3, 4, 5, 5],)),
            ((29,), ([1, 29, 1, 1],)),
            ((1, 12, 5, 5), ([1, 3, 2, 2, 5, 5],)),
        ),
    ),
    _row(
        aten.permute.default,
        geometries=(
            (_4D, ([0, 2, 3, 1],)),
            (_4D, ([0, 3, 1, 2],)),
            ((1, 64, 3, 3), ([3, 1, 0, 2],)),
            (_3D, ([0, 2, 1],)),
            (_2D, ([1, 0],)),
            ((1, 3, 2, 2, 5, 5), ([0, 1, 4, 2, 5, 3],)),
        ),
    ),
    _row(aten.transpose.int, geometries=((_4D, (1, 2)), (_4D, (-1, -2)), (_3D, (0, 2)), (_2D, (0, 1)))),
    _row(aten.t.default, geometries=((_2D, ()), ((1, 17), ()), ((5, 1), ()))),
    _row(aten.squeeze.default, geometries=(((3, 33, 1, 1), ()), ((1, 17, 1, 5), ()), ((2, 1, 7), ()))),
    _row(aten.squeeze.dim, geometries=(((3, 33, 1, 1), (3,)), ((2, 1, 5, 7), (1,)), (_4D, (1,)), ((1, 19), (-2,)))),
    _row(aten.squeeze.dims, geometries=(((3, 33, 1, 1), ([2, 3],)), ((2, 1, 7, 1), ([-1, 1],)), ((5, 1), ([1],)))),
    _row(aten.unsqueeze.default, geometries=((_4D, (0,)), (_3D, (2,)), (_3D, (-1,)), (_2D, (1,)), ((29,), (0,)))),
    _row(
        aten.slice.Tensor,
        geometries=(
            (_4D, (1, 3, 11)),
            (_4D, (1, 1, _END, 3)),
            (_4D, (2, -3, -1)),
            (_4D, (3, None, 4)),
            (_4D, (0, 1, 2)),
            (_3D, (-1, 0, _END, 2)),
            (_2D, (1, 50, 51)),
            ((1, 64, 3, 3), (1, 16, 48)),
        ),
    ),
    _row(aten.select.int, geometries=((_4D, (1, 3)), (_4D, (-1, -1)), (_3D, (0, 1)), (_2D, (1, 7)))),
    _row(
        aten.expand.default,
        geometries=(((2, 17, 1, 1), ([2, 17, 5, 7],)), ((1, 33), ([3, -1],)), ((1, 5, 1), ([4, 2, 5, 3],))),
    ),
    _row(aten.clone.default, geometries=((_4D, ()), (_3D, ()), (_2D, ()), ((1, 1, 1, 1), ()))),
    _row(
        aten.constant_pad_nd.default,
        aten.pad.default,
        geometries=(
            (_4D, ([1, 1, 1, 1], -7)),
            (_4D, ([0, 3, 2, 0], 127)),
            ((1, 64, 3, 3), ([1, 2], -128)),
            ((3, 33, 1, 1), ([1, 1, 2, 2], 5)),
            ((1, 3, 5, 5), ([1, 0, 0, 1, 2, 3], 17)),
            (_3D, ([2, 1], -1)),
            (_2D, ([0, 28], 33)),
        ),
        fuse=_fuse_pad,
        decline=_decline_pad,
        models=(
            (aten.pad.default, (_4D, ([1, 2, 0, 1],))),
            (aten.pad.default, (_3D, ([1, 2], "constant", 0.0))),
            (aten.constant_pad_nd.default, (_4D, ([1, 1, 1, 1], 0.0))),
        ),
    ),
)
