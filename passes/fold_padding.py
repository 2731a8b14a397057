"""Fold padding into the convolution behind it, which pads each side by its own amount.

    conv2d(constant_pad_nd(x, p, v), padding=q)  ->  conv2d(x, padding=q + p)

where v is the zero point of an int8 x, or 0 of a float one. A conversion between the two moves in front of the padding,
of which it then converts nothing. Before quantization this can be done only where the padding is symmetric (ATen's
convolution has one amount per dimension); our own has one per side, and models that pad as TensorFlow does need it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from qcompile import rewrite
from qcompile.ir import QPARAMS, Program, Property, shape_of
from qcompile.ops.real import FLOAT_CONV2D
from qcompile.passes.base import Context, Pass
from qcompile.rewrite import Rule, call
from qcompile.sites import COVERS, HOLDS, only_user

q = torch.ops.qcompile
_PAD = torch.ops.aten.constant_pad_nd.default
_CONVERSIONS = (q.quantize.default, q.dequantize.default)  # (x, scale or its inverse, zero point)
_ZERO_POINT = 4  # argument position, of the integer convolutions
_PADDING = {q.conv2d.default: 9, q.conv1d.default: 9, FLOAT_CONV2D: 4}  # argument position


@dataclass(frozen=True)
class FoldPadding(Pass):
    """Integer -> integer."""

    name: ClassVar[str] = "fold_padding"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.INTEGER})

    def run(self, program: Program, context: Context) -> bool:
        return rewrite.apply((FOLD,), program, context)


def _before(node: fx.Node) -> tuple[Any, Any]:
    """The operator whose value a convolution reads, and the conversion behind it, if there is one."""
    x: Any = node.args[0]
    return (x.args[0], x) if x.target in _CONVERSIONS else (x, None)


def _neutral(node: fx.Node, conversion: fx.Node | None) -> Any:
    """What a convolution pads with, before `conversion`."""
    if node.target is FLOAT_CONV2D:
        return 0 if conversion is None else conversion.args[2]
    return node.args[_ZERO_POINT] if conversion is None else 0


def _check(program: Program, node: fx.Node) -> str | None:
    pad, conversion = _before(node)
    if pad.target is not _PAD:
        return ""
    amounts, rank = list(pad.args[1]), len(shape_of(node)) - 2
    if len(amounts) > 2 * rank or not all(isinstance(a, int) and a >= 0 for a in amounts):
        return "the padding reaches beyond the image's dimensions, or crops"
    value = pad.args[2] if len(pad.args) > 2 else 0
    return None if value == _neutral(node, conversion) else "the padding is not zero"


def _replace(program: Program, node: fx.Node) -> fx.Node:
    pad, conversion = _before(node)
    args: list[Any] = list(node.args)
    at = _PADDING[node.target]
    sides = len(args[at])
    # ATen lists the last dimension first; a convolution lists the first one first.
    amounts = list(pad.args[1]) + [0] * (sides - len(pad.args[1]))
    extra = [a for i in range(sides - 2, -1, -2) for a in amounts[i : i + 2]]
    args[0] = pad.args[0]
    if conversion is not None:
        args[0] = call(program, conversion, conversion.target, pad.args[0], *conversion.args[1:])
        _keep(conversion, args[0], QPARAMS)
        if HOLDS in conversion.meta:
            args[0].meta[HOLDS] = replace(conversion.meta[HOLDS], node=pad.args[0].name)
    args[at] = [p + e for p, e in zip(args[at], extra, strict=True)]
    new = call(program, node, node.target, *args, **node.kwargs)
    _keep(node, new, QPARAMS, HOLDS)
    covers = node.meta.get(COVERS, ())
    alone = only_user(pad) is (conversion or node) and (conversion is None or only_user(conversion) is node)
    new.meta[COVERS] = (*pad.meta.get(COVERS, (pad.name,)), *covers) if alone else covers
    return new


def _keep(old: fx.Node, new: fx.Node, *keys: str) -> None:
    new.meta.update({key: old.meta[key] for key in keys if key in old.meta})


FOLD = Rule("fold_padding", tuple(_PADDING), _check, _replace)
