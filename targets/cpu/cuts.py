"""How a kernel for a matrix unit cuts its output pixels, and the sum of each, into parts that fill a register.

All parts have the same size, because the registers have. So that nothing outside is read, the last part of what does
not divide starts early, and overlaps the one before: of pixels, it does not store those again; of a sum, the weights
are zero there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from qcompile.targets.base import MatrixUnit
from qcompile.targets.filters import ConvShape


@dataclass(frozen=True)
class Cut:
    """How a run of pixels, or a sum, is cut into parts of one size; the last one may overlap the one before.

    Attributes:
        total: pixels, or groups of four channels.
        count: of parts.
        size: of each.
    """

    total: int
    count: int
    size: int

    @classmethod
    def of(cls, total: int, most: int) -> Cut:
        count = -(-total // most)
        return cls(total, count, -(-total // count))

    @property
    def overlaps(self) -> bool:
        return self.count * self.size > self.total

    def start(self, part: Any) -> Any:
        return T.min(part * self.size, self.total - self.size) if self.overlaps else part * self.size


@dataclass(frozen=True)
class Runs:
    """Pixels of an image whose inputs lie in memory at equal distances.

    Attributes:
        count: of runs in an image: its rows, or one that goes through all of them.
        width: of the image.
        cut: of a run.
        pitch: pixels from one row to the next within a run; those beyond the width are computed and not stored.
    """

    count: int
    width: int
    cut: Cut
    pitch: int | None = None

    @classmethod
    def of(cls, shape: ConvShape, unit: MatrixUnit) -> Runs:
        """Those that take the fewest cycles."""
        _, height, width = shape.y.extents
        ways = [cls(height, width, Cut.of(width, unit.rows))]
        if shape.stride == (1, 1) and height > 1:
            pitch = shape.x.padded[1]
            ways.append(cls(1, width, Cut.of((height - 1) * pitch + width, unit.rows), pitch))
        return min(ways, key=lambda runs: runs.cycles(unit))

    def cycles(self, unit: MatrixUnit) -> int:
        """Of an image, in proportion."""
        return self.parts * max(self.cut.size, unit.latency // 4)

    @property
    def parts(self) -> int:
        """Of an image."""
        return self.count * self.cut.count

    def tiles(self, tall: int) -> int:
        """Of an image, each of `tall` parts."""
        return -(-self.parts // tall)

    @property
    def gaps(self) -> bool:
        """Whether a run goes beyond the width."""
        return self.pitch is not None and self.pitch > self.width

    def place(self, run: Any, pixel: Any) -> tuple[Any, Any]:
        """(row, column) of a pixel of a run."""
        if self.pitch is None:
            return run, pixel
        return T.floordiv(pixel, self.pitch), T.floormod(pixel, self.pitch)
