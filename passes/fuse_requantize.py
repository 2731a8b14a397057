"""Rebuild a qdq graph out of integer operators: requantize, relu and residual add fused into each.

Before: dequantize -> aten op (-> add -> relu) -> quantize. After: one ``torch.ops.qcompile`` call,
int8 in, int8 out. Where float code meets integer code there is an explicit quantize or dequantize.
Here the ledger gets its rows: every operator of the graph, and what became of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from qcompile import arith, ops
from qcompile.arith import inverse_scale
from qcompile.ir import QPARAMS, LedgerRow, Program, Property, QParams, add_constant, constant, copy_meta, where
from qcompile.ops.row import Output, QValue, Site, Weight
from qcompile.ops.unary import LOOKUP, clamp_bounds, requantize_table
from qcompile.passes.base import Context, Pass
from qcompile.qdq import MARKS, is_dequantize, is_quantize, lift_weights, params
from qcompile.sites import COVERS, HOLDS, STAYS_FLOAT, Group, Held, computes_no_reals, is_computed, is_shape, read
from qcompile.weights import by_channel


@dataclass(frozen=True)
class FuseRequantize(Pass):
    """Qdq -> integer."""

    name: ClassVar[str] = "fuse_requantize"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.QDQ})
    establishes: ClassVar[frozenset[Property]] = frozenset({Property.INTEGER})

    def run(self, program: Program, context: Context) -> bool:
        weights = {node: lifted.weight for node, lifted in lift_weights(program).items()}
        groups = [g for g in read(program.graph, is_dequantize, is_quantize) if _keeps_scale(g)]
        program.ledger.rows = _ledger(program, groups)
        builder = _Builder(program, groups, weights)
        for node in program.graph.nodes:
            builder.add(node)
        builder.new.recompile()
        program.graph_module = builder.new
        return True


def _keeps_scale(group: Group) -> bool:
    """An operator that only moves values can keep them int8 only at one and the same scale."""
    (q,) = group.tail.users
    if group.row.output is not Output.SHARED or params(q) == params(group.operands[0]):
        return True
    group.root.meta[STAYS_FLOAT] = "its output is quantized differently from its input"
    return False


def _ledger(program: Program, groups: list[Group]) -> list[LedgerRow]:
    member_of = {member: group for group in groups for member in group.members}
    rows = []
    for node in program.graph.nodes:
        if not is_computed(node) or node.target in MARKS:
            continue
        _, reason = ops.match(node)
        kind, kernel = "float", ""
        if node in member_of:
            kernel = member_of[node].row.name
            kind, reason = "shape" if is_shape(member_of[node].row) else "integer", ""
        elif computes_no_reals(node) or is_shape(ops.find(node)):
            kind, reason = "shape", ""
        else:
            reason = node.meta.get(STAYS_FLOAT) or reason or "its operands or its output are not quantized"
            if ops.find(node) is None and (declined := _declined(program, node)):
                reason += f": {declined}"
        rows.append(LedgerRow(str(node.target), node.name, kind, kernel, reason, where(node)))
    return rows


def _declined(program: Program, node: fx.Node) -> str:
    """Why no rule brought `node`, or one of its several results, into the form of an operator that there is."""
    names = [node.name, *(user.name for user in node.users if not is_computed(user))]
    return "; ".join(dict.fromkeys(why for _, name, why in program.ledger.declined if name in names))


class _Builder:
    """Builds the integer graph node by node, in the order of the qdq graph."""

    def __init__(self, program: Program, groups: list[Group], weights: dict[fx.Node, Weight]) -> None:
        self.old = program.graph_module
        self.new = fx.GraphModule(nn.Module(), fx.Graph())
        self.groups = {g.tail: g for g in groups}
        self.members = {n for g in groups for n in g.members}
        self.weights = weights
        self.real: dict[fx.Node, fx.Node] = {}  # old node -> new node that holds its float (or index) value
        self.int8: dict[fx.Node, QValue] = {}  # old quantize node -> its int8 value

    def add(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.real[node] = self.new.graph.node_copy(node)
        elif node.op == "output":
            self.new.graph.node_copy(node, self.value)
        elif is_quantize(node):
            self.int8[node] = self.quantized(node)
        elif node.op == "call_function" and node not in self.members and not is_dequantize(node):
            # The size of a tensor is that of its int8 value: no reason to dequantize it.
            sized = node.target is torch.ops.aten.sym_size.int
            self.real[node] = self.new.graph.node_copy(node, self.stored if sized else self.value)

    def value(self, node: fx.Node) -> fx.Node:
        """The new node that holds the float value of `node`; made now if it is a constant or int8."""
        if node not in self.real:
            self.real[node] = self.dequantize(node) if is_dequantize(node) else self.copy_constant(node)
        return self.real[node]

    def stored(self, node: fx.Node) -> fx.Node:
        """The new node that holds `node` in any form: int8 if it has one."""
        return self.int8[node.args[0]].node if is_dequantize(node) else self.value(node)  # type: ignore[index]

    def copy_constant(self, node: fx.Node) -> fx.Node:
        value = constant(self.old, node)
        if node in self.weights:  # float code reads a weight that was quantized: give it the real values
            weight = self.weights[node]
            value = weight.q.to(torch.float32) * by_channel(weight.scale, weight.q)
        return add_constant(self.new, str(node.target), value)

    def dequantize(self, node: fx.Node) -> fx.Node:
        q: Any = node.args[0]
        source = self.int8[q]
        args = (source.node, source.qparams.scale, source.qparams.zero_point)
        new = self.new.graph.call_function(torch.ops.qcompile.dequantize.default, args)
        # A graph from elsewhere may dequantize twice; one node serves all.
        self.real.update({user: new for user in q.users if is_dequantize(user)})
        return copy_meta(new, node)

    def quantized(self, node: fx.Node) -> QValue:
        tensor: Any = node.args[0]
        output = params(node)
        if tensor in self.groups:
            new = self.fuse(self.groups[tensor], output)
        elif is_dequantize(tensor):
            return self.rescaled(self.int8[tensor.args[0]], output, tensor)
        else:
            args = (self.value(tensor), inverse_scale(output.scale), output.zero_point)
            new = copy_meta(self.new.graph.call_function(torch.ops.qcompile.quantize.default, args), tensor)
            new.meta[QPARAMS] = output
        new.meta[HOLDS] = Held(tensor.name, output)
        return QValue(new, output)

    def rescaled(self, value: QValue, output: QParams, like: fx.Node) -> QValue:
        """An int8 value that is quantized again."""
        if value.qparams == output:
            return value
        table = self.constant(f"{like.name}_table", requantize_table(value.qparams, output))
        new = self.new.graph.call_function(LOOKUP.op, (value.node, table))
        new.meta[QPARAMS] = output
        return QValue(copy_meta(new, like), output)

    def fuse(self, group: Group, output: QParams) -> fx.Node:
        lo, hi = _clamp(group, output)
        root, row = group.root, group.row
        weight = self.weights.get(root.args[row.weight_arg]) if row.weight_arg is not None else None  # type: ignore[arg-type]
        bias: Any = root.args[row.bias_arg] if row.bias_arg is not None and len(root.args) > row.bias_arg else None
        site = Site(
            node=root,
            inputs=tuple(self.int8[n.args[0]] for n in group.operands),  # type: ignore[index]
            output=output,
            lo=lo,
            hi=hi,
            weight=weight,
            bias=constant(self.old, bias) if bias is not None else None,
            residual=self.int8[group.residual.args[0]] if group.residual is not None else None,  # type: ignore[index]
            constant=self.constant,
        )
        target, args, kwargs = row.fuse(site)
        args, kwargs = fx.node.map_arg((args, kwargs), self.translate)
        new = self.new.graph.create_node("call_function", target, args, kwargs, name=root.name)
        new.meta[COVERS] = tuple(n.name for n in group.members)
        new.meta[QPARAMS] = output
        return copy_meta(new, root)

    def constant(self, name: str, value: Tensor) -> fx.Node:
        return add_constant(self.new, name, value)

    def translate(self, node: fx.Node) -> fx.Node:
        """A node in an integer call: one of the new graph, or a size of the old one."""
        return node if node.graph is self.new.graph else self.value(node)


def _clamp(group: Group, output: QParams) -> tuple[int, int]:
    """The clamp's real bounds in output units."""
    low, high = (clamp_bounds(group.clamp) or (None, None)) if group.clamp is not None else (None, None)

    def quantized(bound: float | None, default: int) -> int:
        if bound is None:
            return default
        # As any value of that tensor is quantized: a bound half way between two steps (6 at a scale of 12 / 255) must
        # not be rounded otherwise here.
        q = arith.quantize(torch.tensor(bound), arith.inverse_scale(output.scale), output.zero_point)
        return max(output.qmin, min(output.qmax, int(q)))

    return quantized(low, output.qmin), quantized(high, output.qmax)
