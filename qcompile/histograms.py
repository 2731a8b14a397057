"""Observers that count values in a histogram of fixed size (those that search it: `qcompile.searches`).

The bins are [k w, (k + 1) w) for a width w that is a power of two. When a value lies beyond them, w doubles and
neighbouring bins become one. Both are exact in floating point, so the counts depend neither on the order of the
data nor on how it was dealt out to processes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qcompile.arith import QMAX, QMIN
from qcompile.distributed import Processes
from qcompile.ir import QParams
from qcompile.observers import TINY, Observer, qparams_from_range

BINS = 1 << 14  # at least 16 for each of the 256 levels, where values have one sign


class Histogram(Observer):
    """Counts of all values, from -reach to reach, and their extremes."""

    def __init__(self) -> None:
        super().__init__()
        self.reach = 0.0
        self.low, self.high = math.inf, -math.inf
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    @property
    def width(self) -> float:
        """Of a bin."""
        return 2 * self.reach / BINS

    def observe(self, x: Tensor, low: float, high: float) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)
        largest = max(abs(low), abs(high), TINY)
        self._widen(2.0 ** math.frexp(largest)[1])  # above `largest`
        at = x.flatten().to(torch.float32).mul(1 / self.width).floor_()  # exact: a power of two
        self.counts += torch.bincount(at.to(torch.int16).add_(BINS // 2), minlength=BINS)  # 16 bits: half the time

    def _widen(self, reach: float) -> None:
        if self.reach == 0.0:
            self.reach = reach
        while self.reach < reach:
            merged = self.counts.view(-1, 2).sum(1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[BINS // 4 : BINS // 4 + BINS // 2] = merged
            self.reach *= 2

    def _merge(self, processes: Processes) -> None:
        self.low, self.high = processes.smallest(self.low), processes.largest(self.high)
        self._widen(processes.largest(self.reach))
        self.counts = processes.sum(self.counts)

    @property
    def values(self) -> Tensor:
        """(BINS,) float64: what the values of a bin are taken to be: its middle, or the extreme that lies in it.

        A range is often made of its ends: a relu6 gives many a 6, a mask many a -10000.
        """
        values = (torch.arange(BINS, dtype=torch.float64) - BINS // 2 + 0.5) * self.width
        for extreme in (self.low, self.high) if self.reach else ():
            values[math.floor(extreme / self.width) + BINS // 2] = extreme
        return values

    def cells(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """(n, 257) int64: for each of n quantizations, where among the bins each level begins, and where the last ends.

        A bin belongs to the level that its middle rounds to; those before the first and behind the last are clipped.
        """
        levels = torch.arange(QMIN, QMAX + 2, dtype=torch.float64)
        edges = (levels - 0.5 - zero_point[:, None]) * (scale[:, None] / self.width)
        return torch.ceil(edges - 0.5).add_(BINS // 2).clamp_(0, BINS).to(torch.int64)


class Percentile(Histogram):
    """The range that holds `percentile` per cent of all values, half of the rest beyond each end."""

    def __init__(self, percentile: float) -> None:
        super().__init__()
        self.percentile = percentile

    def qparams(self) -> QParams:
        tail = float(self.counts.sum()) * (1 - self.percentile / 100) / 2
        below = torch.cumsum(self.counts, 0)
        above = torch.cumsum(self.counts.flip(0), 0)
        first, last = int((below <= tail).sum()), BINS - int((above <= tail).sum())
        # A bin's far edge may lie beyond every value that was seen.
        low, high = first * self.width - self.reach, last * self.width - self.reach
        return qparams_from_range(max(self.low, low), min(self.high, high))
