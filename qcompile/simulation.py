"""The float graph with the rounding of int8 in some places: any choice of layers, at the speed of eager float.

A layer that is quantized computes with its int8 weights, and reads activations through the rounding of their int8.
A layer that is left in float computes with its float weights; it still reads what a quantized layer has computed
through rounding, because that exists as int8 only. The integer program differs from this by what its accumulators
and multipliers round, which is little.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.arith import QMAX, QMIN
from qcompile.ir import Program, QParams, constant
from qcompile.ops.row import Output
from qcompile.passes.insert_observers import refusal
from qcompile.sites import Group, plan
from qcompile.stages import Stages
from qcompile.weights import by_channel

qd = torch.ops.quantized_decomposed
Values = dict[fx.Node, Any]


@dataclass(frozen=True)
class Rounding:
    """One place at which quantization changes values: the weights of a layer, or one activation.

    Attributes:
        node: the operator with the weights, or whose value is rounded.
        weights: whether it is the weights.
    """

    node: fx.Node
    weights: bool


class Simulation:
    """Of one model.

    Attributes:
        program: the float graph.
        groups: name of its root -> the operators that become one integer operator.
        activations: the tensors that are quantized when every layer is.
    """

    def __init__(self, stages: Stages) -> None:
        self.program = stages.float
        qdq = {node.name: node for node in stages.qdq.graph.nodes}
        self.activations: dict[fx.Node, QParams] = {}
        for node in self.program.graph.nodes:
            if node.name in qdq and (found := _quantization(qdq[node.name])) is not None:
                self.activations[node] = found
        planned = plan(self.program.graph, refusal(stages.context)).values()
        self.groups = {g.root.name: g for g in planned if g.tail in self.activations and _reads(g, self.activations)}
        self._weights = {
            g.root: _weights(stages.qdq, qdq[g.root.name], g.row.weight_arg, g.row.bias_arg)
            for g in self.groups.values()
            if g.row.weight_arg is not None
        }
        self._constants = {
            n: constant(self.program.graph_module, n) for n in self.program.graph.nodes if n.op == "get_attr"
        }

        self._last_read = _last_read(self.program)

    # --- whole runs --------------------------------------------------------------------------------

    def run(self, left: Collection[str], inputs: Sequence[Tensor]) -> list[Tensor]:
        """The flat outputs where the groups called `left` stay float and all others are quantized."""
        active = [g for name, g in self.groups.items() if name not in left]
        members, tails = {m for g in active for m in g.members}, {g.tail for g in active}
        roots = {g.root for g in active}
        values, rounded = self._start(inputs), Values()

        def read(tensor: fx.Node, reader: fx.Node) -> Any:
            if tensor not in self.activations or not (tensor in tails or reader in members):
                return values[tensor]
            if tensor not in rounded:
                rounded[tensor] = self._round(tensor, values[tensor])
            return rounded[tensor]

        for node in self.program.graph.nodes:
            if node.op == "call_function":
                values[node] = self._compute(node, lambda n, node=node: read(n, node), node in roots)
                for done in self._last_read[node]:
                    values.pop(done, None)
                    rounded.pop(done, None)
        return [read(node, node) for node in self.program.outputs()]

    # --- one rounding at a time --------------------------------------------------------------------

    def roundings(self) -> Iterator[Rounding]:
        """Every place at which quantization changes values, in graph order."""
        for node in self.program.graph.nodes:
            if node in self._weights:
                yield Rounding(node, True)
            if node in self.activations:
                yield Rounding(node, False)

    def clean(self, inputs: Sequence[Tensor]) -> Values:
        """Every value of the float graph."""
        values = self._start(inputs)
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                values[node] = self._compute(node, values.__getitem__, False)
        return values

    def noise(self, rounding: Rounding, clean: Values) -> float:
        """What `rounding` alone changes the outputs by: |change|^2 / |output|^2, summed over the outputs.

        Only what comes after it is computed again.
        """
        changed: Values = {}
        start = rounding.node
        if rounding.weights:
            changed[start] = self._compute(start, clean.__getitem__, True)
        else:
            changed[start] = self._round(start, clean[start])
        for node in self.program.graph.nodes:
            if node is not start and any(n in changed for n in node.all_input_nodes) and node.op == "call_function":
                changed[node] = self._compute(node, lambda n: changed.get(n, clean[n]), False)
        return sum(_relative(changed.get(n, clean[n]), clean[n]) for n in self.program.outputs())

    # --- parts -------------------------------------------------------------------------------------

    def _start(self, inputs: Sequence[Tensor]) -> Values:
        return {**self._constants, **dict(zip(self.program.placeholders(), inputs, strict=True))}

    def _round(self, tensor: fx.Node, value: Tensor) -> Tensor:
        params = self.activations[tensor]
        bounds = params.scale, params.zero_point, QMIN, QMAX, torch.int8
        return qd.dequantize_per_tensor.default(qd.quantize_per_tensor.default(value, *bounds), *bounds)

    def _compute(self, node: fx.Node, read: Any, quantized: bool) -> Any:
        target: Any = node.target
        read_args, kwargs = fx.node.map_arg((node.args, node.kwargs), read)
        args: dict[int, Any] = dict(enumerate(read_args))
        if quantized:
            args |= self._weights.get(node, {})  # the bias may be one that the float layer has not
        with torch.no_grad():
            return target(*[args[at] for at in sorted(args)], **kwargs)


def shares_scale(group: Group) -> bool:
    """Whether a group only moves values, so that what it computes of rounded values is rounded already."""
    return group.row.output is Output.SHARED


def _last_read(program: Program) -> dict[fx.Node, list[fx.Node]]:
    """Node -> the values that nothing behind it reads."""
    found: dict[fx.Node, list[fx.Node]] = {node: [] for node in program.graph.nodes}
    seen = set(program.outputs())
    for node in reversed(program.graph.nodes):
        found[node] = [n for n in node.all_input_nodes if n not in seen]
        seen.update(node.all_input_nodes)
    return found


def _reads(group: Group, activations: Collection[fx.Node]) -> bool:
    return all(n in activations for n in group.inputs)


def _quantization(node: fx.Node) -> QParams | None:
    """How a tensor of the qdq graph is quantized, if it is."""
    for user in node.users:
        if user.target is qd.quantize_per_tensor.default:
            scale, zero_point, qmin, qmax = user.args[1:5]
            return QParams(scale, zero_point, qmin, qmax)  # type: ignore[arg-type]
    return None


def _weights(program: Program, node: fx.Node, weight_arg: int, bias_arg: int | None) -> dict[int, Tensor | None]:
    """Argument positions of a layer in the qdq graph -> the weights and the bias that it computes with."""
    dequantize: Any = node.args[weight_arg]
    q, scale = (constant(program.graph_module, n).float() for n in dequantize.args[:2])
    found: dict[int, Tensor | None] = {weight_arg: q * by_channel(scale, q)}
    if bias_arg is not None and len(node.args) > bias_arg:
        bias: Any = node.args[bias_arg]
        found[bias_arg] = None if bias is None else constant(program.graph_module, bias)
    return found


def _relative(changed: Any, clean: Any) -> float:
    if not isinstance(clean, Tensor):
        return 0.0
    power = float(clean.double().square().sum())
    noise = float((changed.double() - clean.double()).square().sum())
    return noise / power if power else noise
