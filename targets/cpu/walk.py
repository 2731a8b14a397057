"""How a convolution's kernel goes over its output: which tiles there are, and how threads share them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from qcompile.targets.cpu.tasks import Order, split, split_row
from qcompile.targets.layout import Dim, Layout

Pixels = list[tuple[Any, Any, Any]]
"""(image, row, column) of each pixel of a tile."""
Tile = Callable[[Pixels, Any], None]
"""(pixels, block of output channels): emits the code of one tile."""


def walk(y: Layout, rows: int, blocks: int, order: Order, tile: Tile) -> None:
    """Emit `tile` for all of `y`, `rows` pixels and one of `blocks` of channels at a time.

    One long row is cut into tiles across threads; otherwise a thread takes whole image rows, or as many of them as
    `rows` pixels are.
    """
    batch, height, width = y.extents
    lines: Dim = batch * height
    if isinstance(lines, int) and lines == 1:
        split_row(width, rows, blocks, order, lambda w, b, count: tile(_row(0, 0, w, count), b))
        return
    if isinstance(height, int) and isinstance(width, int) and 0 < width < rows:
        _whole_rows(y, rows // width, blocks, order, tile)
        return
    full = width // rows
    rest = width % rows if isinstance(width, int) else None

    def line(t: Any, b: Any) -> None:
        n, h = T.floordiv(t, height), T.floormod(t, height)
        with T.serial(0, full) as i:
            tile(_row(n, h, i * rows, rows), b)
        if rest:
            tile(_row(n, h, full * rows, rest), b)
        elif rest is None:
            with T.serial(0, width - full * rows) as i:
                tile(_row(n, h, full * rows + i, 1), b)

    split(lines, blocks, order, line)


def _row(n: Any, h: Any, w: Any, count: int) -> Pixels:
    return [(n, h, w + i) for i in range(count)]


def _whole_rows(y: Layout, tall: int, blocks: int, order: Order, tile: Tile) -> None:
    """Tiles of `tall` rows of the image."""
    batch, height, width = y.extents
    full, rest = divmod(height, tall)
    groups = full + bool(rest)

    def pixels(n: Any, h: Any, count: int) -> Pixels:
        return [pixel for i in range(count) for pixel in _row(n, h + i, 0, width)]

    def group(t: Any, b: Any) -> None:
        n, g = T.floordiv(t, groups), T.floormod(t, groups)
        if not rest:
            tile(pixels(n, g * tall, tall), b)
            return
        with T.If(g < full):
            with T.Then():
                tile(pixels(n, g * tall, tall), b)
            with T.Else():
                tile(pixels(n, full * tall, rest), b)

    split(batch * groups, blocks, order, group)
