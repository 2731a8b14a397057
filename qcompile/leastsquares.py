"""The layer's problem: integer weights q and a bias b with which scale * q makes, of what the quantized graph hands to
the layer, what the float layer makes of its own input.

    minimize over q and b   E | scale (q . x) + b - y |^2 + decay | scale q - w |^2

x and y enter by their means and covariances alone, so the data is read once, whatever is tried afterwards. The best
bias is always E y - scale (q . E x); what is left is quadratic in q:

    scale^2 q' A q - 2 scale c' q,    A = cov(x) + decay I,   c = cov(x, y) + decay w

Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (2020), sections 3 and 3.3 (the
asymmetric target). Solved by greedy coordinate descent: Nair and Suggala, "CDQuant" (2024), section 3.
The scale of each channel is the best of a few, judged by the same measure with weights rounded to nearest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.twins import Layer
from qcompile.weights import SMALLEST_RATIO, nearest, smallest_scale

DECAY = 10.0  # suits 32 samples and more
_RATIOS = 37


@dataclass
class Problem:
    """Of one layer. K taps, O channels of output in each of G groups; all float64.

    Attributes:
        a: (G, K, K).
        c: (G, O, K).
        x_mean: (G, K).
        y_mean: (G, O).
        most: the largest integer that a weight may be.
    """

    a: Tensor
    c: Tensor
    x_mean: Tensor
    y_mean: Tensor
    most: int

    @staticmethod
    def of(layer: Layer, decay: float) -> Problem:
        """`decay` in units of the mean variance of a tap, at one sample; it falls with the number of positions."""
        count = 0
        sums: list[Tensor] = []
        for x, y in zip(layer.inputs, layer.outputs, strict=True):
            rows, targets = layer.patches(x), layer.per_position(y)
            count += rows.shape[1]
            new = [
                rows.transpose(1, 2) @ rows,
                targets.transpose(1, 2) @ rows,
                rows.sum(1),
                targets.sum(1),
            ]
            sums = [a + b for a, b in zip(sums, new, strict=True)] if sums else [s.double() for s in new]
        xx, yx, x, y = (s / count for s in sums)
        a = xx - x[:, :, None] * x[:, None, :]
        c = yx - y[:, :, None] * x[:, None, :]
        weight = layer.original.double().flatten(1).unflatten(0, (layer.groups, -1))
        taps = a.shape[1]
        strength = decay * a.diagonal(dim1=1, dim2=2).mean(1) * taps / count
        a = a + strength[:, None, None] * torch.eye(taps, dtype=a.dtype)
        return Problem(a, c + strength[:, None, None] * weight, x, y, layer.most)

    def loss(self, weight: Tensor) -> Tensor:
        """(G, O): of real weights (G, O, K), up to a constant."""
        return ((weight @ self.a - 2 * self.c) * weight).sum(2)

    def bias(self, weight: Tensor) -> Tensor:
        """(G, O): the best one."""
        return self.y_mean - (weight * self.x_mean[:, None, :]).sum(2)

    def descend(self, q: Tensor, scale: Tensor, most_steps: int) -> Tensor:
        """Integers (G, O, K) from `q` on, changed by one at a time, where it helps most, until nothing helps."""
        q, step = q.clone(), scale[:, :, None]
        slope = (q * step) @ self.a - self.c  # half the derivative by each real weight
        own = self.a.diagonal(dim1=1, dim2=2)[:, None, :] * step.square()
        group = torch.arange(len(q))[:, None]
        for _ in range(most_steps):
            way = -torch.sign(slope)
            gain = 2 * step * slope.abs() - own
            gain = gain.masked_fill((q + way).abs() > self.most, -1.0)
            best, at = gain.max(2)
            moves = best > 0
            if not bool(moves.any()):
                break
            change = torch.where(moves, way.gather(2, at[:, :, None])[:, :, 0], 0.0)
            q.scatter_add_(2, at[:, :, None], change[:, :, None])
            slope += (change * scale)[:, :, None] * self.a[group, at]
        return q


def solve(layer: Layer, decay: float) -> None:
    """Give the layer the weights, scales and bias that solve its problem. `decay` as for `Problem.of`."""
    problem = Problem.of(layer, decay)
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
