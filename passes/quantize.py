"""Turn what the observers measured into quantize/dequantize pairs, and weights into int8.

Before: observer(x). After: dequantize_per_tensor(quantize_per_tensor(x)); the float weight of an
integer operator becomes dequantize_per_channel(int8). This is the PT2E convention.

    weights   s_w[c] = r * max |w[c]| / 127, but at least |bias[c]| / (s_x * 2^30), so that the int32
              bias fits (an all-zero channel too)

The ratio r in [0.7, 1] is chosen per channel. With e the rounding error of the channel's weights and
inputs of mean m and variance v, the output is off by m * sum(e) on average and by v * sum(e^2) in
variance. Where mean and deviation are alike, as behind a relu, the expected square of the error is
proportional to

    sum(e)^2 + sum(e^2)

which is what r minimizes. (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction", section 3.2, describe the shift m * sum(e); here the scale avoids it.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, fx

from qcompile.arith import QMAX, QMIN, WEIGHT_MAX
from qcompile.ir import Program, Property, add_constant, constant, copy_meta
from qcompile.observers import Observer, root
from qcompile.ops.row import Weight
from qcompile.passes.base import Context, Pass
from qcompile.sites import STAYS_FLOAT, Group, place, read

qd = torch.ops.quantized_decomposed
_BIAS_MAX = 2**30
_SMALLEST_RATIO, _RATIOS = 0.7, 61


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
        groups = list(read(program.graph, observers.__contains__, observers.__contains__))
        for group in groups:
            if group.row.weight_arg is not None:
                _quantize_weight(program, group, observers[group.operands[0]].qparams().scale)
        for node, observer in observers.items():
            _quantize_activation(program, node, observer)
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


def quantize_weight(weight: Tensor, bias: Tensor | None, input_scale: float) -> Weight:
    """Symmetric int8, one scale per output channel (dimension 0 of `weight`)."""
    rows = weight.to(torch.float32).flatten(1)
    widest = rows.abs().amax(1) / WEIGHT_MAX if rows.shape[1] else rows.new_zeros(len(rows))
    least = torch.zeros_like(widest)
    if bias is not None:
        least = (bias.to(torch.float64).abs() / (input_scale * _BIAS_MAX)).to(torch.float32)
    best, lowest = widest, torch.full_like(widest, torch.inf)
    for ratio in torch.linspace(1.0, _SMALLEST_RATIO, _RATIOS):
        scale = _positive(torch.maximum(widest * ratio, least))
        error = _rounded(rows, scale).mul_(scale[:, None]).sub_(rows)
        cost = error.sum(1).square() + error.square().sum(1)
        best, lowest = torch.where(cost < lowest, scale, best), torch.minimum(cost, lowest)
    return Weight(_rounded(rows, best).to(torch.int8).reshape(weight.shape), best)


def _positive(scale: Tensor) -> Tensor:
    """A channel of zeros has no scale of its own."""
    return torch.where(scale > 2.0**-100, scale, 1.0)


def _rounded(rows: Tensor, scale: Tensor) -> Tensor:
    return torch.div(rows, scale[:, None]).round_().clamp_(-WEIGHT_MAX, WEIGHT_MAX)


def _quantize_weight(program: Program, group: Group, input_scale: float) -> None:
    node, row = group.root, group.row
    assert row.weight_arg is not None
    args: list[Any] = list(node.args)
    bias_node = args[row.bias_arg] if row.bias_arg is not None and len(args) > row.bias_arg else None
    bias = constant(program.graph_module, bias_node) if bias_node is not None else None
    weight_node: fx.Node = args[row.weight_arg]
    weight = quantize_weight(constant(program.graph_module, weight_node), bias, input_scale)
    with program.graph.inserting_before(node):
        q = add_constant(program.graph_module, f"{weight_node.target}_q", weight.q)
        scale = add_constant(program.graph_module, f"{weight_node.target}_scale", weight.scale)
        zero = add_constant(program.graph_module, f"{weight_node.target}_zero_point", torch.zeros(len(weight.q)).long())
        new = program.graph.call_function(
            qd.dequantize_per_channel.default, (q, scale, zero, 0, -WEIGHT_MAX, WEIGHT_MAX, torch.int8)
        )
    new.meta["val"] = weight_node.meta["val"]
    args[row.weight_arg] = copy_meta(new, node)
    node.args = tuple(args)


def _quantize_activation(program: Program, node: fx.Node, observer: Observer) -> None:
    params = observer.qparams()
    bounds = (params.scale, params.zero_point, QMIN, QMAX, torch.int8)
    (tensor,) = node.all_input_nodes
    with program.graph.inserting_before(node):
        q = program.graph.call_function(qd.quantize_per_tensor.default, (tensor, *bounds))
        dq = program.graph.call_function(qd.dequantize_per_tensor.default, (q, *bounds))
    copy_meta(q, tensor)
    copy_meta(dq, tensor)
    node.replace_all_uses_with(dq)
    program.graph.erase_node(node)
