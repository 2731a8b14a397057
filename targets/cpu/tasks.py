"""How the register tiles of a kernel become the tasks of one parallel loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.sym import Analyzer
from tvm.tirx.script import builder as T

from qcompile.targets.cpu.emit import parallel
from qcompile.targets.layout import Dim


def split(lines: Dim, blocks: int, channels_outer: bool, body: Callable[[Any, Any], None]) -> None:
    """One parallel loop over lines x blocks of output channels, in the chosen order: body(line, block)."""
    if Analyzer().can_prove_equal(lines, 0):  # TVM refuses to divide by what it can prove to be zero
        return
    with parallel(lines * blocks) as task:
        if channels_outer:
            body(T.floormod(task, lines), T.floordiv(task, lines))
        else:
            body(T.floordiv(task, blocks), T.floormod(task, blocks))


def split_row(width: Dim, rows: int, blocks: int, channels_outer: bool, tile: Callable[[Any, Any, int], None]) -> None:
    """One long row of `width` pixels, cut into tiles of `rows` across threads: tile(first pixel, block, pixels)."""
    full = width // rows
    rest = width % rows if isinstance(width, int) else None
    if rest:  # in the same loop: another would cost another launch

        def part(t: Any, b: Any) -> None:
            with T.If(t < full):
                with T.Then():
                    tile(t * rows, b, rows)
                with T.Else():
                    tile(full * rows, b, rest)

        split(full + 1, blocks, channels_outer, part)
    else:
        split(full, blocks, channels_outer, lambda t, b: tile(t * rows, b, rows))
    if rest is None:
        split(width - full * rows, blocks, True, lambda t, b: tile(full * rows + t, b, 1))
