"""Observers that search a histogram for the quantization of least cost.

Where a histogram meets a quantization, each of the 256 levels takes a run of bins. A sum over a run is the difference
of two running sums, so that a quantization is judged by 256 subtractions, and hundreds of them are judged at a time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from qcompile.arith import QMAX, QMIN
from qcompile.histograms import Histogram
from qcompile.ir import QParams
from qcompile.observers import qparams_from_range, quantizations

Cost = Callable[[Tensor, Tensor], Tensor]  # scales (n,), zero points (n,) -> costs (n,)

_RATIO, _COUNT = 0.8, 18  # the parts of each end that are tried first: 1, 0.8, ..., 0.8^17 = 0.02
_ROUNDS, _FINER = 5, 4  # of trying what is around the best; each with the fourth root of the ratio before


class Searched(Histogram):
    """Both ends of the range are drawn in, each by itself, to where the cost is least; of equals the widest wins."""

    @abstractmethod
    def cost(self) -> Cost:
        """What to minimize."""

    def qparams(self) -> QParams:
        low, high = best = [min(self.low, 0.0), max(self.high, 0.0)]
        cost, ratio, steps = self.cost(), _RATIO, torch.arange(_COUNT, dtype=torch.float64)
        for _ in range(1 + _ROUNDS):
            ends = [end * ratio**steps if end else torch.zeros(1, dtype=torch.float64) for end in best]
            tried = torch.cartesian_prod(*ends)
            tried = tried[(tried[:, 0] >= low) & (tried[:, 1] <= high)]
            best = tried[cost(*quantizations(*tried.T)).argmin()].tolist()
            ratio, steps = ratio ** (1 / _FINER), torch.arange(-_FINER, _FINER + 1, dtype=torch.float64)
        return qparams_from_range(*best)


class LeastSquares(Searched):
    """The range with the smallest sum of squared errors, of rounding and of clipping together.

    Source: Nagel et al., "A White Paper on Neural Network Quantization" (2021), section 3.1, "Mean squared error".
    """

    def cost(self) -> Cost:
        return _Moments.of(self).squared_error


@dataclass(frozen=True)
class _Moments:
    """Running sums over the bins of a histogram: (3, BINS + 1), of the counts, the values and their squares."""

    histogram: Histogram
    sums: Tensor

    @staticmethod
    def of(histogram: Histogram) -> _Moments:
        values = histogram.middles
        return _Moments(histogram, _running(histogram.counts * torch.stack([values**0, values, values**2])))

    def squared_error(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """(n,): of n quantizations."""
        steps, count, value = self._levels(scale, zero_point)
        rounded = steps * scale[:, None]
        return self.sums[2, -1] + (rounded * (rounded * count - 2 * value)).sum(1)

    def _levels(self, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n, 256) each: the value of a level in units of the scale; the count and the sum of what it takes."""
        at = self.histogram.cells(scale, zero_point)
        at[:, 0], at[:, -1] = 0, self.sums.shape[1] - 1  # what is clipped belongs to the levels at the ends
        count, value = self.sums[:2, at].diff(dim=2)
        return torch.arange(QMIN, QMAX + 1) - zero_point[:, None], count, value


def _running(rows: Tensor) -> Tensor:
    """(rows, n) -> (rows, n + 1): the sums of the first 0, 1, ..., n of each row."""
    return pad(rows.cumsum(1), (1, 0))
