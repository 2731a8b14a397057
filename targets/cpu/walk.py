"""How a convolution's kernel goes over its output: which tiles there are, and how threads share them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from qcompile.targets.cpu.tasks import split, split_row
from qcompile.targets.layout import Dim, Layout

Tile = Callable[[Any, Any, Any, Any, int], None]
"""(image, row, column of the first pixel, block of output channels, pixels): emits the code of one tile."""


def walk(y: Layout, rows: int, blocks: int, channels_outer: bool, tile: Tile) -> None:
    """Emit `tile` for all of `y`, `rows` pixels and one of `blocks` of channels at a time.

    One long row is cut into tiles across threads; otherwise a thread takes whole image rows.
    """
    batch, height, width = y.extents
    lines: Dim = batch * height
    full = width // rows
    rest = width % rows if isinstance(width, int) else None
    if isinstance(lines, int) and lines == 1:
        split_row(width, rows, blocks, channels_outer, lambda w, b, count: tile(0, 0, w, b, count))
        return

    def line(t: Any, b: Any) -> None:
        n, h = T.floordiv(t, height), T.floormod(t, height)
        with T.serial(0, full) as i:
            tile(n, h, i * rows, b, rows)
        if rest:
            tile(n, h, full * rows, b, rest)
        elif rest is None:
            with T.serial(0, width - full * rows) as i:
                tile(n, h, full * rows + i, b, 1)

    split(lines, blocks, channels_outer, line)
