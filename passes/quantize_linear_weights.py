"""Give linear layers integer weights where their activations are not calibrated.

Before: aten.linear on float tensors, in a layer that the configuration gives activations="dynamic" or "float".
After: torch.ops.qcompile.linear_dynamic or linear_weight_only. Both take and give float tensors, so nothing around
the layer changes and nothing need have been observed. The ledger gets the layer's row anew.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.nn.functional import pad

from qcompile import ops
from qcompile.arith import INT32_MAX, WEIGHT_MAX
from qcompile.config import QuantConfig
from qcompile.ir import Program, Property, add_constant, constant
from qcompile.ops.row import Weight
from qcompile.passes.base import Context, Pass
from qcompile.rewrite import call
from qcompile.sites import COVERS
from qcompile.weights import quantize_weight

_LINEAR = torch.ops.aten.linear.default
_IN_CACHE = 1 << 17  # weights whose scales are searched for at once
_DYNAMIC, _WEIGHT_ONLY = ops.row("linear_dynamic"), ops.row("linear_weight_only")


@dataclass(frozen=True)
class QuantizeLinearWeights(Pass):
    """Integer -> integer."""

    name: ClassVar[str] = "quantize_linear_weights"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.INTEGER})

    def run(self, program: Program, context: Context) -> bool:
        changed = False
        for node in list(program.graph.nodes):
            if node.target is not _LINEAR or context.config.excludes(node) is not None:
                continue
            config = context.config.of([node])
            if config.activations == "static":
                continue
            reason = _objection(node, config, context)
            if reason:
                _account(program, node, reason=reason)
            elif context.spend(self.name, node):
                reason = _replace(program, node, config)
                changed |= not reason
        return changed


def _objection(node: fx.Node, config: QuantConfig, context: Context) -> str:
    """Why `node` must stay float; "" where it need not."""
    row = _DYNAMIC if config.activations == "dynamic" else _WEIGHT_ONLY
    reason = ops.match(node)[1]
    return reason or (context.objection(row, node) if context.objection is not None else None) or ""


def _replace(program: Program, node: fx.Node, config: QuantConfig) -> str:
    """Put the integer operator in the place of `node`; or why not."""
    x, weight_node, *rest = node.args
    weight = constant(program.graph_module, weight_node)  # type: ignore[arg-type]
    bias = constant(program.graph_module, rest[0]) if rest and rest[0] is not None else weight.new_zeros(len(weight))  # type: ignore[arg-type]
    dynamic = config.activations == "dynamic"
    size = weight.shape[1] if dynamic else config.group_of(weight.shape[1])
    made = in_groups(weight, size, config.weight_max)
    if dynamic and int(made.q.to(torch.int64).abs().sum(1).max()) * WEIGHT_MAX > INT32_MAX:
        reason = "its sums may not fit int32"
        _account(program, node, reason=reason)
        return reason
    row, scale, more = (_DYNAMIC, made.scale[:, 0], ()) if dynamic else (_WEIGHT_ONLY, made.scale, (size,))
    with program.graph.inserting_before(node):
        constants = [
            add_constant(program.graph_module, f"{node.name}_{name}", value)
            for name, value in (("weight", made.q), ("scale", scale), ("bias", bias))
        ]
        new = call(program, node, row.op, x, *constants, *more)
    new.meta[COVERS] = (node.name, *node.meta.get(COVERS, ()))
    node.replace_all_uses_with(new)
    if dynamic:
        _account(program, node, kind="integer", kernel=row.name, reason="")
    else:
        groups = f"groups of {size}" if size < weight.shape[1] else "one group for each output"
        what = f"{config.weight_bits}-bit weights in {groups}, float arithmetic"
        _account(program, node, kind="weight-only", kernel=row.name, reason=what)
    program.graph.erase_node(node)
    return ""


def in_groups(weight: Tensor, size: int, most: int) -> Weight:
    """(N, K) float -> int8 up to `most`, with a scale (N, groups) for each `size` values along K."""
    outputs, features = weight.shape
    rows = pad(weight, (0, -features % size)).reshape(-1, size)  # zeros are exact at every scale
    made = [quantize_weight(part, None, 1.0, most) for part in rows.split(max(1, _IN_CACHE // size))]
    q, scale = (torch.cat([getattr(part, field) for part in made]).reshape(outputs, -1) for field in ("q", "scale"))
    return Weight(q[:, :features].contiguous(), scale)


def _account(program: Program, node: fx.Node, **fields: Any) -> None:
    """Change the ledger's row of `node`."""
    rows = program.ledger.rows
    rows[:] = [replace(row, **fields) if row.node == node.name else row for row in rows]
