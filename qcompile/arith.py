"""The integer contract: the single definition of rounding, quantize and requantize.

A real value is ``scale * (q - zero_point)``. Rounding is round-half-to-even everywhere. Every
function here is built from integer arithmetic and single IEEE-754 float32 operations in a fixed
order, so that a kernel can reproduce it bit for bit; wherever a float multiply meets an add it is
one explicit fused multiply-add (`fma`). Kernels of every target are held to these functions.

    quantize    q = rne(clamp(x * inv_scale, lo - zp, hi - zp)) + zp         inv_scale = f32(1 / f64(scale))
    requantize  q = rne(clamp(f32(acc) * m, lo - zp, hi - zp)) + zp          m = f32(f64(s_x) * s_w / s_y)
    residual    r = fma(f32(b - zp_b), m_b, f32(acc) * m), then clamp, rne and zp as above
    by rows     a = max |x|; s = a / 127; q = rne(x * (127 / a))             at run time, see `quantize_rows`

Clamping before the conversion keeps every machine inside int32; the zero point is added as an
integer, after rounding. The scheme follows Jacob et al., "Quantization and Training of Neural
Networks for Efficient Integer-Arithmetic-Only Inference", sections 2.1-2.2, with a float32
multiplier in place of their fixed-point one.
"""

from __future__ import annotations

import torch
from torch import Tensor

QMIN, QMAX = -128, 127
WEIGHT_MAX = 127  # weights are symmetric: -128 is never used
INT32_MAX = 2**31 - 1
SMALLEST_ROW = 2.0**-100  # rows with no larger value count as zero: 127 / a cannot overflow


def float32(value: float) -> float:
    """`value` rounded to the nearest float32, as a Python float."""
    return float(torch.tensor(value, dtype=torch.float64).to(torch.float32))


def inverse_scale(scale: float) -> float:
    """float32(1 / scale), the factor `quantize` multiplies by."""
    return float32(1.0 / scale)


def multiplier(numerator: float | Tensor, denominator: float) -> Tensor:
    """float32(numerator / denominator) with the division in float64; any shape."""
    num = torch.as_tensor(numerator, dtype=torch.float64)
    return (num / denominator).to(torch.float32)


def _to_int8(real: Tensor, zero_point: int, lo: int, hi: int) -> Tensor:
    """Clamp in float32, round half to even, add the zero point as an integer."""
    clamped = torch.clamp(real, float(lo - zero_point), float(hi - zero_point))
    return (torch.round(clamped).to(torch.int32) + zero_point).to(torch.int8)


def quantize(x: Tensor, inv_scale: float, zero_point: int, lo: int = QMIN, hi: int = QMAX) -> Tensor:
    """float32 -> int8. NaN quantizes to the zero point (the real value 0), on every machine."""
    real = x.to(torch.float32) * torch.tensor(inv_scale, dtype=torch.float32)
    real = torch.where(torch.isnan(real), torch.zeros_like(real), real)
    return _to_int8(real, zero_point, lo, hi)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 (..., K) -> int8 (..., K) in [-127, 127], and the float32 scale (..., 1) of each row.

    a = max |x|; scale = a / 127; q = rne(x * (127 / a)). One division for a row: one for each value would
    cost more than the products that they go into. No clamp is needed: |x| <= a, so that the product is at most
    127 and a few units in its last place. A row with no value beyond 2^-100 is zero, of scale 0; one that
    holds NaN or infinity is zero, of scale NaN.
    """
    a = x.to(torch.float32).abs().amax(-1, keepdim=True)  # NaN where there is one
    good = (a > SMALLEST_ROW) & (a < torch.inf)
    most = torch.tensor(float(WEIGHT_MAX), dtype=torch.float32)
    q = torch.where(good, torch.round(x.to(torch.float32) * (most / a)), 0.0)
    scale = torch.where(good, a / most, torch.where(a <= SMALLEST_ROW, 0.0, torch.nan))
    return q.to(torch.int8), scale


def dequantize(q: Tensor, scale: float, zero_point: int) -> Tensor:
    """int8 -> float32: one float32 product, so exact on every machine."""
    centred = (q.to(torch.int32) - zero_point).to(torch.float32)
    return centred * torch.tensor(scale, dtype=torch.float32)


def scaled(acc: Tensor, m: Tensor | float) -> Tensor:
    """f32(acc) * m: the first step of requantize; `acc` int32, `m` float32 and broadcastable."""
    return acc.to(torch.float32) * torch.as_tensor(m, dtype=torch.float32)


def requantize(acc: Tensor, m: Tensor | float, zero_point: int, lo: int = QMIN, hi: int = QMAX) -> Tensor:
    """int32 accumulator -> int8."""
    return _to_int8(scaled(acc, m), zero_point, lo, hi)


def requantize_residual(
    acc: Tensor,
    m: Tensor | float,
    other: Tensor,
    other_zero_point: int,
    other_m: float,
    zero_point: int,
    lo: int = QMIN,
    hi: int = QMAX,
) -> Tensor:
    """int32 accumulator plus an int8 tensor of another scale -> int8, by one fma.

    r = fma(f32(other - other_zero_point), other_m, f32(acc) * m)
    """
    centred = (other.to(torch.int32) - other_zero_point).to(torch.float32)
    real = fma(centred, torch.tensor(other_m, dtype=torch.float32), scaled(acc, m))
    return _to_int8(real, zero_point, lo, hi)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The correctly rounded float32 fused multiply-add a * b + c (IEEE 754-2019, 5.4.1).

    PyTorch has no fma on CPU. The product of two float32 is exact in float64; the sum is made
    round-to-odd from its TwoSum error (Boldo and Melquiond, "Emulation of a FMA and correctly
    rounded sums: proved algorithms using rounding to odd", section 3), after which rounding to
    float32 cannot round twice. Infinities and NaN follow IEEE 754; which NaN is not defined.
    """
    product = a.to(torch.float64) * b.to(torch.float64)
    addend = c.to(torch.float64).expand_as(product) if c.dim() < product.dim() else c.to(torch.float64)
    total = product + addend
    bp = total - product
    error = (product - (total - bp)) + (addend - bp)
    bits = total.view(torch.int64)
    # Inexact and even: step one unit in the last place towards the error, which makes it odd.
    away = torch.where((error > 0) == (total > 0), 1, -1)
    odd = torch.where((error.abs() > 0) & (bits & 1 == 0), bits + away, bits)  # an infinite total has error NaN
    return odd.view(torch.float64).to(torch.float32)


def bias_to_int32(bias: Tensor, scale: Tensor) -> Tensor:
    """Float bias -> int32 at `scale` (= s_x * s_w[c], float64), rounded half to even."""
    return torch.round(bias.to(torch.float64) / scale.to(torch.float64)).to(torch.int32)


def largest_accumulator(weight: Tensor, bias: Tensor, zero_point: int) -> int:
    """The largest |acc| that any int8 input can produce: max_c(|bias| + sum|w| * max|q - zp|).

    `weight` is (out_channels, ...) int8, `bias` (out_channels,) int32. Every partial sum is bounded
    by the same figure, whatever the order, so a value within int32 proves that no accumulator
    overflows.
    """
    reach = max(QMAX - zero_point, zero_point - QMIN)
    total = weight.to(torch.int64).abs().flatten(1).sum(1) * reach + bias.to(torch.int64).abs()
    return int(total.max()) if total.numel() else 0
