"""Which operator it was that TVM could not build: found by building the float operators one by one.

TVM reports an error of the whole module in its own terms. Only when there is one is this done, so that the user
reads the name and the line of an operator of the model.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from qcompile.ir import InputSpec, Program, constant, is_tensor
from qcompile.sites import is_computed
from qcompile.targets.plan import is_int8


def culprit(program: Program, build: Callable[[Program], object]) -> tuple[fx.Node, Exception] | None:
    """The first float operator that `build` fails for by itself, and how."""
    for node in program.graph.nodes:
        target: Any = node.target
        if is_computed(node) and getattr(target, "namespace", "") == "aten" and not is_int8(node):
            try:
                build(alone(program, node))
            except Exception as error:  # noqa: BLE001  TVM raises many types
                return node, error
    return None


def alone(program: Program, node: fx.Node) -> Program:
    """A program of this operator only; the tensors it takes are inputs, and its sizes follow from them."""
    graph_module = fx.GraphModule(nn.Module(), fx.Graph())
    graph, made = graph_module.graph, dict[fx.Node, fx.Node]()

    def copy(old: fx.Node) -> fx.Node:
        if old not in made:
            if old.op == "get_attr":
                graph_module.register_buffer(str(old.target), constant(program.graph_module, old))
                made[old] = graph.get_attr(str(old.target))
            elif is_tensor(old):
                made[old] = graph.placeholder(old.name)
            else:
                made[old] = graph.node_copy(old, copy)
            made[old].meta = dict(old.meta)
        return made[old]

    for operand in node.all_input_nodes:
        copy(operand)
    result = graph.node_copy(node, copy)
    results = [result]
    if not is_tensor(node):
        results = []
        for i, value in enumerate(node.meta["val"]):
            if isinstance(value, Tensor):
                results.append(graph.call_function(operator.getitem, (result, i)))
                results[-1].meta["val"] = value
    graph.output(tuple(results))
    graph_module.recompile()
    inputs = tuple(InputSpec(n.name, (), "float32") for n in graph.nodes if n.op == "placeholder")
    return Program(graph_module, program.stage, inputs, {"list": list(range(len(results)))})
