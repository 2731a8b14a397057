"""Fold each batch norm into the convolution or linear before it, or turn it into a depthwise 1x1 one.

    bn(y) = (y - mean) * g + beta,   g = gamma / sqrt(var + eps)
    bn(conv(x, w) + b) = conv(x, w * g[c]) + (b - mean) * g + beta

The layer keeps in its meta what the batch norm says of its values: mean beta, deviation |gamma|.

The algebra runs in float64. A batch norm that follows nothing foldable (in pre-activation networks it
follows an add or a cat) becomes a depthwise 1x1 convolution with weight g and bias beta - mean * g:
the same values, and a row of the op table takes it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompile import rewrite
from qcompile.ir import (
    MOMENTS,
    Moments,
    Origin,
    Program,
    Property,
    add_constant,
    constant,
    is_constant,
    origin,
    shape_of,
)
from qcompile.passes.base import Context, Pass
from qcompile.rewrite import Rule, call
from qcompile.sites import only_user
from qcompile.weights import by_channel

aten = torch.ops.aten
_NORMS = (aten._native_batch_norm_legit_no_training.default, aten.batch_norm.default)
_WEIGHTED = (aten.conv2d.default, aten.conv1d.default, aten.linear.default)


@dataclass(frozen=True)
class FoldBatchnorm(Pass):
    """Float -> float."""

    name: ClassVar[str] = "fold_batchnorm"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.FLOAT, Property.CANONICAL})
    establishes: ClassVar[frozenset[Property]] = frozenset({Property.BATCHNORM_FOLDED})

    def run(self, program: Program, context: Context) -> bool:
        return rewrite.apply((FOLD, TO_DEPTHWISE), program, context)


def norm_of(node: fx.Node) -> fx.Node | None:
    """The batch norm whose normalized value `node` is: its first result, or the node itself."""
    if node.target is aten.batch_norm.default:
        return node
    owner = node.args[0] if node.target is operator.getitem and node.args[1] == 0 else None
    return owner if isinstance(owner, fx.Node) and owner.target in _NORMS else None


def _statistics(node: fx.Node) -> tuple[list[Any], float]:
    """(weight, bias, mean, var) argument nodes and eps of a batch norm."""
    eps = node.args[6] if node.target is _NORMS[0] else node.args[7]
    return list(node.args[1:5]), float(eps)  # type: ignore[arg-type]


def affine(program: Program, norm: fx.Node) -> tuple[Tensor, Tensor]:
    """(g, beta - mean * g) of the batch norm, float64."""
    (weight, bias, mean, var), eps = _statistics(norm)
    mean, var = (constant(program.graph_module, n).to(torch.float64) for n in (mean, var))
    g = torch.rsqrt(var + eps)
    if weight is not None:
        g = g * constant(program.graph_module, weight).to(torch.float64)
    shift = -mean * g
    return g, shift if bias is None else shift + constant(program.graph_module, bias).to(torch.float64)


def moments(program: Program, norm: fx.Node) -> Moments:
    """Of what the batch norm makes: it normalizes, then scales and shifts."""
    (weight, bias, mean, _), _ = _statistics(norm)
    like = constant(program.graph_module, mean).to(torch.float64)
    deviation = torch.ones_like(like) if weight is None else constant(program.graph_module, weight).double().abs()
    return Moments(torch.zeros_like(like) if bias is None else constant(program.graph_module, bias).double(), deviation)


def objection_to_norm(node: fx.Node) -> str | None:
    """Why the batch norm that `node` is cannot be folded anywhere; None when it can, "" when it is none."""
    norm = norm_of(node)
    if norm is None:
        return ""
    statistics, _ = _statistics(norm)
    if any(n is not None and not is_constant(n) for n in statistics) or None in statistics[2:]:
        return "its statistics are computed at run time"
    return None


def _check_fold(program: Program, node: fx.Node) -> str | None:
    objection = objection_to_norm(node)
    if objection is not None:
        return objection
    norm = norm_of(node)
    assert norm is not None
    before: Any = norm.args[0]
    if before.target not in _WEIGHTED:
        return f"it follows {before.target if before.op == 'call_function' else 'an input'}, which has no weights"
    if only_user(before) is not norm:
        return f"{before.name} has other users, which need its value as it is"
    weights = [before.args[1], *before.args[2:3]]
    if any(n is not None and not is_constant(n) for n in weights):
        return f"the weights of {before.name} are computed at run time"
    if before.target is aten.linear.default and len(shape_of(before)) != 2:
        return "it normalizes dimension 1, which is not the features of the linear"
    return None


def _fold(program: Program, node: fx.Node) -> fx.Node:
    norm = norm_of(node)
    assert norm is not None
    before: Any = norm.args[0]
    g, shift = affine(program, norm)
    weight_node, bias_node = before.args[1], before.args[2] if len(before.args) > 2 else None
    weight = constant(program.graph_module, weight_node).to(torch.float64)
    weight = weight * by_channel(g, weight)
    if bias_node is not None:
        shift = shift + constant(program.graph_module, bias_node).to(torch.float64) * g
    (gamma, beta, *_), _ = _statistics(norm)
    of_weight, of_bias = origin(weight_node, gamma), origin(bias_node, beta)
    if of_weight is not None and of_bias is not None:  # it is the layer's bias now
        of_bias = Origin(of_weight.sibling("bias").path, of_bias.trainable)
    new_weight = add_constant(program.graph_module, f"{weight_node.target}_folded", weight.float(), of_weight)
    new_bias = add_constant(program.graph_module, f"{weight_node.target}_folded_bias", shift.float(), of_bias)
    new = call(program, before, before.target, before.args[0], new_weight, new_bias, *before.args[3:])
    new.meta[MOMENTS] = moments(program, norm)
    return new


def _check_depthwise(program: Program, node: fx.Node) -> str | None:
    objection = objection_to_norm(node)
    if objection is not None:
        return objection
    norm = norm_of(node)
    assert norm is not None
    rank = len(shape_of(norm.args[0]))  # type: ignore[arg-type]
    return None if rank in (2, 3, 4) else f"its input has {rank} dimensions"


def _to_depthwise(program: Program, node: fx.Node) -> fx.Node:
    norm = norm_of(node)
    assert norm is not None
    g, shift = affine(program, norm)
    x: Any = norm.args[0]
    rank, channels = len(shape_of(x)), len(g)
    spatial = 2 if rank == 4 else 1
    (gamma, beta, *_), _ = _statistics(norm)
    rows = g.float().reshape(channels, 1, *[1] * spatial)
    weight = add_constant(program.graph_module, f"{node.name}_scale", rows, origin(gamma))
    bias = add_constant(program.graph_module, f"{node.name}_shift", shift.float(), origin(beta))
    if rank == 2:
        x = call(program, norm, aten.unsqueeze.default, x, 2)
    conv = aten.conv2d.default if rank == 4 else aten.conv1d.default
    geometry = ([1] * spatial, [0] * spatial, [1] * spatial, channels)
    new = call(program, norm, conv, x, weight, bias, *geometry)
    new.meta[MOMENTS] = moments(program, norm)
    return call(program, norm, aten.squeeze.dim, new, 2) if rank == 2 else new


_ANCHORS = (operator.getitem, aten.batch_norm.default)
FOLD = Rule("fold_batchnorm", _ANCHORS, _check_fold, _fold)
TO_DEPTHWISE = Rule("batchnorm_to_depthwise", _ANCHORS, _check_depthwise, _to_depthwise)
