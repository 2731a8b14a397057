"""Rebuild the convolutions and linear layers that stay float: bias, residual add and clamp fused into each.

    conv2d(x, w, b), linear(x, w, b)           ->  float_conv2d(x, w, b), float_linear(x, w, b)      w constant
    float_op(x, ...) + r                       ->  float_op(x, ..., residual=r)        of equal shapes
    clamp(float_op(x, ...), lo, hi)            ->  float_op(x, ..., lo, hi)
    float_conv2d(constant_pad_nd(x), ...)      ->  float_conv2d(x, ..., padding)       by fold_padding's rule

For these a target has kernels of its own, which keep activations in the layout that convolutions like.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from qcompile import rewrite
from qcompile.ir import LedgerRow, Program, Property, add_constant, constant, is_constant, is_tensor, shape_of
from qcompile.ops import clamp_bounds
from qcompile.ops.conv import geometry
from qcompile.ops.real import BFLOAT16, EPILOGUE, FLOAT32, FLOAT_CONV2D, FLOAT_LINEAR, OPS, numerics_of
from qcompile.passes.base import Context, Pass
from qcompile.passes.fold_padding import FOLD
from qcompile.rewrite import Rule, call
from qcompile.sites import COVERS, only_user, other_operand

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseFloat(Pass):
    """Integer -> integer.

    Attributes:
        numerics: what the factors of products are rounded to: "float32" (not at all) or "bfloat16".
    """

    name: ClassVar[str] = "fuse_float"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.INTEGER})
    numerics: str = FLOAT32

    def run(self, program: Program, context: Context) -> bool:
        start = Rule("fuse_float", (aten.conv2d.default, aten.conv1d.default, aten.linear.default), _check, self._start)
        changed = rewrite.apply((start, ADD, CLAMP, FOLD), program, context)
        made = [node for node in program.graph.nodes if node.target in OPS]
        for node in made:
            if numerics_of(node) == BFLOAT16 and all(user.op != "output" for user in node.users):
                node.args = _with(node, 3, True)
        program.ledger.rows = _ledger(program, made)
        return changed

    def _start(self, program: Program, node: fx.Node) -> fx.Node:
        x, weight, bias = (*node.args, None)[:3]
        if bias is None:
            zeros = torch.zeros(shape_of(weight)[0])  # type: ignore[arg-type]
            bias = add_constant(program.graph_module, f"{node.name}_bias", zeros)
        end = (-math.inf, math.inf, self.numerics, False)
        if node.target is aten.linear.default:
            return _covering(call(program, node, FLOAT_LINEAR, x, weight, bias, *end), node)
        kernel = shape_of(weight)[2:]  # type: ignore[arg-type]
        stride, pads, dilation = geometry(node, kernel)
        if len(kernel) == 1:
            x = call(program, node, aten.unsqueeze.default, x, 2)
            values = constant(program.graph_module, weight)  # type: ignore[arg-type]
            weight = add_constant(program.graph_module, f"{node.name}_weight", values[:, :, None])
            stride, pads, dilation = [1, *stride], [(0, 0), *pads], [1, *dilation]
        groups = node.args[6] if len(node.args) > 6 else 1
        padding = [p for pair in pads for p in pair]
        new = call(program, node, FLOAT_CONV2D, x, weight, bias, stride, padding, dilation, groups, *end)
        _covering(new, node)
        return new if len(kernel) == 2 else call(program, node, aten.squeeze.dim, new, 2)


def _check(program: Program, node: fx.Node) -> str | None:
    x, weight, bias = (*node.args, None)[:3]
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    if is_constant(x):
        return "its input is constant"
    if not is_constant(weight) or not (bias is None or is_constant(bias)):  # type: ignore[arg-type]
        return "its weight is computed at run time"
    if node.target is not aten.linear.default and len(shape_of(x)) != len(shape_of(weight)):
        return "its input has no batch dimension"
    channels = shape_of(x)[-1 if node.target is aten.linear.default else 1]
    if not isinstance(channels, int) or len(shape_of(x)) < 2:
        return "its number of channels is dynamic, or it has no batch dimension"
    kinds = {n.meta["val"].dtype for n in (x, weight)}
    return None if kinds == {torch.float32} else f"it computes in {', '.join(map(str, kinds))}"


def _with(node: fx.Node, at: int, value: Any) -> tuple[Any, ...]:
    """The arguments of a float operator, with another lo (0), hi (1), numerics (2) or rounded (3)."""
    args = list(node.args)
    args[EPILOGUE[node.target] + at] = value
    return tuple(args)


def _covering(new: fx.Node, *old: fx.Node) -> fx.Node:
    new.meta[COVERS] = tuple(name for n in old for name in n.meta.get(COVERS, (n.name,)))
    return new


def _absorbs(node: Any, user: fx.Node) -> bool:
    """Whether `node` is a float operator that `user` alone reads, and without a clamp of its own."""
    if not isinstance(node, fx.Node) or node.target not in OPS or only_user(node) is not user:
        return False
    at = EPILOGUE[node.target]
    return node.args[at : at + 2] == (-math.inf, math.inf)


def _adds(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(float operator, residual) of a sum."""
    able = [n for n in node.all_input_nodes if _absorbs(n, node) and "residual" not in n.kwargs]
    pairs = [(n, other_operand(node, n)) for n in able]
    # Of two, the later one: the other is then a residual that is already there.
    return next(((n, other) for n, other in reversed(pairs) if other is not None and _is_float32(other)), None)


def _is_float32(node: fx.Node) -> bool:
    return is_tensor(node) and node.meta["val"].dtype is torch.float32


def _check_add(program: Program, node: fx.Node) -> str | None:
    return None if _adds(node) is not None else ""


def _add(program: Program, node: fx.Node) -> fx.Node:
    found = _adds(node)
    assert found is not None
    root, other = found
    return _covering(call(program, root, root.target, *root.args, residual=other), root, node)


def _check_clamp(program: Program, node: fx.Node) -> str | None:
    bounds = clamp_bounds(node)
    return None if bounds is not None and _absorbs(node.args[0], node) else ""


def _clamp(program: Program, node: fx.Node) -> fx.Node:
    root: Any = node.args[0]
    low, high = clamp_bounds(node) or (None, None)
    args = list(root.args)
    at = EPILOGUE[root.target]
    args[at : at + 2] = -math.inf if low is None else float(low), math.inf if high is None else float(high)
    return _covering(call(program, root, root.target, *args, **root.kwargs), root, node)


_CLAMPS = (
    aten.relu.default,
    aten.relu6.default,
    aten.hardtanh.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.clamp_max.default,
)
ADD = Rule("fuse_float_add", (aten.add.Tensor,), _check_add, _add)
CLAMP = Rule("fuse_float_clamp", _CLAMPS, _check_clamp, _clamp)


def _ledger(program: Program, made: list[fx.Node]) -> list[LedgerRow]:
    """The ledger, where what bfloat16 operators cover says so."""
    covered = {name for node in made if numerics_of(node) == BFLOAT16 for name in node.meta[COVERS]}
    return [replace(row, kind=BFLOAT16, reason="") if row.node in covered else row for row in program.ledger.rows]
