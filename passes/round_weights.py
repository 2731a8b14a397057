"""Choose the integer weights of each layer so that it computes, of quantized inputs, what it did in float.

See `qcompile.leastsquares` for the problem that is solved, layer after layer. The scale of each channel is the best
of a few, judged by the same measure with weights rounded to nearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from qcompile.ir import Program, Property
from qcompile.leastsquares import Problem
from qcompile.passes.base import Context, Pass
from qcompile.twins import Layer, layers
from qcompile.weights import SMALLEST_RATIO, nearest, smallest_scale

_RATIOS = 37


@dataclass(frozen=True)
class RoundWeights(Pass):
    """qdq -> qdq, with other weights, scales and biases.

    Attributes:
        decay: how strongly weights are held to the float ones; in units of a tap's mean variance, for as many
            positions as taps.
    """

    name: ClassVar[str] = "round_weights"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.QDQ})
    decay: float = 10.0

    def run(self, program: Program, context: Context) -> bool:
        if not context.samples:
            return False

        def visit(layer: Layer) -> None:
            _round(layer, Problem.of(layer, self.decay))

        for done, total in layers(program, context.samples, context.originals, visit):
            context.report("round weights", done, total)
        return bool(context.originals)


def _round(layer: Layer, problem: Problem) -> None:
    rows = layer.original.double().flatten(1).unflatten(0, (layer.groups, -1))
    widest = layer.scale.double().unflatten(0, (layer.groups, -1))
    scale, lowest = widest, torch.full_like(widest, torch.inf)
    largest = rows.abs().amax(2) / layer.most
    least = torch.zeros_like(widest) if layer.bias is None else smallest_scale(layer.bias, layer.input_scale)
    least = least.double().reshape(widest.shape)
    for ratio in torch.linspace(1.0, SMALLEST_RATIO, _RATIOS, dtype=torch.float64):
        tried = torch.where(largest > 0, torch.maximum(largest * ratio, least), widest).float().double()
        loss = problem.loss(nearest(rows, tried, layer.most) * tried[:, :, None])
        scale, lowest = torch.where(loss < lowest, tried, scale), torch.minimum(loss, lowest)
    q = problem.descend(nearest(rows, scale, layer.most), scale, 2 * rows.shape[2])
    layer.q.copy_(q.flatten(0, 1).reshape(layer.q.shape))
    layer.scale.copy_(scale.flatten())
    layer.set_bias(problem.bias(q * scale[:, :, None]).flatten())
