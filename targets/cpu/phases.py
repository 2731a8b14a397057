"""A convolution with strides as one without, over pixels that were put in another order.

With stride s, output pixel p reads for tap k the input pixel

    s * p + k = s * (p + k // s) + k % s

which is number p + k // s of those that leave the remainder k % s: of phase k % s. Where the phases of an image lie one
after the other, each as an image of its own, neighbouring output pixels read neighbouring pixels, through the rows of
an image as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tvm.tirx.script import builder as T

from qcompile.targets.cpu.elementwise import launch
from qcompile.targets.cpu.emit import load, store
from qcompile.targets.filters import ConvShape
from qcompile.targets.layout import Layout


@dataclass(frozen=True)
class Phases:
    """
    Attributes:
        given: the convolution.
        counts: how many phases the taps read, of rows and of columns.
        shape: the convolution of the phases: stride 1, padding 0. Image (n * counts[0] + a) * counts[1] + b of its x is
            phase (a, b) of image n. Its kernel is that of `given`, and `tap` says where it reads.
    """

    given: ConvShape
    counts: tuple[int, int]
    shape: ConvShape

    @classmethod
    def of(cls, given: ConvShape) -> Phases:
        """`given`: of a known size."""
        rows, columns = map(min, given.stride, given.kernel)
        batch, *sizes = given.y.extents
        further = [(taps - 1) // step for taps, step in zip(given.kernel, given.stride, strict=True)]
        extents = [size + more for size, more in zip(sizes, further, strict=True)]
        x = Layout((batch * rows * columns, given.x.channels, *extents), True, given.x.pitch)
        return cls(given, (rows, columns), replace(given, x=x, stride=(1, 1), padding=(0, 0)))

    def tap(self, n: Any, i_h: Any, i_w: Any) -> tuple[Any, Any, Any]:
        """(image of x, rows down, columns right) of a tap."""
        (rows, columns), (down, right) = self.counts, self.given.stride
        phase = (T.floormod(i_h, down), T.floormod(i_w, right))
        return (n * rows + phase[0]) * columns + phase[1], T.floordiv(i_h, down), T.floordiv(i_w, right)

    def arrange(self, x: Any, phases: Any) -> None:
        """Copy buffer `x` of `given` to buffer `phases` of `shape`. What no output reads may hold anything."""
        given, (images, height, width), (rows, columns) = self.given, self.shape.x.extents, self.counts
        ends = [size - halo for size, halo in zip(given.x.padded, given.x.halo[::2], strict=True)]
        with launch(images * height, self.shape.x.size) as line:
            image, h = T.floordiv(line, height), T.floormod(line, height)
            n, a, b = T.floordiv(image, rows * columns), T.floormod(image // columns, rows), T.floormod(image, columns)
            row = T.min(h * given.stride[0] + a - given.padding[0], ends[0] - 1)
            with T.serial(0, width) as w:
                column = T.min(w * given.stride[1] + b - given.padding[1], ends[1] - 1)
                source, place = given.x.offset(n, row, column, 0), self.shape.x.offset(image, h, w, 0)
                _copy(x, source, phases, place, given.x.pitch)


def _copy(x: Any, source: Any, y: Any, place: Any, count: int, lanes: int = 64) -> None:
    whole = count // lanes
    if whole:
        with T.serial(0, whole) as i:
            store(y, place + i * lanes, load(x, source + i * lanes, lanes), lanes)
    if rest := count % lanes:
        _copy(x, source + whole * lanes, y, place + whole * lanes, rest, lanes // 2)
