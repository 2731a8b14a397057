"""What every convolution kernel is given: the geometry, and the filters with their numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompile.targets.base import DotProduct, InstructionSet
from qcompile.targets.layout import NO_HALO, Layout, joins_taps


@dataclass(frozen=True)
class ConvShape:
    """The geometry of one convolution; everything that shapes the code and nothing else."""

    x: Layout
    y: Layout
    residual: Layout | None
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]  # top, left
    dilation: tuple[int, int]
    groups: int

    @property
    def kind(self) -> str:
        """As kernels are called."""
        return "gemm" if self.kernel == (1, 1) else f"conv{self.kernel[0]}x{self.kernel[1]}"

    @property
    def joined(self) -> int:
        """How many taps of a row of the kernel are summed as one, because their channels lie side by side in memory."""
        joins = joins_taps(self.kernel[1], self.x.channels, self.dilation[1], self.groups)
        return self.kernel[1] if joins and self.x.pitch == self.x.channels else 1

    def flat(self) -> ConvShape:
        """As one long row of pixels, where pixels of input and output correspond one to one."""
        layouts = (self.x, self.y, *([self.residual] if self.residual else []))
        pointwise = self.kernel == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)
        if not pointwise or any(layout.halo != NO_HALO for layout in layouts):
            return self
        residual = self.residual.flattened() if self.residual else None
        return ConvShape(self.x.flattened(), self.y.flattened(), residual, (1, 1), (1, 1), (0, 0), (1, 1), self.groups)


@dataclass(frozen=True)
class Filters:
    """The weights of one convolution and the numbers that come with them.

    Attributes:
        weight: (out channels, in channels / groups, kernel height, kernel width) int8.
        bias: (out channels,) int32, at the scale of the accumulators.
        m: (out channels,) float32, the multiplier of requantize.
        x_zero_point: of the input.
    """

    weight: np.ndarray
    bias: np.ndarray
    m: np.ndarray
    x_zero_point: int

    def _rows(self) -> np.ndarray:
        return self.weight.astype(np.int64).reshape(len(self.weight), -1)

    def folded_bias(self, isa: InstructionSet, dot: DotProduct | None = None) -> np.ndarray:
        """int32: the bias less what the stored zero point of the input, and the way to multiply, add to every sum.

        Exact in wrapping arithmetic, because the true accumulator fits int32.
        """
        folded = self.bias.astype(np.int64) - (self.x_zero_point + isa.offset) * self._rows().sum(1)
        if dot is not None:
            folded -= dot.surplus(self._rows())
        return (folded & 0xFFFFFFFF).astype(np.uint32).view(np.int32)

    def largest_accumulators(self) -> np.ndarray:
        """Per output channel a bound of |accumulator| that holds for every input and zero point."""
        return np.asarray(np.abs(self.bias.astype(np.int64)) + 255 * np.abs(self._rows()).sum(1))
