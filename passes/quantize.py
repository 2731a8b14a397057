"""Turn what the observers measured into quantize/dequantize pairs, and weights into integers.

Before: observer(x). After: dequantize_per_tensor(quantize_per_tensor(x)); the float weight of an
integer operator becomes dequantize_per_channel(int8). This is the PT2E convention. For its scales see
`qcompile.weights`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import fx

from qcompile.arith import QMAX, QMIN
from qcompile.ir import ORIGIN, Program, Property, QParams, add_constant, constant, copy_meta
from qcompile.observers import Observer, root
from qcompile.passes.base import Context, Pass
from qcompile.sites import STAYS_FLOAT, Group, place, read
from qcompile.weights import quantize_weight

qd = torch.ops.quantized_decomposed


@dataclass(frozen=True)
class Quantize(Pass):
    """Observed -> qdq."""

    name: ClassVar[str] = "quantize"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.OBSERVED, Property.CALIBRATED})
    establishes: ClassVar[frozenset[Property]] = frozenset({Property.QDQ})

    def run(self, program: Program, context: Context) -> bool:
        observers = {n: _observer(program, n) for n in program.graph.nodes if n.op == "call_module"}
        for node, observer in list(observers.items()):
            measured = root(observer)
            if not (measured.finite and measured.seen):
                _give_up(node, "never occurred" if measured.finite else "are not finite (or beyond 1e30)")
                del observers[node]
        # Weights first: an observer says the scale of the activation that they meet.
        found = {observer: observer.qparams() for observer in set(map(root, observers.values()))}
        params = {node: found[root(observer)] for node, observer in observers.items()}
        groups = list(read(program.graph, observers.__contains__, observers.__contains__))
        for group in groups:
            if group.row.weight_arg is not None:
                _quantize_weight(program, context, group, params[group.operands[0]].scale)
        for node in observers:
            _quantize_activation(program, node, params[node])
        return bool(observers)


def _observer(program: Program, node: fx.Node) -> Observer:
    observer = program.graph_module.get_submodule(str(node.target))
    assert isinstance(observer, Observer)
    return observer


def _give_up(node: fx.Node, why: str) -> None:
    """Leave a tensor float: its values are no measurement (an attention mask of -infinity)."""
    (tensor,) = node.all_input_nodes
    for user in (tensor, *node.users):
        user.meta.setdefault(STAYS_FLOAT, f"the values of {place(tensor)} {why}")
    node.replace_all_uses_with(tensor)
    node.graph.erase_node(node)


def _quantize_weight(program: Program, context: Context, group: Group, input_scale: float) -> None:
    node, row = group.root, group.row
    assert row.weight_arg is not None
    args: list[Any] = list(node.args)
    bias_node = args[row.bias_arg] if row.bias_arg is not None and len(args) > row.bias_arg else None
    bias = constant(program.graph_module, bias_node) if bias_node is not None else None
    weight_node: fx.Node = args[row.weight_arg]
    original = constant(program.graph_module, weight_node)
    most = context.config.of(group.members).weight_max
    weight = quantize_weight(original, bias, input_scale, most)
    with program.graph.inserting_before(node):
        q = add_constant(program.graph_module, f"{weight_node.target}_q", weight.q)
        scale = add_constant(program.graph_module, f"{weight_node.target}_scale", weight.scale)
        zero = add_constant(program.graph_module, f"{weight_node.target}_zero_point", torch.zeros(len(weight.q)).long())
        new = program.graph.call_function(
            qd.dequantize_per_channel.default, (q, scale, zero, 0, -most, most, torch.int8)
        )
    new.meta["val"] = weight_node.meta["val"]
    args[row.weight_arg] = copy_meta(new, node)
    context.originals[new.name] = original
    if ORIGIN in weight_node.meta:
        new.meta[ORIGIN] = weight_node.meta[ORIGIN]
    node.args = tuple(args)


def _quantize_activation(program: Program, node: fx.Node, params: QParams) -> None:
    bounds = (params.scale, params.zero_point, QMIN, QMAX, torch.int8)
    (tensor,) = node.all_input_nodes
    with program.graph.inserting_before(node):
        q = program.graph.call_function(qd.quantize_per_tensor.default, (tensor, *bounds))
        dq = program.graph.call_function(qd.dequantize_per_tensor.default, (q, *bounds))
    copy_meta(q, tensor)
    copy_meta(dq, tensor)
    node.replace_all_uses_with(dq)
    program.graph.erase_node(node)
