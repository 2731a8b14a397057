"""Observers: what calibration measures of an activation, in memory that does not grow with the data.

An observer is an identity module in the observed graph. Its range always includes zero, so that
padding and relu are exact; `qparams` turns it into scale and zero point:

    scale = float32((max - min) / 255)        zero_point = rne(-128 - min / scale), clamped to int8
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from qcompile.arith import QMAX, QMIN, float32
from qcompile.config import QuantConfig
from qcompile.ir import QParams

_ENORMOUS = 1e30  # beyond this a value is a mask ("minus infinity"), not a measurement
_TINY = 2.0**-100  # a smaller scale would leave float32 once multiplied with another


def qparams_from_range(low: float, high: float) -> QParams:
    """int8 quantization of [low, high], widened to hold zero. A constant zero gets scale 1."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float32((high - low) / (QMAX - QMIN))
    if scale < _TINY:
        return QParams(1.0 if high == low else _TINY, 0)
    return QParams(scale, max(QMIN, min(QMAX, round(QMIN - low / scale))))


class Observer(nn.Module, ABC):
    """Watches one activation. `finite` turns False once a value is NaN, infinite or enormous."""

    def __init__(self) -> None:
        super().__init__()
        self.finite = True
        self.seen = False

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() and type(x) is Tensor:  # not while shapes are being inferred
            low, high = (float(v) for v in torch.aminmax(x.detach()))
            if not -_ENORMOUS < low <= high < _ENORMOUS:
                self.finite = False
            elif self.finite:
                self.observe(x.detach(), low, high)
                self.seen = True
        return x

    @abstractmethod
    def observe(self, x: Tensor, low: float, high: float) -> None:
        """Take in one batch, whose extremes are `low` and `high`."""

    @abstractmethod
    def qparams(self) -> QParams:
        """The quantization that the values seen so far call for."""


class MinMax(Observer):
    """The extremes over all values."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = math.inf, -math.inf

    def observe(self, x: Tensor, low: float, high: float) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)

    def qparams(self) -> QParams:
        return qparams_from_range(self.low, self.high)


class MovingAverage(Observer):
    """An exponential moving average of each batch's extremes; `weight` is that of a new batch."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight, self.low, self.high = weight, 0.0, 0.0

    def observe(self, x: Tensor, low: float, high: float) -> None:
        if not self.seen:
            self.low, self.high = low, high
        self.low += self.weight * (low - self.low)
        self.high += self.weight * (high - self.high)

    def qparams(self) -> QParams:
        return qparams_from_range(self.low, self.high)


class Percentile(Observer):
    """The range that holds `percentile` per cent of all values, half of the rest beyond each end.

    A histogram of fixed size over [-reach, reach]. When a value lies beyond, `reach` doubles and
    neighbouring bins merge in pairs, so no value is ever counted in a wrong bin.
    """

    BINS = 4096

    def __init__(self, percentile: float) -> None:
        super().__init__()
        self.percentile = percentile
        self.reach = 0.0
        self.low, self.high = math.inf, -math.inf
        self.counts = torch.zeros(self.BINS, dtype=torch.float64)

    def observe(self, x: Tensor, low: float, high: float) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)
        largest = max(abs(low), abs(high), _TINY)
        if self.reach == 0.0:
            self.reach = 2.0 ** math.ceil(math.log2(largest))
        while self.reach < largest:
            merged = self.counts.view(-1, 2).sum(1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[self.BINS // 4 : self.BINS // 4 + self.BINS // 2] = merged
            self.reach *= 2
        self.counts += torch.histc(x.to(torch.float32), self.BINS, -self.reach, self.reach)

    def qparams(self) -> QParams:
        tail = float(self.counts.sum()) * (1 - self.percentile / 100) / 2
        below = torch.cumsum(self.counts, 0)
        above = torch.cumsum(self.counts.flip(0), 0)
        first, last = int((below <= tail).sum()), self.BINS - int((above <= tail).sum())
        width = 2 * self.reach / self.BINS
        # A bin's far edge may lie beyond every value that was seen.
        return qparams_from_range(max(self.low, first * width - self.reach), min(self.high, last * width - self.reach))


class Shared(Observer):
    """Stands after an operator that only moves or selects values: its output has its input's quantization."""

    def __init__(self, of: Observer) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        return x

    def observe(self, x: Tensor, low: float, high: float) -> None:
        raise AssertionError("a shared observer measures nothing")

    def qparams(self) -> QParams:
        return self.of.qparams()


def make(config: QuantConfig) -> Observer:
    """A fresh observer, as `config` asks."""
    if config.observer == "percentile":
        return Percentile(config.percentile)
    return MovingAverage(config.averaging) if config.observer == "moving_average" else MinMax()


def root(observer: Observer) -> Observer:
    """The observer that measures: `observer` itself, or the one that it shares."""
    while isinstance(observer, Shared):
        observer = observer.of
    return observer
