"""Observers: what calibration measures of an activation, in memory that does not grow with the data.

An observer is an identity module in the observed graph. Its range always includes zero, so that
padding and relu are exact; `quantizations` turns it into scale and zero point:

    scale = float32((max - min) / 255)        zero_point = rne(-128 - min / scale), clamped to int8
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from qcompile.arith import QMAX, QMIN
from qcompile.distributed import Processes
from qcompile.ir import QParams

_ENORMOUS = 1e30  # beyond this a value is a mask ("minus infinity"), not a measurement
TINY = 2.0**-100  # a smaller scale would leave float32 once multiplied with another


def quantizations(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """(scales, zero points) of the ranges [low, high], each widened to hold zero; all are float64 of one shape.

    The scales are float32 values and the zero points integers. A constant zero gets scale 1.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (QMAX - QMIN)).to(torch.float32).to(torch.float64)
    tiny = scale < TINY
    scale = torch.where(tiny, torch.where(high == low, 1.0, TINY), scale)
    zero_point = torch.round(QMIN - low / scale).clamp(QMIN, QMAX)
    return scale, torch.where(tiny, 0.0, zero_point)


def qparams_from_range(low: float, high: float) -> QParams:
    """int8 quantization of [low, high], as `quantizations` has it."""
    scale, zero_point = quantizations(*torch.tensor([low, high], dtype=torch.float64))
    return QParams(float(scale), int(zero_point))


class Observer(nn.Module, ABC):
    """Watches one activation.

    Attributes:
        finite: turns False once a value is NaN, infinite or enormous.
        seen: whether there was a value.
        continues: whether what comes next is of the batch before: one that is too large for the model comes in pieces.
    """

    def __init__(self) -> None:
        super().__init__()
        self.finite = True
        self.seen = self.continues = False

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
        """Take in one batch, or a piece of one, whose extremes are `low` and `high`."""

    def merge(self, processes: Processes) -> None:
        """Take in what the observers in the place of this one measured in the other processes."""
        self.finite = processes.smallest(float(self.finite)) == 1.0
        self.seen = processes.largest(float(self.seen)) == 1.0
        self._merge(processes)

    @abstractmethod
    def _merge(self, processes: Processes) -> None: ...

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

    def _merge(self, processes: Processes) -> None:
        self.low, self.high = processes.smallest(self.low), processes.largest(self.high)

    def qparams(self) -> QParams:
        return qparams_from_range(self.low, self.high)


class MovingAverage(Observer):
    """An exponential moving average of each batch's extremes; `weight` is that of a new batch.

    Of n batches the first counts (1 - weight)^(n - 1), and batch i > 1 counts weight (1 - weight)^(n - i). Kept
    are the sums of the lows, the highs and these weights over the batches of this process, as of its last one.
    """

    def __init__(self, weight: float, processes: Processes) -> None:
        super().__init__()
        self.weight, self._rank, self._count = weight, processes.rank, processes.count
        self._taken = 0
        self._sums = self._before = torch.zeros(3, dtype=torch.float64)  # with the last batch, and without
        self._last = math.inf, -math.inf

    def observe(self, x: Tensor, low: float, high: float) -> None:
        if self.continues and self._taken:
            low, high = min(low, self._last[0]), max(high, self._last[1])
        else:
            self._taken += 1
            self._before = self._sums * (1 - self.weight) ** self._count
        self._last = low, high
        weight = 1.0 if self._taken == 1 and self._rank == 0 else self.weight
        self._sums = self._before + weight * torch.tensor([low, high, 1.0], dtype=torch.float64)

    def _merge(self, processes: Processes) -> None:
        last = (self._taken - 1) * self._count + self._rank if self._taken else -1
        later = processes.largest(last) - last
        self._sums = processes.sum(self._sums * (1 - self.weight) ** later)

    def qparams(self) -> QParams:
        low, high, weights = self._sums.tolist()
        return qparams_from_range(low / weights, high / weights) if weights else qparams_from_range(0.0, 0.0)


class Shared(Observer):
    """Stands after an operator that only moves or selects values: its output has its input's quantization."""

    def __init__(self, of: Observer) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        return x

    def observe(self, x: Tensor, low: float, high: float) -> None:
        raise AssertionError("a shared observer measures nothing")

    def merge(self, processes: Processes) -> None:
        pass

    def _merge(self, processes: Processes) -> None:
        pass

    def qparams(self) -> QParams:
        return self.of.qparams()


def root(observer: Observer) -> Observer:
    """The observer that measures: `observer` itself, or the one that it shares."""
    while isinstance(observer, Shared):
        observer = observer.of
    return observer
