"""The integer contract's arithmetic, against libm, exact fractions and NumPy float32."""

from __future__ import annotations

import ctypes
import ctypes.util
import math
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompile import arith

_LIBM = ctypes.CDLL(ctypes.util.find_library("m"))
_LIBM.fmaf.argtypes, _LIBM.fmaf.restype = [ctypes.c_float] * 3, ctypes.c_float

float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)
int8s = st.integers(-128, 127)
scales = st.floats(2.0**-40, 2.0**20, width=32)


def as_bits(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def float32_tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def nearest_even(value: Fraction) -> int:
    """Round half to even, exactly (Python's own rule for fractions)."""
    return round(value)


# --- fma -------------------------------------------------------------------------------------------


def fma(a: float, b: float, c: float) -> float:
    return float(arith.fma(float32_tensor(a), float32_tensor(b), float32_tensor(c)))


def test_fma_of_infinities_and_nan_is_the_ieee_one() -> None:
    inf = math.inf
    for a, b, c in ((inf, 2.0, 1.0), (-inf, 2.0, 1.0), (3.0, 4.0, inf), (3.0, 4.0, -inf), (3e38, 3e38, 1.0)):
        assert fma(a, b, c) == _LIBM.fmaf(a, b, c)
        assert math.isinf(fma(a, b, c))
    for a, b, c in ((inf, 0.0, 1.0), (inf, 1.0, -inf), (math.nan, 1.0, 1.0), (1.0, 1.0, math.nan)):
        assert math.isnan(fma(a, b, c))


@given(st.lists(float32s, min_size=1, max_size=9))
def test_a_row_is_quantized_by_its_largest_magnitude(row: list[float]) -> None:
    q, scale = arith.quantize_rows(float32_tensor(*row))
    largest = max(map(abs, row))
    if largest <= 2.0**-100:
        assert q.count_nonzero() == scale == 0
        return
    assert int(q.abs().max()) == 127
    assert float(scale) == float(np.float32(largest) / np.float32(127))
    for value, integer in zip(row, q.tolist(), strict=True):
        assert abs(Fraction(value) / Fraction(largest) * 127 - integer) <= Fraction(1, 2) + Fraction(1, 2**15)


DOUBLE_ROUNDING = [
    # The exact sum lies a hair beside the middle of two float32; rounded to float64 first, it would lie on it.
    (1 + 2.0**-12, 1 + 2.0**-12, 2.0**-80),
    (1 + 2.0**-23, 2.0**-24 * (1 + 2.0**-23), 1.0),
    (2.0**-30, 2.0**-30, 1 + 2.0**-23),
    (-(2.0**-40), 2.0**-40, 1.5 + 2.0**-23),
    (1 + 2.0**-12, 1 - 2.0**-12, 2.0**-24),
    (3.0, 2.0**-25, 1.0),
    (16777215.0, 16777215.0, 2.0**-50),
]
DENORMAL = [
    (2.0**-75, 2.0**-74, 0.0),
    (2.0**-75, 2.0**-74, 2.0**-149),
    (2.0**-100, 3 * 2.0**-50, 2.0**-140),
    (1.5 * 2.0**-75, -(2.0**-75), 2.0**-148),
    (2.0**-149, 0.5, 2.0**-149),
    (2.0**-149, -0.5, 2.0**-126),
]
EXTREME = [
    (3e38, 3.0, 0.0),
    (3e38, 2.0, -3e38),
    (3e38, 1.0, 2.0**-149),
    (2.0**127, 2.0, -(2.0**127)),
    (2.0**-149, 2.0**-149, 3e38),
    (1e20, 1e-20, -1.0),
    (0.0, 5.0, -0.0),
    (-0.0, 5.0, -0.0),
    (1.0, -1.0, 1.0),
]


@pytest.mark.parametrize(("a", "b", "c"), [*DOUBLE_ROUNDING, *DENORMAL, *EXTREME])
def test_fma_is_libms_on_hard_cases(a: float, b: float, c: float) -> None:
    for signs in ((1, 1), (-1, 1), (1, -1), (-1, -1)):
        args = tuple(float(np.float32(v)) for v in (signs[0] * a, b, signs[1] * c))
        assert as_bits(fma(*args)) == as_bits(_LIBM.fmaf(*args)), args


@given(float32s, float32s, float32s)
@settings(max_examples=400, deadline=None)
def test_fma_is_libms_everywhere(a: float, b: float, c: float) -> None:
    assert as_bits(fma(a, b, c)) == as_bits(_LIBM.fmaf(a, b, c))


@given(st.integers(-(2**24), 2**24), st.integers(-(2**24), 2**24), st.integers(-60, 60), st.integers(1, 2**24))
@settings(max_examples=400, deadline=None)
@example(2**23 + 1, 2**23 + 1, 0, 1)
def test_fma_rounds_the_exact_sum_once(a: int, b: int, exponent: int, c: int) -> None:
    """The addend lands near the last bits of the product, where two roundings would differ from one."""
    addend = math.ldexp(c, exponent)
    exact = Fraction(a) * b + Fraction(addend)
    result = fma(float(a), float(b), addend)
    bits = as_bits(abs(result))
    below, above = (struct.unpack("<f", struct.pack("<I", max(0, bits + step)))[0] for step in (-1, 1))
    distance = abs(abs(exact) - Fraction(result).__abs__())
    for neighbour in (below, above):
        other = abs(abs(exact) - Fraction(neighbour))
        assert distance < other or (distance == other and bits % 2 == 0)


def test_fma_broadcasts_its_addend() -> None:
    g = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, 4, 5, generator=g), torch.tensor(1.7), torch.randn(5, generator=g)
    expected = [_LIBM.fmaf(float(x), float(b), float(c[i % 5])) for i, x in enumerate(a.flatten())]
    assert torch.equal(arith.fma(a, b, c).flatten(), float32_tensor(*expected))


# --- quantize and dequantize -----------------------------------------------------------------------


def test_rounding_is_half_to_even() -> None:
    halves = float32_tensor(-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5)
    assert arith.quantize(halves, 1.0, 0).tolist() == [-4, -2, -2, 0, 0, 2, 2, 4]
    # The zero point is added after rounding: an odd one does not move the ties.
    assert arith.quantize(halves, 1.0, 7).tolist() == [3, 5, 5, 7, 7, 9, 9, 11]
    odd = torch.tensor([-5, -3, -1, 1, 3, 5], dtype=torch.int32)
    assert arith.requantize(odd, 0.5, 1).tolist() == [-1, -1, 1, 1, 3, 3]


@given(float32s, scales, int8s)
@settings(max_examples=300, deadline=None)
def test_quantize_is_one_product_and_one_rounding(x: float, scale: float, zero_point: int) -> None:
    inv_scale = arith.inverse_scale(scale)
    with np.errstate(over="ignore"):
        product = float(np.float32(x) * np.float32(inv_scale))
    if math.isinf(product):
        expected = 127 if product > 0 else -128
    else:
        expected = max(-128, min(127, nearest_even(Fraction(product)) + zero_point))
    assert arith.quantize(float32_tensor(x), inv_scale, zero_point).tolist() == [expected]


def test_quantize_saturates_infinity_and_takes_nan_as_zero() -> None:
    special = float32_tensor(math.nan, math.inf, -math.inf, 3e38, -3e38, -0.0)
    assert arith.quantize(special, 1000.0, -5).tolist() == [-5, 127, -128, 127, -128, -5]
    assert arith.quantize(special, 0.0, 3).tolist() == [3] * 6  # infinity * 0 is NaN


def test_quantize_keeps_to_its_clamp() -> None:
    assert arith.quantize(float32_tensor(-9.0, 0.0, 9.0), 1.0, 2, lo=-1, hi=5).tolist() == [-1, 2, 5]


@given(int8s, scales, int8s)
@settings(max_examples=200, deadline=None)
def test_quantize_undoes_dequantize(q: int, scale: float, zero_point: int) -> None:
    real = arith.dequantize(torch.tensor([q], dtype=torch.int8), scale, zero_point)
    assert real.tolist() == [float(np.float32(q - zero_point) * np.float32(scale))]
    assert arith.quantize(real, arith.inverse_scale(scale), zero_point).tolist() == [q]


def test_float32_is_the_nearest_single() -> None:
    for value in (0.1, 1 / 3, 1 + 2.0**-24, 1 + 2.0**-24 + 2.0**-50, 1e-46, 7.0):
        assert arith.float32(value) == float(np.float32(value))


def test_a_multiplier_divides_in_float64_and_rounds_once() -> None:
    numerator = torch.tensor([0.1, 0.3, 1e-30], dtype=torch.float64)
    assert torch.equal(arith.multiplier(numerator, 0.7), (numerator / 0.7).to(torch.float32))
    assert arith.multiplier(0.1, 0.3).item() == float(np.float32(0.1 / 0.3))
    assert arith.multiplier(0.1, 0.3).item() != float(np.float32(0.1) / np.float32(0.3))


# --- requantize ------------------------------------------------------------------------------------


@given(st.integers(-(2**31), 2**31 - 1), st.floats(2.0**-60, 2.0**60, width=32), int8s, int8s, int8s)
@settings(max_examples=400, deadline=None)
def test_requantize_rounds_the_single_precision_product(acc: int, m: float, zero_point: int, a: int, b: int) -> None:
    lo, hi = min(a, b), max(a, b)
    product = Fraction(float(np.float32(acc) * np.float32(m)))
    expected = max(lo, min(hi, nearest_even(product) + zero_point))
    assert arith.requantize(torch.tensor([acc], dtype=torch.int32), m, zero_point, lo, hi).tolist() == [expected]


def test_requantize_clamps_before_it_converts() -> None:
    """The product leaves int32 (and even float32); converted first, its sign would be lost."""
    acc = torch.tensor([2**31 - 1, -(2**31), 2**30], dtype=torch.int32)
    assert arith.requantize(acc, 4.0, 10).tolist() == [127, -128, 127]
    assert arith.requantize(acc, 3e38, -100, lo=-90, hi=-3).tolist() == [-3, -90, -3]


def test_requantize_takes_one_multiplier_per_channel() -> None:
    acc = torch.tensor([[10, 10], [-7, -7]], dtype=torch.int32)
    assert arith.requantize(acc, float32_tensor(1.0, 0.5), 0).tolist() == [[10, 5], [-7, -4]]


@given(
    st.integers(-(2**24), 2**24), st.floats(2.0**-20, 2.0, width=32), int8s, int8s, st.floats(-4, 4, width=32), int8s
)
@settings(max_examples=400, deadline=None)
def test_a_residual_joins_by_one_fma(acc: int, m: float, other: int, other_zp: int, other_m: float, zp: int) -> None:
    product = float(np.float32(acc) * np.float32(m))
    real = _LIBM.fmaf(float(other - other_zp), other_m, product)
    expected = max(-128, min(127, nearest_even(Fraction(real)) + zp))
    result = arith.requantize_residual(
        torch.tensor([acc], dtype=torch.int32), m, torch.tensor([other], dtype=torch.int8), other_zp, other_m, zp
    )
    assert result.tolist() == [expected]


def test_a_residual_of_two_roundings_would_differ() -> None:
    """A case in which fma and multiply-then-add give different int8: the contract's is the fma."""
    g = torch.Generator().manual_seed(4)
    acc = torch.randint(-255, 256, (200_000,), generator=g, dtype=torch.int32)
    other = torch.randint(-128, 128, acc.shape, generator=g, dtype=torch.int32).to(torch.int8)
    m, other_m = arith.float32(0.1), arith.float32(0.3)
    fused = arith.requantize_residual(acc, m, other, 0, other_m, 0)
    separate = (arith.scaled(acc, m) + arith.scaled(other.to(torch.int32), other_m)).clamp(-128, 127).round()
    assert not torch.equal(fused, separate.to(torch.int8))


# --- weights and bias ------------------------------------------------------------------------------


@given(st.lists(int8s.filter(lambda w: w > -128), min_size=1, max_size=6), st.integers(-(2**20), 2**20), int8s)
@settings(max_examples=200, deadline=None)
def test_the_largest_accumulator_bounds_every_input_and_every_order(row: list[int], bias: int, zero_point: int) -> None:
    weight, offset = torch.tensor([row], dtype=torch.int8), torch.tensor([bias], dtype=torch.int32)
    bound = arith.largest_accumulator(weight, offset, zero_point)
    for sign in (1, -1):
        worst = [127 if w * sign > 0 else -128 for w in row]
        partial, reached = bias, abs(bias)
        for w, x in zip(row, worst, strict=True):
            partial += w * (x - zero_point)
            reached = max(reached, abs(partial))
        assert reached <= bound


def test_the_largest_accumulator_is_reached() -> None:
    weight = torch.tensor([[3, 3], [1, -2]], dtype=torch.int8)
    bias = torch.tensor([-5, 100], dtype=torch.int32)
    assert arith.largest_accumulator(weight, bias, 127) == 6 * 255 + 5
    assert arith.largest_accumulator(weight, bias, 0) == 6 * 128 + 5
    assert arith.largest_accumulator(weight[:0], bias[:0], 0) == 0


def test_the_largest_accumulator_does_not_overflow_itself() -> None:
    weight = torch.full((1, 70_000), 127, dtype=torch.int8)
    largest = arith.largest_accumulator(weight, torch.tensor([arith.INT32_MAX], dtype=torch.int32), -128)
    assert largest == 70_000 * 127 * 255 + arith.INT32_MAX
    assert largest > arith.INT32_MAX


def test_a_bias_is_rounded_half_to_even_at_its_channels_scale() -> None:
    bias = float32_tensor(0.5, 1.5, -2.5, 3.0, 2.0**20)
    scale = torch.tensor([1.0, 1.0, 1.0, 0.1, 2.0**-10], dtype=torch.float64)
    assert arith.bias_to_int32(bias, scale).tolist() == [0, 2, -2, 30, 2**30]
