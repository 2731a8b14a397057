"""Observers that search: each finds the least cost as its definition has it, written out value by value here."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passing import randn
from torch import Tensor

from qcompile.arith import QMAX, QMIN, float32
from qcompile.histograms import BINS, Histogram
from qcompile.ir import QParams
from qcompile.observers import qparams_from_range, quantizations
from qcompile.searches import Entropy, LearnedStep, LeastSquares, Searched


def observed(kind: type[Searched], x: Tensor) -> Searched:
    observer = kind()
    observer(x)
    return observer


def random_ranges(x: Tensor, seed: int, count: int = 20) -> Tensor:
    """(2, count): the range of `x`, and others down to a hundredth of it, each end by itself."""
    part = 10.0 ** (-2 * torch.rand(2, count, generator=torch.Generator().manual_seed(seed)).double())
    part[:, 0] = 1.0
    return part * torch.tensor([[min(float(x.min()), 0.0)], [max(float(x.max()), 0.0)]])


def normal(seed: int, count: int = 3000) -> Tensor:
    return randn(count, seed=seed)


def lopsided(seed: int) -> Tensor:
    """A short tail below, a long one above."""
    x = randn(30_000, seed=seed)
    return torch.where(x < 0, -(x.abs().clamp(max=1.0)), x**3)


def activated(seed: int) -> Tensor:
    """As behind a relu6: many zeros, some sixes, and a heap where a bias stands alone."""
    x = 3 * randn(30_000, seed=seed)
    x[:3000] = 1.2345
    return x.clamp(0, 6)


def few(seed: int) -> Tensor:
    return randn(12, seed=seed)


SHAPES = [normal, lopsided, activated, few]


def middles(histogram: Histogram) -> Tensor:
    return (torch.arange(BINS).double() - BINS // 2 + 0.5) * histogram.width


def level(middle: float, q: QParams) -> int:
    """Before it is clipped."""
    return round(middle / q.scale + q.zero_point)


def divergence(histogram: Histogram, q: QParams) -> float:
    """The definition of `Entropy`, bin by bin."""
    counts, middle = histogram.counts.tolist(), middles(histogram).tolist()
    total, occupied = sum(counts), [k for k in range(BINS) if counts[k]]
    p: dict[int, float] = {}  # of the bins within the range, without heaps
    clipped = {QMIN: 0.0, QMAX: 0.0}
    room = dict.fromkeys(range(QMIN, QMAX + 1), 0)  # how many bins each level is spread over
    for k in range(occupied[0], occupied[-1] + 1):
        at = level(middle[k], q)
        if not QMIN <= at <= QMAX:
            end = QMIN if at < QMIN else QMAX
            clipped[end] += counts[k] / total
            room[end] += 1
            continue
        around = sorted(counts[i] if 0 <= i < BINS else 0.0 for i in range(k - 8, k + 9))
        smooth = min(counts[k], 2 * around[8]) / total
        if smooth:
            p[k] = smooth
            room[at] += 1
    taken = {at: clipped.get(at, 0.0) for at in room}
    for k, part in p.items():
        taken[level(middle[k], q)] += part
    spread = {at: taken[at] / room[at] for at in room if room[at]}
    heaps = [(part, spread[end]) for end, part in clipped.items() if part]
    return sum(part * math.log(part / of_q) for part, of_q in heaps) + sum(
        part * math.log(part / spread[level(middle[k], q)]) for k, part in p.items()
    )


def error_of(observer: Searched, scale: float, zero_point: int) -> float:
    """The squared error, bin by bin."""
    q = torch.round(middles(observer) / scale + zero_point).clamp(QMIN, QMAX)
    return float(observer.counts @ ((q - zero_point) * scale - observer.values) ** 2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_divergence_is_that_of_the_definition(shape: Callable[[int], Tensor], sign: int) -> None:
    x = sign * shape(1)
    observer = observed(Entropy, x)
    scales, zero_points = quantizations(*random_ranges(x, seed=2, count=6))
    actual = observer.cost()(scales, zero_points).tolist()
    for scale, zero_point, value in zip(scales.tolist(), zero_points.tolist(), actual, strict=True):
        assert value == pytest.approx(divergence(observer, QParams(scale, int(zero_point))), abs=2e-9)
        assert value >= 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_squared_error_is_that_of_the_definition(shape: Callable[[int], Tensor], sign: int) -> None:
    x = sign * shape(1)
    observer = observed(LeastSquares, x)
    scales, zero_points = quantizations(*random_ranges(x, seed=2))
    for scale, zero_point, value in zip(scales, zero_points, observer.cost()(scales, zero_points), strict=True):
        assert float(value) == pytest.approx(error_of(observer, float(scale), int(zero_point)), rel=1e-7)


@pytest.mark.parametrize("kind", [LeastSquares, LearnedStep, Entropy])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_no_other_range_costs_less(kind: type[Searched], shape: Callable[[int], Tensor], sign: int) -> None:
    x = sign * shape(3)
    observer = observed(kind, x)
    found = observer.qparams()
    cost = observer.cost()
    chosen = cost(torch.tensor([found.scale]).double(), torch.tensor([found.zero_point]).double())
    others = cost(*quantizations(*random_ranges(x, seed=4, count=1000)))
    assert chosen <= others.min() * 1.01 + 1e-9


def test_ranges_become_quantizations_as_the_formula_says() -> None:
    lows, highs = 3 * randn(2, 50, seed=5).double().sort(0).values
    for low, high, scale, zero_point in zip(lows, highs, *quantizations(lows, highs), strict=True):
        low, high = min(float(low), 0.0), max(float(high), 0.0)
        assert float(scale) == float32((high - low) / 255)
        assert int(zero_point) == min(max(round(-128 - low / float(scale)), QMIN), QMAX)
        assert qparams_from_range(low, high) == QParams(float(scale), int(zero_point))


@pytest.mark.parametrize("kind", [LeastSquares, LearnedStep, Entropy])
@pytest.mark.parametrize("end", [-10_000.0, 6.0, 1.0])
def test_an_end_that_many_values_have_is_met(kind: type[Searched], end: float) -> None:
    q = observed(kind, torch.tensor([end] * 50 + [0.0] * 50)).qparams()
    reached = ((QMIN if end < 0 else QMAX) - q.zero_point) * q.scale
    assert reached == pytest.approx(end, rel=1e-6)


# --- entropy ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
def test_entropy_clips_an_outlier_and_nothing_else(sign: int) -> None:
    x = torch.cat([randn(100_000).abs(), torch.tensor([100.0])])
    q = observed(Entropy, sign * x).qparams()
    assert float(x[:-1].max()) * 0.7 <= 255 * q.scale <= float(x[:-1].max()) * 1.3
    assert q.zero_point == (QMIN if sign == 1 else QMAX)


def test_entropy_chooses_each_end_by_itself() -> None:
    x = torch.cat([-torch.rand(100_000, generator=torch.Generator().manual_seed(0)), randn(100_000, seed=1).abs() ** 3])
    q = observed(Entropy, x).qparams()
    assert (QMIN - q.zero_point) * q.scale == pytest.approx(-1.0, abs=q.scale)
    assert 3 < (QMAX - q.zero_point) * q.scale < 0.8 * float(x.max())


@pytest.mark.parametrize("heap", [0.0, 1.2345, 6.0])
def test_a_heap_of_equal_values_does_not_draw_in_the_range(heap: float) -> None:
    x = (2 * randn(100_000).abs()).clamp(max=6.0)
    q = observed(Entropy, torch.cat([x, torch.full((200_000,), heap)])).qparams()
    assert 255 * q.scale == pytest.approx(6.0, rel=0.01)


@pytest.mark.parametrize(
    "values",
    [
        torch.full((100,), 3.5),
        torch.tensor([-2.0]),
        torch.tensor([1.0] * 90 + [100.0] * 10),
        torch.tensor([1.0] * 9000 + [-100.0]),
        torch.tensor([0.0] * 9 + [-1e-3]),
        torch.arange(11).repeat(50).float(),
        torch.cat([0.5 * randn(9).sigmoid(), torch.tensor([1.0])]),
        randn(40),
        torch.cat([randn(9000).sigmoid(), torch.full((1000,), 100.0)]),
    ],
    ids=["one value", "a single one", "two values", "two signs", "zeros", "whole numbers", "ten", "forty", "two heaps"],
)
def test_what_has_no_shape_to_lose_keeps_its_whole_range(values: Tensor) -> None:
    assert observed(Entropy, values).qparams() == qparams_from_range(float(values.min()), float(values.max()))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 4000),
    st.floats(0.3, 4.0),
    st.floats(-2.0, 2.0),
    st.sampled_from([1e-35, 1e-3, 1.0, 1e20]),
    st.booleans(),
)
def test_every_search_is_sane_whatever_it_sees(
    seed: int, count: int, power: float, shift: float, size: float, relu: bool
) -> None:
    x = randn(count, seed=seed).double()
    x = ((x.sign() * x.abs() ** power + shift) * size).float()
    x = x.relu() if relu else x
    largest = float(x.abs().max())
    for kind in (LeastSquares, LearnedStep, Entropy):
        q = observed(kind, x).qparams()
        rounded = torch.round(x.double() / q.scale + q.zero_point).clamp(QMIN, QMAX)
        error = (rounded - q.zero_point) * q.scale - x.double()
        assert 0 < q.scale < math.inf
        assert QMIN <= q.zero_point <= QMAX
        assert float(error.square().mean().sqrt()) <= max(largest / 20, 2.0**-100)


# --- lsq -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_the_learned_step_is_no_worse_than_least_squares(shape: Callable[[int], Tensor], seed: int) -> None:
    observer = observed(LearnedStep, shape(seed))
    start, found = LeastSquares.qparams(observer), observer.qparams()
    assert error_of(observer, found.scale, found.zero_point) <= error_of(observer, start.scale, start.zero_point)


@pytest.mark.parametrize("seed", range(5))
def test_at_the_learned_step_the_gradient_is_zero(seed: int) -> None:
    """The best scale for the assignment of values to levels is the scale itself, or as good."""
    observer = observed(LearnedStep, randn(200, seed=seed) ** 3)
    found = observer.qparams()
    steps = torch.round(middles(observer) / found.scale + found.zero_point).clamp(QMIN, QMAX) - found.zero_point
    best = (observer.counts @ (steps * observer.values)) / (observer.counts @ steps**2)
    chosen = error_of(observer, found.scale, found.zero_point)
    assert error_of(observer, float32(float(best)), found.zero_point) >= chosen * (1 - 1e-6)
    assert float(best) == pytest.approx(found.scale, rel=1e-5)


def test_the_learned_step_meets_few_values_better() -> None:
    observers = [observed(LearnedStep, randn(5, seed=seed).repeat(10)) for seed in range(10)]
    starts, found = [LeastSquares.qparams(o) for o in observers], [o.qparams() for o in observers]
    before, after = (
        sum(error_of(o, q.scale, q.zero_point) for o, q in zip(observers, each, strict=True))
        for each in (starts, found)
    )
    assert after < 0.8 * before
