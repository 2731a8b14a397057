"""Give each layer the bias that makes up for what the rounding of its weights takes from its mean; without data.

    d[c] = sum_k (w - w_q)[c, k] E x[k]         bias = that of the float layer + d

What a batch norm has made is taken to be normal, with mean m = beta and deviation s = |gamma|; behind a clamp to
[a, b], with A = (a - m) / s and B = (b - m) / s,

    E x = s (phi(A) - phi(B)) + m (Phi(B) - Phi(A)) + a Phi(A) + b (1 - Phi(B))

where phi and Phi are the normal density and distribution. A layer that reads anything else (a residual sum, an input)
keeps its bias.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), section 4.2 and
appendix C.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompile.ir import MOMENTS, Moments, Program, Property, constant, shape_of
from qcompile.ops.conv import argument
from qcompile.ops.unary import clamp_bounds
from qcompile.passes.base import Context, Pass
from qcompile.qdq import is_dequantize, is_quantize
from qcompile.twins import is_layer, set_bias
from qcompile.weights import by_channel

aten = torch.ops.aten
_WIDE = 256  # for a size that is not known: borders hardly count


@dataclass(frozen=True)
class CorrectBiasAnalytic(Pass):
    """qdq -> qdq, with other biases."""

    name: ClassVar[str] = "correct_bias_analytic"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.QDQ})

    def run(self, program: Program, context: Context) -> bool:
        changed = False
        for node in [n for n in program.graph.nodes if is_layer(n, context.originals)]:
            mean = _mean(node.args[0])
            if isinstance(mean, str):
                program.ledger.decline(self.name, node, mean)
                continue
            held = argument(node, 2, None)
            now = torch.zeros(()) if held is None else constant(program.graph_module, held)
            bias = now if held is None else context.originals.get(held.name, now)
            value = (bias.double() + _own_shift(program, node, context.originals, mean)).float()
            if not torch.equal(value, now):
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
