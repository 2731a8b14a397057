"""Integer weights of one layer: symmetric, one scale per output channel, rounded to nearest.

    weights   s_w[c] = r * max |w[c]| / most, but at least |bias[c]| / (s_x * 2^30), so that the int32
              bias fits (an all-zero channel too)

`most` is 127 for 8 bits and 7 for 4. The ratio r in [0.4, 1] is chosen per channel. With e the rounding
error of the channel's weights and inputs of mean m and variance v, the output is off by m * sum(e) on
average and by v * sum(e^2) in variance. Where mean and deviation are alike, as behind a relu, the
expected square of the error is proportional to

    sum(e)^2 + sum(e^2)

which is what r minimizes. (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction", section 3.2, describe the shift m * sum(e); here the scale avoids it.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.ops.row import Weight

_BIAS_MAX = 2**30
SMALLEST_RATIO, _RATIOS = 0.4, 121


def quantize_weight(weight: Tensor, bias: Tensor | None, input_scale: float, most: int) -> Weight:
    """Integers up to `most`, one scale per output channel (dimension 0 of `weight`)."""
    rows = weight.to(torch.float32).flatten(1)
    widest = rows.abs().amax(1) / most if rows.shape[1] else rows.new_zeros(len(rows))
    least = torch.zeros_like(widest) if bias is None else smallest_scale(bias, input_scale)
    best, lowest = widest, torch.full_like(widest, torch.inf)
    for ratio in torch.linspace(1.0, SMALLEST_RATIO, _RATIOS):
        scale = _positive(torch.maximum(widest * ratio, least))
        error = nearest(rows, scale, most).mul_(scale[:, None]).sub_(rows)
        cost = error.sum(1).square() + error.square().sum(1)
        best, lowest = torch.where(cost < lowest, scale, best), torch.minimum(cost, lowest)
    return Weight(nearest(rows, best, most).to(torch.int8).reshape(weight.shape), best)


def smallest_scale(bias: Tensor, input_scale: float) -> Tensor:
    """Of the weights of each channel, so that the bias fits int32, with a factor of two to spare."""
    return (bias.to(torch.float64).abs() / (input_scale * _BIAS_MAX)).to(torch.float32)


def _positive(scale: Tensor) -> Tensor:
    """A channel of zeros has no scale of its own."""
    return torch.where(scale > 2.0**-100, scale, 1.0)


def by_channel(values: Tensor, weight: Tensor) -> Tensor:
    """`values`, one for each output channel (dimension 0) of `weight`, in a shape that multiplies it."""
    return values.reshape(-1, *[1] * (weight.dim() - 1))


def nearest(rows: Tensor, scale: Tensor, most: int) -> Tensor:
    """The integers up to `most` that are nearest to `rows` (..., taps) at `scale` (...), one for each row."""
    return torch.div(rows, scale[..., None]).round_().clamp_(-most, most)
