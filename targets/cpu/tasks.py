"""How threads share the register tiles of a kernel, and in which order each goes over its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from tvm.sym import Analyzer
from tvm.tirx.script import builder as T

from qcompile.targets.cpu.emit import on_each_thread, parallel
from qcompile.targets.layout import Dim

Order = Literal["channels", "strips", "pixels"]
"""What a thread takes of all pixels x blocks of output channels:

    channels    some blocks, and walks over the image for one after the other: it reads each weight once
    strips      a strip of the image, and walks over that for every block: it reads the weights once too
    pixels      a strip of the image, and walks over the blocks for every tile: it reads the strip once

What the next kernel reads of a strip lies in the cache of the thread that wrote it.
"""

THREADS = 2  # as many as share a network at least
CROSSING = 4  # how much longer a byte takes that another thread has written than one that nobody writes


def best_order(weights: int, activations: int, tiles: int, blocks: int, l2_bytes: int) -> Order:
    """The order in which a thread reads the fewest bytes from beyond its own caches.

    Args:
        weights, activations: bytes.
        tiles: of pixels.
        blocks: of output channels.
    """
    again = l2_bytes // 2  # what is larger is read anew each time
    strip = activations / THREADS
    passes = blocks if activations > again else 1
    read: dict[Order, float] = {
        "channels": weights / THREADS + CROSSING * strip * passes,
        "strips": weights + strip * passes,
        "pixels": weights * (tiles / THREADS if weights > again else 1) + strip,
    }
    if tiles < 2 * THREADS:
        del read["strips"]  # the threads would wait for each other
    return min(read, key=read.__getitem__)


def split(
    lines: Dim,
    blocks: int,
    order: Order,
    body: Callable[[Any, Any], None],
    each_thread: AbstractContextManager[Any] | None = None,
) -> None:
    """Emit `body` (line, block) for all lines x blocks of output channels, shared among threads; `each_thread` around
    what one of them does."""
    if Analyzer().can_prove_equal(lines, 0):  # TVM refuses to divide by what it can prove to be zero
        return
    around = each_thread or nullcontext()
    if order == "strips":
        with on_each_thread(lines), around, T.serial(0, blocks) as block, parallel(lines) as line:
            body(line, block)
        return
    with on_each_thread(lines * blocks), around, parallel(lines * blocks) as task:
        if order == "channels":
            body(T.floormod(task, lines), T.floordiv(task, lines))
        else:
            body(T.floordiv(task, blocks), T.floormod(task, blocks))


def split_row(width: Dim, rows: int, blocks: int, order: Order, tile: Callable[[Any, Any, int], None]) -> None:
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

        split(full + 1, blocks, order, part)
    else:
        split(full, blocks, order, lambda t, b: tile(t * rows, b, rows))
    if rest is None:
        split(width - full * rows, blocks, "channels", lambda t, b: tile(full * rows + t, b, 1))
