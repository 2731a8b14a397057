"""Give each layer the bias with which what comes out of it is, on average, what it was in float.

    empirical    E f(v[c] + d[c]) = E f(y[c])                bias = that of the quantized layer + d
    analytic     d[c] = sum_k (w - w_q)[c, k] E x[k]         bias = that of the float layer + d

v is what the layer computes in the quantized graph, y what it does in the float graph, and f the function of one value
(relu6, silu) that reads it, if one does.

Empirical: layer after layer, over samples and positions, so that each also makes up for the layers before it. The mean
is taken behind f. In front of a relu, most values of a sparse channel are ones that it removes: errors there would
decide the bias, and shift the values that pass. So a layer keeps its bias where f reads its sum with another tensor.

Analytic: what the layer's own weights shift, without data. What a batch norm has made is taken to be normal, with mean
m = beta and deviation s = |gamma|; behind a clamp to [a, b], with A = (a - m) / s and B = (b - m) / s,

    E x = s (phi(A) - phi(B)) + m (Phi(B) - Phi(A)) + a Phi(A) + b (1 - Phi(B))

where phi and Phi are the normal density and distribution. A layer that reads anything else (a residual sum, an input)
keeps its bias.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), section 4.2 and
appendices C and D. There the empirical mean is taken in front of the activation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompile import ops
from qcompile.errors import CalibrationError, ConfigError
from qcompile.ir import MOMENTS, Moments, Program, Property, constant, shape_of
from qcompile.ops.conv import argument
from qcompile.ops.unary import clamp_bounds
from qcompile.passes.base import Context, Pass
from qcompile.qdq import is_dequantize, is_quantize
from qcompile.sites import only_user, other_operand
from qcompile.twins import Layer, is_layer, layers, set_bias
from qcompile.weights import by_channel

aten = torch.ops.aten
METHODS = ("empirical", "analytic")
_STEPS = 4  # of Newton's method; errors are small, and two are mostly enough
_STEP = 0.01  # with which a slope is measured, of the deviation of a channel
_FLAT = 1e-3  # a channel whose mean follows its bias less (relu hardly ever lets it pass) says too little of itself
_SETTLED = 1e-4  # of the deviation of a channel
_WIDE = 256  # for a size that is not known: borders hardly count


@dataclass(frozen=True)
class CorrectBias(Pass):
    """qdq -> qdq, with other biases.

    Attributes:
        method: "empirical" or "analytic".

    Raises:
        ConfigError: there is no such method.
        CalibrationError: the method is "empirical", and calibration kept no samples.
    """

    name: ClassVar[str] = "correct_bias"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.QDQ})
    method: str = "empirical"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(
                f"unknown method {self.method!r}", where="CorrectBias", remedy=f"use one of {', '.join(METHODS)}"
            )

    def run(self, program: Program, context: Context) -> bool:
        return (_empirical if self.method == "empirical" else _analytic)(program, context)


# --- empirical ------------------------------------------------------------------------------------


def _empirical(program: Program, context: Context) -> bool:
    changed = False

    def visit(layer: Layer) -> None:
        nonlocal changed
        behind = _behind(layer.node)
        if behind is not None and other_operand(behind, _last_quantization(layer.node)) is not None:
            sum_behind = _behind(behind)
            if sum_behind is not None and _is_function(sum_behind):
                reason = f"{sum_behind.name} reads the sum of it and another, and its mean decides"
                return program.ledger.decline(CorrectBias.name, layer.node, reason)
        shift = _shift(layer, behind if behind is not None and _is_function(behind) else None)
        if bool(shift.any()):
            layer.set_bias(shift if layer.bias is None else layer.bias.double() + shift)
            changed = True

    if not context.samples and any(is_layer(node, context.originals) for node in program.graph.nodes):
        raise CalibrationError(
            "calibration kept no samples to correct biases by",
            where="pass 'correct_bias'",
            remedy="use another preset than 'fast', which keeps none (or none, and observer='mse'), or the method "
            "'analytic'",
        )
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


# --- analytic -------------------------------------------------------------------------------------


def _analytic(program: Program, context: Context) -> bool:
    changed = False
    for node in [n for n in program.graph.nodes if is_layer(n, context.originals)]:
        mean = _mean(node.args[0])
        if isinstance(mean, str):
            program.ledger.decline(CorrectBias.name, node, mean)
            continue
        held = argument(node, 2, None)
        bias = 0.0 if held is None else context.originals.get(held.name, constant(program.graph_module, held)).double()
        value = (bias + _own_shift(program, node, context.originals, mean)).float()
        if held is None or not torch.equal(value, constant(program.graph_module, held)):
            set_bias(program, node, value, context.originals)
            changed = True
    return changed


def _mean(tensor: Any) -> Tensor | str:
    """The mean of each channel of what a layer reads, or why it is not known."""
    node = _past(tensor, lambda n: n.target is aten.adaptive_avg_pool2d.default or _keeps_channels(n))
    bounds = clamp_bounds(node)
    maker = node if bounds is None else _past(node.args[0], lambda n: False)
    found = maker.meta.get(MOMENTS)
    if found is None:
        return f"the mean of {node.name}, which it reads, is not known: no batch norm made it"
    return found.mean if bounds is None else clipped_mean(found, *bounds)


def _past(node: Any, passes: Callable[[fx.Node], bool]) -> Any:
    """Back from `node` to the first that neither is a quantization nor `passes`."""
    while is_quantize(node) or is_dequantize(node) or passes(node):
        node = node.args[0]
    return node


def _keeps_channels(node: fx.Node) -> bool:
    """Whether it only drops dimensions of size 1 behind the channels."""
    if node.target not in (aten.reshape.default, aten.view.default):
        return False
    before, after = (list(map(str, shape_of(n))) for n in (node.args[0], node))  # type: ignore[arg-type]
    return before[:2] == after[:2] and set(before[2:] + after[2:]) <= {"1"}


def clipped_mean(moments: Moments, low: float | None, high: float | None) -> Tensor:
    """(channels,): of normal values that are clamped to [low, high]."""
    mean, deviation = moments.mean, moments.deviation.clamp(min=1e-30)  # a constant one is a very narrow one
    total = torch.zeros_like(mean)
    below, above = torch.zeros_like(mean), torch.ones_like(mean)  # the distribution at the bounds
    if low is not None:
        z = (low - mean) / deviation
        below = torch.special.ndtr(z)
        total += deviation * _density(z) + low * below
    if high is not None:
        z = (high - mean) / deviation
        above = torch.special.ndtr(z)
        total += high * (1 - above) - deviation * _density(z)
    return total + mean * (above - below)


def _density(z: Tensor) -> Tensor:
    return (-z.square() / 2).exp() / math.sqrt(2 * math.pi)


def _own_shift(program: Program, node: fx.Node, originals: dict[str, Tensor], mean: Tensor) -> Tensor:
    """What the rounding of its weights takes from the mean of each output channel; padding counts as zeros."""
    dequantize: Any = node.args[1]
    q, scale = (constant(program.graph_module, n).double() for n in dequantize.args[:2])
    lost = originals[dequantize.name].double() - q * by_channel(scale, q)
    target: Any = node.target
    if target is aten.linear.default:
        return lost @ mean
    size = [s if isinstance(s, int) else _WIDE for s in shape_of(node.args[0])[2:]]  # type: ignore[arg-type]
    x = mean.reshape(1, -1, *[1] * len(size)).expand(1, -1, *size)
    return target(x, lost, None, *node.args[3:]).flatten(2).mean((0, 2))
