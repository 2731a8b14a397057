"""Rules: operators that do nothing here, constants that can be computed now, and multi-output splits.

dropout(x), clone(x), detach(x), to(x, its own type), reshape(x, its own shape)  ->  x
op(constants)                                                                   ->  a constant
split(x)[i], chunk(x)[i], unbind(x)[i]                                          ->  slice(x), select(x)
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir import Program, add_constant, constant, copy_meta, is_constant, origin, shape_of
from qcompile.rewrite import Rule, call

aten = torch.ops.aten

_COPIES = (
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.lift_fresh_copy.default,
)
_CASTS = (
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.type_as.default,
)
_SHAPED = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default)
_LARGEST_CONSTANT = 1 << 24  # elements; a larger one is computed at run time, not stored


def _take_first(program: Program, node: fx.Node) -> fx.Node:
    return node.args[0]  # type: ignore[return-value]


def _always(program: Program, node: fx.Node) -> str | None:
    return None


def _check_same_value(program: Program, node: fx.Node) -> str | None:
    before, after = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    if before.dtype != after.dtype:
        return ""
    if [str(s) for s in before.shape] != [str(s) for s in after.shape]:
        return ""
    return None


IDENTITY = Rule("remove_identity", _COPIES, _always, _take_first)
SAME = Rule("remove_no_op", (*_CASTS, *_SHAPED), _check_same_value, _take_first)


# --- constants ------------------------------------------------------------------------------------


def _check_constant(program: Program, node: fx.Node) -> str | None:
    target: Any = node.target
    value = node.meta.get("val")
    if not node.all_input_nodes or not all(map(is_constant, node.all_input_nodes)):
        return ""
    if not isinstance(value, Tensor) or torch.Tag.nondeterministic_seeded in target.tags:
        return "its value is not one fixed tensor"
    return f"it would store {value.numel()} elements" if value.numel() > _LARGEST_CONSTANT else None


def _compute(program: Program, node: fx.Node) -> fx.Node:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: constant(program.graph_module, n))
    target: Any = node.target
    with torch.no_grad():
        value = target(*args, **kwargs)
    made_of = origin(*node.all_input_nodes) if value.is_floating_point() else None
    return copy_meta(add_constant(program.graph_module, f"{node.name}_constant", value, made_of), node)


# Operators that are applied to weights before use: reshapes, transposes, normalizations, arithmetic.
_ON_WEIGHTS = (
    aten.t.default, aten.transpose.int, aten.permute.default, aten.view.default, aten.reshape.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.flatten.using_ints, aten.slice.Tensor,
    aten.select.int, aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.neg.default,
    aten.exp.default, aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default, aten.pow.Tensor_Scalar,
    aten.sigmoid.default, aten.tanh.default, aten.softplus.default, aten.abs.default, aten.sum.dim_IntList,
    aten.mean.dim, aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim, aten.expand.default, aten.cat.default,
    aten.contiguous.default, aten.clone.default, aten._to_copy.default, aten.index.Tensor, aten.index_select.default,
)  # fmt: skip
CONSTANT = Rule("compute_constant", _ON_WEIGHTS, _check_constant, _compute)


# --- several outputs ------------------------------------------------------------------------------


_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default)
_UNBIND = aten.unbind.int


def _check_split(program: Program, node: fx.Node) -> str | None:
    split: Any = node.args[0]
    if split.target is _UNBIND:
        return None
    if split.target not in _SPLITS:
        return ""
    dim = _dim(split)
    sizes = [shape_of_item[dim] for shape_of_item in (v.shape for v in split.meta["val"])]
    return None if all(isinstance(s, int) for s in sizes) else "its sizes are known at run time only"


def _dim(split: fx.Node) -> int:
    at = 1 if split.target is _UNBIND else 2
    dim: Any = split.args[at] if len(split.args) > at else split.kwargs.get("dim", 0)
    return dim % len(shape_of(split.args[0]))  # type: ignore[arg-type]


def _to_slice(program: Program, node: fx.Node) -> fx.Node:
    split: Any = node.args[0]
    index: Any = node.args[1]
    x, dim = split.args[0], _dim(split)
    if split.target is _UNBIND:
        return call(program, node, aten.select.int, x, dim, index)
    sizes = [v.shape[dim] for v in split.meta["val"]]
    start = math.fsum(sizes[:index])
    return call(program, node, aten.slice.Tensor, x, dim, int(start), int(start) + sizes[index])


SLICE = Rule("split_to_slice", (operator.getitem,), _check_split, _to_slice)

# A view needs the strides that its input had before copies were dropped; a reshape needs none.
RESHAPE = Rule(
    "view_to_reshape",
    (aten.view.default, aten._unsafe_view.default),
    _always,
    lambda program, node: call(program, node, aten.reshape.default, *node.args),
)

RULES = (IDENTITY, SAME, CONSTANT, SLICE, RESHAPE)
