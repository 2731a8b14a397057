"""Give each layer the bias with which what comes out of it is, on average, what it was in float.

    E f(v[c] + d[c]) = E f(y[c])                bias = that of the quantized layer + d

v is what the layer computes in the quantized graph, y what it does in the float graph, and f the function of one value
(relu6, silu) that reads it, if one does. Layer after layer, over samples and positions, so that each also makes up for
the layers before it. The mean is taken behind f. In front of a relu, most values of a sparse channel are ones that it
removes: errors there would decide the bias, and shift the values that pass. So a layer keeps its bias where f reads its
sum with another tensor.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), section 4.2 and
appendix D. There the mean is taken in front of the activation. Without data: `qcompile.passes.correct_bias_analytic`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompile import ops
from qcompile.ir import Program, Property, constant
from qcompile.passes.base import Context, Pass
from qcompile.qdq import is_dequantize, is_quantize
from qcompile.sites import only_user, other_operand
from qcompile.twins import Layer, layers
from qcompile.weights import by_channel

aten = torch.ops.aten
_STEPS = 4  # of Newton's method; errors are small, and two are mostly enough
_STEP = 0.01  # with which a slope is measured, of the deviation of a channel
_FLAT = 1e-3  # a channel whose mean follows its bias less (relu hardly ever lets it pass) says too little of itself
_SETTLED = 1e-4  # of the deviation of a channel


@dataclass(frozen=True)
class CorrectBias(Pass):
    """qdq -> qdq, with other biases.

    Raises:
        CalibrationError: calibration kept no samples.
    """

    name: ClassVar[str] = "correct_bias"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.QDQ})

    def run(self, program: Program, context: Context) -> bool:
        changed = False

        def visit(layer: Layer) -> None:
            nonlocal changed
            behind = _behind(layer.node)
            if behind is not None and other_operand(behind, _last_quantization(layer.node)) is not None:
                sum_behind = _behind(behind)
                if sum_behind is not None and _is_function(sum_behind):
                    reason = f"{sum_behind.name} reads the sum of it and another, and its mean decides"
                    return program.ledger.decline(self.name, layer.node, reason)
            shift = _shift(layer, behind if behind is not None and _is_function(behind) else None)
            if bool(shift.any()):
                layer.set_bias(shift if layer.bias is None else layer.bias.double() + shift)
                changed = True

        for done, total in layers(program, context.samples, context.originals, visit):
            context.report("correct bias", done, total)
        return changed


def _last_quantization(node: fx.Node) -> fx.Node:
    """`node`, or the last of the quantizations that alone read it."""
    user = only_user(node)
    return _last_quantization(user) if user is not None and (is_quantize(user) or is_dequantize(user)) else node


def _behind(node: fx.Node) -> fx.Node | None:
    """What alone reads `node`, past quantizations."""
    return only_user(_last_quantization(node))


def _is_function(node: fx.Node) -> bool:
    """Whether it computes each value from one value."""
    row, _ = ops.match(node)
    return row is not None and row.name == "lookup"


def _shift(layer: Layer, behind: fx.Node | None) -> Tensor:
    """d (channels,) float64: the best of some steps of Newton's method, so never worse than none."""
    target: Any = layer.node.target
    axis = -1 if target is aten.linear.default else 1
    weight = layer.q.float() * by_channel(layer.scale, layer.q)
    made = [target(x, weight, layer.bias, *layer.node.args[3:]) for x in layer.inputs]
    along = [1] * (made[0].dim() - 1 - axis % made[0].dim())

    def mean(values: list[Tensor], shift: Tensor) -> Tensor:
        """Of what comes out behind, for each channel."""
        out = [_apply(behind, layer, v + shift.float().reshape(-1, *along)).movedim(axis, 0).flatten(1) for v in values]
        count = sum(o.shape[1] for o in out)
        return torch.stack([o.sum(1, dtype=torch.float64) for o in out]).sum(0) / count

    none = torch.zeros(len(layer.q), dtype=torch.float64)
    deviation = torch.cat([y.movedim(axis, 0).flatten(1) for y in layer.outputs], 1).std(1).double()
    step = _STEP * deviation.clamp(min=torch.finfo(torch.float32).tiny)
    wanted, shift, best, lowest = mean(layer.outputs, none), none, none, torch.full_like(none, torch.inf)
    for _ in range(_STEPS):
        out = mean(made, shift)
        missing, slope = wanted - out, (mean(made, shift + step) - out) / step
        better = missing.abs() < lowest
        best, lowest = torch.where(better, shift, best), torch.where(better, missing.abs(), lowest)
        shift = shift + torch.where(slope > _FLAT, missing / slope.clamp(min=_FLAT), 0.0)
    return torch.where(best.abs() > _SETTLED * deviation, best, 0.0)


def _apply(function: fx.Node | None, layer: Layer, x: Tensor) -> Tensor:
    if function is None:
        return x
    read = _last_quantization(layer.node)
    args = fx.map_arg(function.args, lambda n: x if n is read else constant(layer.program.graph_module, n))
    target: Any = function.target
    return target(*args, **function.kwargs)
