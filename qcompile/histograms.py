"""Observers that count values in a histogram of fixed size, and choose the range from it.

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
_SMALLEST, _STEPS = 0.02, 50  # of a range that is tried, as a part of the widest; and how many are tried at a time
_ROUNDS = 3  # of refining; each has a tenth of the step of the one before


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
        at = x.flatten().to(torch.float32).mul(1 / self.width).floor_().add_(BINS // 2)  # exact: powers of two
        self.counts += torch.bincount(at.to(torch.int64), minlength=BINS)

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

    def occupied(self) -> tuple[Tensor, Tensor]:
        """(the middles of the bins that hold values, their counts)."""
        (at,) = torch.nonzero(self.counts, as_tuple=True)
        return (at.double() - BINS // 2 + 0.5) * self.width, self.counts[at]


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


class LeastSquares(Histogram):
    """The range with the smallest sum of squared errors, of rounding and of clipping together.

    Both ends are drawn in, by one factor at first and then each by itself.

    Source: Nagel et al., "A White Paper on Neural Network Quantization" (2021), section 3.1, "Mean squared error".
    """

    def qparams(self) -> QParams:
        values, counts = self.occupied()
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        ends = [end for end, edge in enumerate((low, high)) if edge]

        def cost(ends: tuple[float, float]) -> float:
            return _squared_error(qparams_from_range(low * ends[0], high * ends[1]), values, counts)

        grid = [1 - i * (1 - _SMALLEST) / _STEPS for i in range(_STEPS + 1)]
        best = min(((part, part) for part in grid), key=cost)
        step = (1 - _SMALLEST) / _STEPS
        for _ in range(_ROUNDS):
            for end in ends:
                tried = [best[end] + i * step / 5 for i in range(-10, 11)]
                tried = [part for part in tried if _SMALLEST / 2 <= part <= 1]
                best = min(((part, best[1]) if end == 0 else (best[0], part) for part in tried), key=cost)
            step /= 10
        return qparams_from_range(low * best[0], high * best[1])


def _squared_error(params: QParams, values: Tensor, counts: Tensor) -> float:
    """Of quantizing `values`, each of which occurred `counts` times."""
    q = torch.round(values / params.scale + params.zero_point).clamp_(QMIN, QMAX)
    error = (q - params.zero_point).mul_(params.scale).sub_(values)
    return float(counts @ error.square_())
