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
from qcompile.observers import TINY, qparams_from_range, quantizations

Cost = Callable[[Tensor, Tensor], Tensor]  # scales (n,), zero points (n,) -> costs (n,)

_RATIO, _COUNT = 0.8, 18  # the parts of each end that are tried first: 1, 0.8, ..., 0.8^17 = 0.02
_ROUNDS, _FINER = 5, 4  # of trying what is around the best; each with the fourth root of the ratio before
_GAIN = 1e-12  # of the sum of squares, that a step of refining has to bring: less is float64's own rounding
_AROUND = 8  # bins on each side of one, that tell how many values a smooth distribution has in it
_SMOOTH = 2  # times their median: so many, and what is beyond is a heap of equal values
_DECIMALS = 9  # of a divergence in nats: what is equal up to there is equal


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


class LearnedStep(LeastSquares):
    """From the range of least squares, scale and zero point are refined to where no small change of either helps.

    While no value goes over to another level, the squared error is a parabola in the scale, and one step of Newton's
    method is its vertex. Steps are taken, with this zero point and those beside it, as long as the error falls.

    Source: Esser et al., "Learned Step Size Quantization" (2020), section 2.1, where the gradient is that of the
    training loss; Bhalgat et al., "LSQ+" (2020), for the zero point, which is an integer here.
    """

    def qparams(self) -> QParams:
        start, moments = super().qparams(), _Moments.of(self)
        scale, zero_point = torch.tensor([[start.scale], [start.zero_point]], dtype=torch.float64)
        lowest = moments.squared_error(scale, zero_point)
        while True:
            beside = (zero_point + torch.tensor([0.0, -1.0, 1.0])).clamp(QMIN, QMAX)
            scales = moments.newton(scale.expand(3), beside)
            errors = moments.squared_error(scales, beside)
            best = errors.argmin()
            if errors[best] >= lowest - _GAIN * moments.sums[2, -1]:
                return QParams(float(scale), int(zero_point))
            scale, zero_point, lowest = scales[best, None], beside[best, None], errors[best]


@dataclass(frozen=True)
class _Moments:
    """Running sums over the bins of a histogram: (3, BINS + 1), of the counts, the values and their squares."""

    histogram: Histogram
    sums: Tensor

    @staticmethod
    def of(histogram: Histogram) -> _Moments:
        values = histogram.values
        return _Moments(histogram, _running(histogram.counts * torch.stack([values**0, values, values**2])))

    def squared_error(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """(n,): of n quantizations."""
        steps, count, value = self._levels(scale, zero_point)
        rounded = steps * scale[:, None]
        return self.sums[2, -1] + (rounded * (rounded * count - 2 * value)).sum(1)

    def newton(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """(n,): for each of n quantizations the best scale for its assignment of values to levels, in float32."""
        steps, count, value = self._levels(scale, zero_point)
        square = (steps**2 * count).sum(1)
        best = torch.where(square > 0, (steps * value).sum(1) / square, scale)
        return best.to(torch.float32).to(torch.float64).clamp(min=TINY)

    def _levels(self, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n, 256) each: the value of a level in units of the scale; the count and the sum of what it takes."""
        at = self.histogram.cells(scale, zero_point)
        at[:, 0], at[:, -1] = 0, self.sums.shape[1] - 1  # what is clipped belongs to the levels at the ends
        count, value = self.sums[:2, at].diff(dim=2)
        return torch.arange(QMIN, QMAX + 1) - zero_point[:, None], count, value


class Entropy(Searched):
    """The range with the smallest Kullback-Leibler divergence of the quantized distribution from that of the values.

    With p(k) the part of all values that bin k holds, the divergence is the sum of p(k) log(p(k) / q(k)), where q
    spreads what a level takes evenly over the bins that it takes, as far as values occur there. Clipped values are
    one heap at their end of p; in q they are spread with what else the level at the end takes, over its own bins
    and all up to the extreme. So a range pays for levels that are too wide to show the shape of the
    distribution, and for all that it clips.

    A heap of equal values within the range costs nothing, wherever it is: the zeros of a relu are exact, and a
    constant is rounded to a constant. Spread over a level, they would draw in the range for a resolution that
    they do not need. So a bin counts as no more than twice the median of those around it. What is clipped counts
    in full.

    Source: Migacz, "8-bit Inference with TensorRT" (GTC 2017), "Entropy Calibration", which has one threshold for both
    ends, and leaves the clipped values out of q.
    """

    def cost(self) -> Cost:
        p = self.counts / self.counts.sum()
        smooth = torch.minimum(p, _SMOOTH * pad(p, (_AROUND, _AROUND)).unfold(0, 2 * _AROUND + 1, 1).median(1).values)
        all_of_p, mass, p_log_p, bins = _running(torch.stack([p, smooth, torch.xlogy(smooth, smooth), smooth > 0]))
        first, last = int((all_of_p <= 0).sum()) - 1, int((all_of_p < all_of_p[-1]).sum())

        def divergence(scale: Tensor, zero_point: Tensor) -> Tensor:
            at = self.cells(scale, zero_point)
            begin, end = at[:, 0], at[:, -1]
            below, above = all_of_p[begin], all_of_p[-1] - all_of_p[end]
            taken, spread = mass[at].diff(dim=1), bins[at].diff(dim=1)
            taken[:, 0] += below
            taken[:, -1] += above
            spread[:, 0] += (begin - first).clamp(min=0)
            spread[:, -1] += (last - end).clamp(min=0)
            of_p = p_log_p[end] - p_log_p[begin] + torch.xlogy(below, below) + torch.xlogy(above, above)
            of_q = torch.xlogy(taken, taken / spread.clamp(min=1)).sum(1)
            return torch.round(of_p - of_q, decimals=_DECIMALS)

        return divergence


def _running(rows: Tensor) -> Tensor:
    """(rows, n) -> (rows, n + 1): the sums of the first 0, 1, ..., n of each row."""
    return pad(rows.cumsum(1), (1, 0))
