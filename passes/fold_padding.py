"""Fold padding into the convolution behind it, which pads each side by its own amount.

    conv2d(constant_pad_nd(x, p, v), padding=q)  ->  conv2d(x, padding=q + p)       v = the zero point of x

Before quantization this can be done only where the padding is symmetric (ATen's convolution has one
amount per dimension); the integer convolution has one per side, and models that pad as TensorFlow
does need it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from qcompile import rewrite
from qcompile.ir import QPARAMS, Program, Property, shape_of
from qcompile.passes.base import Context, Pass
from qcompile.rewrite import Rule, call
from qcompile.sites import COVERS, HOLDS, only_user

_CONV2D, _CONV1D = torch.ops.qcompile.conv2d.default, torch.ops.qcompile.conv1d.default
_PAD = torch.ops.aten.constant_pad_nd.default
_ZERO_POINT, _PADDING = 4, 9  # argument positions: x_zero_point, padding


@dataclass(frozen=True)
class FoldPadding(Pass):
    """Integer -> integer."""

    name: ClassVar[str] = "fold_padding"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.INTEGER})

    def run(self, program: Program, context: Context) -> bool:
        return rewrite.apply((FOLD,), program, context)


def _check(program: Program, node: fx.Node) -> str | None:
    pad: Any = node.args[0]
    if pad.target is not _PAD:
        return ""
    amounts, rank = list(pad.args[1]), len(shape_of(node)) - 2
    if len(amounts) > 2 * rank or not all(isinstance(a, int) and a >= 0 for a in amounts):
        return "the padding reaches beyond the image's dimensions, or crops"
    return None if pad.args[2] == node.args[_ZERO_POINT] else "the padding is not the zero point"


def _replace(program: Program, node: fx.Node) -> fx.Node:
    pad: Any = node.args[0]
    args: list[Any] = list(node.args)
    sides = len(args[_PADDING])
    # ATen lists the last dimension first; a convolution lists the first one first.
    amounts = list(pad.args[1]) + [0] * (sides - len(pad.args[1]))
    extra = [a for i in range(sides - 2, -1, -2) for a in amounts[i : i + 2]]
    args[0] = pad.args[0]
    args[_PADDING] = [p + e for p, e in zip(args[_PADDING], extra, strict=True)]
    new = call(program, node, node.target, *args, **node.kwargs)
    covers = node.meta.get(COVERS, ())
    new.meta[QPARAMS] = node.meta.get(QPARAMS)
    new.meta[COVERS] = (*pad.meta.get(COVERS, ()), *covers) if only_user(pad) is node else covers
    if HOLDS in node.meta:
        new.meta[HOLDS] = node.meta[HOLDS]
    return new


FOLD = Rule("fold_padding", (_CONV2D, _CONV1D), _check, _replace)
