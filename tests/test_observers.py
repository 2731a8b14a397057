"""Observers: the ranges they choose, whatever the order of the data and however it was dealt out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from passing import randn
from torch import Tensor

from qcompile.arith import QMAX, QMIN
from qcompile.config import OBSERVERS, QuantConfig
from qcompile.distributed import Processes, processes
from qcompile.histograms import BINS, Histogram, Percentile
from qcompile.ir import QParams
from qcompile.observers import MinMax, MovingAverage, Observer, qparams_from_range
from qcompile.passes.insert_observers import make
from qcompile.searches import Entropy, LearnedStep, LeastSquares


def observed(observer: Observer, *batches: Tensor) -> Observer:
    for batch in batches:
        observer(batch)
    return observer


def squared_error(x: Tensor, q: QParams) -> float:
    rounded = torch.round(x.double() / q.scale + q.zero_point).clamp(QMIN, QMAX)
    return float((((rounded - q.zero_point) * q.scale - x) ** 2).sum())


def heavy_tailed(seed: int, count: int = 20_000) -> Tensor:
    return randn(count, seed=seed) ** 3


@pytest.mark.parametrize("shape", [heavy_tailed, lambda seed: heavy_tailed(seed).abs(), lambda seed: randn(999) + 9])
def test_the_mse_observer_is_as_good_as_every_range_of_a_grid(shape: Callable[[int], Tensor]) -> None:
    x = shape(0)
    chosen = squared_error(x, observed(LeastSquares(), x).qparams())
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    grid = torch.linspace(0.05, 1, 40)
    best = min(squared_error(x, qparams_from_range(low * float(a), high * float(b))) for a in grid for b in grid)
    assert chosen <= best * 1.02


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("values", [torch.zeros(7), torch.tensor([3.5]), torch.tensor([-1e-3, 0.0]), 1e9 * randn(50)])
def test_every_observer_takes_any_finite_values(name: str, values: Tensor) -> None:
    q = observed(make(QuantConfig(name)), values).qparams()
    assert 0 < q.scale < math.inf
    assert QMIN <= q.zero_point <= QMAX
    largest = float(values.abs().max())
    assert squared_error(values, q) <= len(values) * (largest / 20) ** 2


@pytest.mark.parametrize("kind", [LeastSquares, LearnedStep, Entropy, lambda: Percentile(99.0)])
def test_a_histogram_depends_on_no_order(kind: Callable[[], Histogram]) -> None:
    batches = [10.0**i * randn(300, seed=i) for i in range(-3, 3)] + [torch.tensor([64.0, -64.0, 0.0, -1e-9])]
    there, back = kind(), kind()
    observed(there, *batches)
    observed(back, *batches[::-1])
    assert there.reach == back.reach
    assert torch.equal(there.counts, back.counts)
    assert float(there.counts.sum()) == sum(batch.numel() for batch in batches)
    assert there.qparams() == back.qparams()


def test_a_value_is_counted_in_the_bin_that_holds_it() -> None:
    x = torch.cat([randn(5000), torch.tensor([2.0, -2.0, 1.0, 0.0, -0.0, -1e-30, 1e-30])])
    histogram = LeastSquares()
    observed(histogram, x[:10], x)
    exact = torch.floor(torch.cat([x[:10], x]).double() / histogram.width).long() + BINS // 2
    assert torch.equal(histogram.counts, torch.bincount(exact, minlength=BINS).double())


class _Simulated(Processes):
    """Several processes in one: what they reduce is given in advance, in order."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        self.asked: list[Any] = []
        self.answers: list[Any] = []

    def smallest(self, value: float) -> float:
        self.asked.append((min, value))
        return self._answer()

    def largest_each(self, value: Tensor) -> Tensor:
        raise AssertionError("observers do not ask for this")

    def gather(self, value: Any) -> list[Any]:
        raise AssertionError("observers do not ask for this")

    def sum(self, value: Tensor) -> Tensor:
        self.asked.append((lambda values: torch.stack(list(values)).sum(0), value))
        return self._answer()

    def _answer(self) -> Any:
        if len(self.asked) <= len(self.answers):
            return self.answers[len(self.asked) - 1]
        raise StopIteration


def merged(observers: list[Observer], group: list[_Simulated]) -> None:
    """Let them merge, replaying from the start until every reduction has met every process."""
    before = [dict(observer.__dict__) for observer in observers]
    while True:
        ended = []
        for observer, own, state in zip(observers, group, before, strict=True):
            observer.__dict__.update(state)
            own.asked = []
            try:
                observer.merge(own)
                ended.append(True)
            except StopIteration:
                ended.append(False)
        if all(ended):
            return
        reduce = group[0].asked[-1][0]
        answer = reduce(own.asked[-1][1] for own in group)
        for own in group:
            own.answers.append(answer)


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize(("count", "batches"), [(2, 5), (3, 9), (4, 3)])
def test_dealt_out_data_gives_what_one_process_measures(name: str, count: int, batches: int) -> None:
    data = [(1 + i) * randn(4, 60, seed=i) for i in range(batches)]
    config = QuantConfig(name)
    alone = observed(make(config), *data)
    group = [_Simulated(rank, count) for rank in range(count)]
    observers = [MovingAverage(0.1, own) if name == "moving_average" else make(config) for own in group]
    for rank, observer in enumerate(observers):
        observed(observer, *data[rank::count])
    merged(observers, group)
    assert len({observer.qparams() for observer in (alone, *observers)}) == 1


def test_the_moving_average_is_the_running_one() -> None:
    data = [(1 + i) * randn(60, seed=i) for i in range(7)]
    low, high = float(data[0].min()), float(data[0].max())
    for x in data[1:]:
        low, high = 0.8 * low + 0.2 * float(x.min()), 0.8 * high + 0.2 * float(x.max())
    assert observed(MovingAverage(0.2, processes()), *data).qparams() == qparams_from_range(low, high)


def test_what_another_process_found_not_finite_is_not_finite_here() -> None:
    group = [_Simulated(0, 2), _Simulated(1, 2)]
    observers = [observed(MinMax(), randn(5)), observed(MinMax(), torch.tensor([math.nan]))]
    merged(observers, group)
    assert not observers[0].finite
    assert observers[0].seen
