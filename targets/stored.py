"""Activations as kernels hold them: in and out of a layout, with random bytes wherever no value belongs."""

from __future__ import annotations

import numpy as np

from qcompile.targets.base import InstructionSet
from qcompile.targets.layout import Layout


def stored(x: np.ndarray, layout: Layout, fill: int, isa: InstructionSet, rng: np.random.Generator) -> np.ndarray:
    """`x` (int8) as `layout` says, flat: `fill` in the halo, random bytes in the channels that are not its own."""
    buffer = rng.integers(0, 256, layout.size, dtype=np.uint8).view(isa.storage)
    pixels = _pixels(buffer, layout)
    pixels[...] = np.array(fill + isa.offset).astype(isa.storage)
    _inside(pixels, layout)[...] = (_nhwc(x, layout).astype(np.int16) + isa.offset).astype(isa.storage)
    return buffer


def wrong(buffer: np.ndarray, layout: Layout, want: np.ndarray, fill: int, isa: InstructionSet) -> int:
    """How many elements of a stored activation differ from `want` (int8), those of the halo from `fill`."""
    pixels = _pixels(buffer, layout).astype(np.int16) - isa.offset
    expected = np.full_like(pixels, fill)
    _inside(expected, layout)[...] = _nhwc(want, layout)
    return int(np.count_nonzero(pixels != expected))


def _pixels(buffer: np.ndarray, layout: Layout) -> np.ndarray:
    """(n, padded height, padded width, channels): the halo included, unused channels not."""
    return buffer.reshape(layout.extents[0], *layout.padded, layout.pitch)[..., : layout.channels]


def _inside(pixels: np.ndarray, layout: Layout) -> np.ndarray:
    """(n, height, width, channels): without the halo."""
    _, height, width = layout.extents
    top, _, left, _ = layout.halo
    return pixels[:, top : top + height, left : left + width]


def _nhwc(x: np.ndarray, layout: Layout) -> np.ndarray:
    if layout.channels_last:
        x = np.moveaxis(x, 1, -1)
    return x.reshape(*layout.extents, layout.channels)
