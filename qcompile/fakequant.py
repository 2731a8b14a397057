"""Quantization that gradients pass: what stands in a training graph where the qdq graph quantizes.

Forward, each function gives the values of `qcompile.arith`, back in float. Rounding has no useful derivative;
backward it counts as the identity (the straight-through estimator: Bengio et al., "Estimating or Propagating
Gradients Through Stochastic Neurons", 2013). With v = x / s, integers from lo to hi and y = s * rne(clamp(v)):

    dy/dx = 1                where lo <= v <= hi, else 0
    dy/ds = rne(v) - v       where lo <= v <= hi, else the bound that v is beyond

This is LSQ (Esser et al., "Learned Step Size Quantization", 2020, section 2.1), with its factor 1 / sqrt(N * hi) on
the gradient of s, for N values that share it (section 2.2). What is trained is not s but the logarithm of its ratio
to what calibration chose: s stays positive, a step of an optimizer changes it by a part of itself, and weight decay
pulls it towards the calibrated scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompile.weights import by_channel


def learned_scale(calibrated: Tensor, log_ratio: Tensor) -> Tensor:
    """calibrated * exp(log_ratio); equal to `calibrated`, to the bit, where the ratio is 1."""
    return calibrated * torch.exp(log_ratio)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """An activation on its int8 grid: `scale` and `zero_point` are scalars, dimension 0 of x holds the samples.

    NaN stays NaN, so that a diverged training shows.
    """
    lo, hi = qmin - zero_point, qmax - zero_point
    shared_by = x[0].numel() if x.dim() > 1 and len(x) else x.numel()
    return _FakeQuantize.apply(x.float(), scale, lo, hi, shared_by)


def fake_quantize_weight(weight: Tensor, scale: Tensor, most: int) -> Tensor:
    """A weight on its grid of integers up to `most`: one scale for each index of dimension 0."""
    lo, hi = scale.new_tensor(-most), scale.new_tensor(most)
    scale = by_channel(scale, weight)
    return _FakeQuantize.apply(weight, scale, lo, hi, weight[0].numel() if len(weight) else 1)


def integers(x: Tensor, scale: Tensor, lo: Any, hi: Any) -> Tensor:
    """rne(clamp(x / scale, lo, hi)), by one float32 product with float32(1 / scale), as in `arith.quantize`."""
    return torch.round(torch.clamp(x * _inverse(scale), lo, hi))


def fake_quantize_bias(bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """A bias on the grid of its int32 accumulator, input_scale * weight_scale."""
    return _RoundBias.apply(bias, input_scale.detach().double() * weight_scale.detach().double())


def same_scale(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """`x`, whose values an operator took as they were from a tensor quantized like this (a maximum, a reshape)."""
    return x


def _inverse(scale: Tensor) -> Tensor:
    return scale.double().reciprocal().float()


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, lo: Tensor, hi: Tensor, shared_by: int) -> Tensor:
        ctx.save_for_backward(x, scale, lo, hi)
        ctx.shared_by = shared_by
        return integers(x, scale, lo, hi) * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, scale, lo, hi = ctx.saved_tensors
        v = x * _inverse(scale)
        inside = (v >= lo) & (v <= hi)
        of_scale = None
        if ctx.needs_input_grad[1]:
            clamped = torch.clamp(v, lo, hi)
            slope = torch.where(inside, torch.round(clamped) - v, clamped)
            most = torch.maximum(hi, -lo)  # of a zero point in the middle either is a bound
            # In float64: behind a relu most is 255, and of 8.4 million values the product leaves int32.
            divisor = torch.sqrt(ctx.shared_by * most.double()).float()
            of_scale = (gradient * slope).sum_to_size(scale.shape) / divisor
        return gradient * inside, of_scale, None, None, None


class _RoundBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bias: Tensor, scale: Tensor) -> Tensor:
        return (torch.round(bias.double() / scale) * scale).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None
