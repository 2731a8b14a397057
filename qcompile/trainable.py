"""A block of a qdq graph whose weights, biases and scales are parameters, and the block that it becomes again.

    weight            rne(clamp(s (q + d) / s'))          s' = s exp(r), one r per output channel
    bias              b + u e                             u = s s_x sqrt(taps)
    activation scale  s exp(r)

q, s and b are what the qdq graph holds, and d, e and r are learned, from zero on: so the block begins as what it is.
d is in steps of the weight, and begins half a step from where an integer changes: only what many samples agree upon
moves it. u is about what rounding every weight of a row adds to what it computes, for a typical input of one step.
Rounding passes gradients as in `qcompile.fakequant`. Zero points stay. Activations that an operator takes as they are
(a maximum, a reshape) keep one scale, that of the first; one that an earlier block has chosen is not learned again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qcompile.blocks import Block
from qcompile.fakequant import fake_quantize, fake_quantize_bias, fake_quantize_weight, integers, learned_scale
from qcompile.ir import constant
from qcompile.ops.row import Output
from qcompile.qdq import is_dequantize, is_quantize, params
from qcompile.sites import read
from qcompile.twins import Layer
from qcompile.weights import by_channel, smallest_scale


class TrainableBlock:
    """Called with the number of a sample, it returns what the block makes of it: output node -> tensor.

    Attributes:
        weights, biases, scales: the parameters, leaf tensors.
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        self._layers = {layer.node: _TrainableLayer(layer) for layer in block.layers}
        weights = {layer.node.args[1] for layer in block.layers}
        self._nodes = [node for node in block.nodes if node not in weights and node not in block.inputs]
        self._same = _same_scale(block.program.graph)
        found = (self._same.get(node, node) for node in block.nodes if is_quantize(node))
        self._ratios = {q: _parameter(()) for q in found if q in block.nodes}
        self.weights = [layer.steps for layer in self._layers.values()]
        self.biases = [layer.shift for layer in self._layers.values()]
        self.scales = [*(layer.log_ratio for layer in self._layers.values()), *self._ratios.values()]

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.weights, *self.biases, *self.scales]

    def __call__(self, sample: int) -> dict[fx.Node, Tensor]:
        values = {node: held[sample] for node, held in self.block.inputs.items()}
        for node in self._nodes:
            values[node] = self._step(node, values)
        return {node: values[node] for node in self.block.outputs}

    def _step(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            return constant(self.block.program.graph_module, node)
        if is_dequantize(node):
            return values[node.args[0]]  # type: ignore[index]
        if is_quantize(node):
            p = params(node)
            zero_point = torch.tensor(p.zero_point, dtype=torch.int32)
            return fake_quantize(values[node.args[0]], self._scale(node), zero_point, p.qmin, p.qmax)  # type: ignore[index]
        target: Any = node.target
        if node in self._layers:
            x: Any = node.args[0]
            weight, bias = self._layers[node].quantized(self._scale(x.args[0]))
            return target(values[x], weight, bias, *node.args[3:], **node.kwargs)
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        return target(*args, **kwargs)

    def _scale(self, quantize: fx.Node) -> Tensor:
        """Of an activation, as it is now."""
        scale, ratio = torch.tensor(params(quantize).scale), self._ratios.get(self._same.get(quantize, quantize))
        return scale if ratio is None else learned_scale(scale, ratio)

    @torch.no_grad()
    def write(self) -> None:
        """Put what was learned into the qdq graph."""
        scales = {q: float(self._scale(q)) for q in self._ratios}
        for node, layer in self._layers.items():
            x: Any = node.args[0]
            layer.write(self._scale(x.args[0]))
        for q in [node for node in self.block.program.graph.nodes if is_quantize(node)]:
            scale = scales.get(self._same.get(q, q))
            if scale is not None:
                for each in (q, *filter(is_dequantize, q.users)):
                    each.args = (each.args[0], scale, *each.args[2:])


class _TrainableLayer:
    """The parameters of one layer."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._bias = torch.zeros(len(layer.q)) if layer.bias is None else layer.bias
        self._unit = layer.scale * layer.input_scale * max(1, layer.q[0].numel()) ** 0.5
        self.steps, self.log_ratio, self.shift = map(_parameter, (layer.q.shape, layer.scale.shape, layer.scale.shape))

    def quantized(self, input_scale: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias on their grids."""
        weight, scale, bias = self._values(input_scale)
        return fake_quantize_weight(weight, scale, self._layer.most), fake_quantize_bias(bias, input_scale, scale)

    def _values(self, input_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weight, its scale, bias, before they are rounded."""
        bias = self._bias + self._unit * self.shift
        least = smallest_scale(bias.detach(), float(input_scale.detach()))
        scale = torch.maximum(learned_scale(self._layer.scale, self.log_ratio), least)
        return (self._layer.q + self.steps) * by_channel(self._layer.scale, self.steps), scale, bias

    def write(self, input_scale: Tensor) -> None:
        weight, scale, bias = self._values(input_scale)
        self._layer.q.copy_(integers(weight, by_channel(scale, weight), -self._layer.most, self._layer.most))
        self._layer.scale.copy_(scale)
        self._layer.set_bias(bias)


def _parameter(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, requires_grad=True)


def _same_scale(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Quantize node -> the first of those that must have its scale, where it is not the first itself."""
    first: dict[fx.Node, fx.Node] = {}
    for group in read(graph, is_dequantize, is_quantize):
        if group.row.output is Output.SHARED:
            before: Any = group.operands[0].args[0]
            first |= {q: first.get(before, before) for q in group.tail.users if params(q) == params(before)}
    return first
