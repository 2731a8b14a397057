"""Give each layer the bias with which what comes out of it is, on average, what it was in float.

    empirical    E f(v[c] + d[c]) = E f(y[c])                bias = that of the quantized layer + d
    analytic     d[c] = sum_k (w - w_q)[c, k] E x[k]         bias = that of the float layer + d

v is what the layer computes in the quantized graph, y what it does in the float graph, and f the clamp (relu, relu6)
behind it.

Empirical: layer after layer, over samples and positions, so that each also makes up for the layers before it. The mean
is taken behind the clamp. In front of it, most values of a sparse channel are ones that the clamp removes: errors there
would decide the bias, and shift the values that pass.

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

from qcompile.errors import ConfigError
from qcompile.ir import MOMENTS, Moments, Program, Property, constant, shape_of
from qcompile.ops.conv import argument
from qcompile.ops.unary import clamp_bounds
from qcompile.passes.base import Context, Pass
from qcompile.qdq import is_dequantize, is_quantize
from qcompile.sites import only_user
from qcompile.twins import Layer, is_layer, layers, set_bias

aten = torch.ops.aten
METHODS = ("empirical", "analytic")
_STEPS = 5  # of Newton's method; errors are small, and two are mostly enough
_RARE = 1e-3  # a channel that passes the clamp more rarely says too little of itself
_SETTLED = 1e-6  # of the deviation of a channel
_WIDE = 256  # for a size that is not known: borders hardly count


@dataclass(frozen=True)
class CorrectBias(Pass):
    """qdq -> qdq, with other biases.

    Attributes:
        method: "empirical" or "analytic".

    Raises:
        ConfigError: there is no such method.
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
        shift = _shift(*_values(layer), _clamp_behind(layer.node))
        if bool(shift.any()):
            old = layer.bias
            layer.set_bias(shift if old is None else old.double() + shift)
            changed = True

    if context.samples:
        for done, total in layers(program, context.samples, context.originals, visit):
            context.report("correct bias", done, total)
    return changed


def _values(layer: Layer) -> tuple[Tensor, Tensor]:
    """What the layer computes, (channels, positions of all samples): in the quantized graph, and in float."""
    target: Any = layer.node.target
    weight = layer.q.float() * layer.scale.reshape(-1, *[1] * (layer.q.dim() - 1))
    made = [target(x, weight, layer.bias, *layer.node.args[3:]) for x in layer.inputs]
    axis = -1 if target is aten.linear.default else 1
    quantized, real = (torch.cat([y.movedim(axis, 0).flatten(1) for y in each], 1) for each in (made, layer.outputs))
    return quantized, real


def _clamp_behind(node: fx.Node) -> Callable[[Tensor], Tensor]:
    user = only_user(node)
    low, high = (user is not None and clamp_bounds(user)) or (None, None)
    return lambda x: x if low is None and high is None else x.clamp(low, high)


def _shift(quantized: Tensor, real: Tensor, clamp: Callable[[Tensor], Tensor]) -> Tensor:
    """d (channels,) float64: the best of some Newton steps, so never worse than none."""
    wanted, deviation = clamp(real).mean(1, dtype=torch.float64), real.std(1).double()
    shift = best = torch.zeros_like(wanted)
    lowest = torch.full_like(wanted, torch.inf)
    for _ in range(_STEPS):
        moved = quantized + shift[:, None].float()
        out = clamp(moved)
        missing, passing = wanted - out.mean(1, dtype=torch.float64), (out == moved).double().mean(1)
        better = missing.abs() < lowest
        best, lowest = torch.where(better, shift, best), torch.where(better, missing.abs(), lowest)
        shift = shift + torch.where(passing > _RARE, missing / passing.clamp(min=_RARE), 0.0)
    return torch.where(best.abs() > _SETTLED * deviation, best, 0.0)


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
    lost = originals[dequantize.name].double() - q * scale.reshape(-1, *[1] * (q.dim() - 1))
    target: Any = node.target
    if target is aten.linear.default:
        return lost @ mean
    size = [s if isinstance(s, int) else _WIDE for s in shape_of(node.args[0])[2:]]  # type: ignore[arg-type]
    x = mean.reshape(1, -1, *[1] * len(size)).expand(1, -1, *size)
    return target(x, lost, None, *node.args[3:]).flatten(2).mean((0, 2))
