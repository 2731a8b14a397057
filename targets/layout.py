"""How one int8 activation lies in memory.

Every activation is a flat buffer; a layout says where its elements are. Compute kernels see each
activation as (batch, height, width, channels) with channels innermost:

    channels_last   logical (N, C, H, W) or (N, C, L): channels are logical dimension 1
    rows            logical (..., C): channels are the last dimension; everything else is "width"

`pitch` is the number of channels allocated per pixel; the channels beyond the logical ones are never
read by a result (weights there are zero). `halo` is a margin of zero points around each image, written
by the producer, so that a padded convolution needs no bounds checks. A dense tensor in logical order is
`rows` with the pitch equal to the last dimension. A dimension may be symbolic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

Dim = Any  # an int, or a tvm.tirx expression where the dimension is dynamic

NO_HALO = (0, 0, 0, 0)


def product(dims: tuple[Dim, ...]) -> Dim:
    """The product, with the numbers multiplied first so that symbols stay simple."""
    number = math.prod(d for d in dims if isinstance(d, int))
    result: Dim = number
    for d in dims:
        if not isinstance(d, int):
            result = d * result
    return result


@dataclass(frozen=True)
class Layout:
    """The place of every element of one activation.

    Attributes:
        shape: the logical shape.
        channels_last: channels are logical dimension 1 (else the last one).
        pitch: elements allocated per pixel, at least the number of channels.
        halo: pixels of margin (top, bottom, left, right) around each image.
    """

    shape: tuple[Dim, ...]
    channels_last: bool
    pitch: Dim
    halo: tuple[int, int, int, int] = NO_HALO

    @property
    def channels(self) -> int:
        if not self.shape:
            return 1
        return int(self.shape[1] if self.channels_last else self.shape[-1])

    @property
    def extents(self) -> tuple[Dim, Dim, Dim]:
        """(batch, height, width) as compute kernels see them."""
        if not self.channels_last:
            return 1, 1, product(self.shape[:-1])
        spatial = (1, 1, *self.shape[2:])[-2:]
        return self.shape[0], spatial[0], spatial[1]

    @property
    def padded(self) -> tuple[Dim, Dim]:
        """(height, width) with the halo."""
        _, height, width = self.extents
        top, bottom, left, right = self.halo
        return height + top + bottom, width + left + right

    @property
    def size(self) -> Dim:
        """Elements in the buffer."""
        return product((self.extents[0], *self.padded, self.pitch))

    def offset(self, n: Dim, h: Dim, w: Dim, c: Dim) -> Dim:
        """The flat position of pixel (n, h, w), channel c; h and w may reach into the halo."""
        height, width = self.padded
        return ((n * height + h + self.halo[0]) * width + w + self.halo[2]) * self.pitch + c

    def position(self, index: tuple[Dim, ...]) -> Dim:
        """The flat position of a logical index."""
        if self.channels_last:
            spatial = (0, 0, *index[2:])[-2:]
            return self.offset(index[0], spatial[0], spatial[1], index[1])
        if not index:
            return 0
        row: Dim = 0
        for i, extent in zip(index[:-1], self.shape[:-1], strict=True):
            row = row * extent + i
        return self.offset(0, 0, row, index[-1])

    def flattened(self) -> Layout:
        """The same buffer as one row of pixels; only without a halo."""
        assert self.halo == NO_HALO
        return Layout((product(self.extents), self.channels), False, self.pitch)


def dense(shape: tuple[Dim, ...]) -> Layout:
    """The tensor in its logical row-major order."""
    return Layout(shape, False, shape[-1] if shape else 1)


def joins_taps(columns: int, channels: int, dilation: int, groups: int) -> bool:
    """Whether a convolution can sum a row of taps as one, from pixels that have no bytes between them."""
    return columns > 1 and columns * channels >= 4 and dilation == 1 and groups == 1


def align(channels: int, to: int) -> int:
    return -(-channels // to) * to


def innermost(shape: tuple[Dim, ...], channels_last: bool) -> int:
    """The number of channels of a logical shape."""
    return int(shape[1] if channels_last else shape[-1]) if shape else 1


def relabel(layout: Layout, shape: tuple[Dim, ...]) -> Layout | None:
    """The layout of the same buffer under `shape`, where inserting or dropping extents of one suffices
    and channels stay innermost; else None."""
    if layout.halo != NO_HALO or not shape:
        return None
    plain = tuple(d for d in layout.shape if not (isinstance(d, int) and d == 1))
    after = tuple(d for d in shape if not (isinstance(d, int) and d == 1))
    spatial = layout.shape[2:] if layout.channels_last else ()
    if any(not (isinstance(d, int) and d == 1) for d in spatial) or plain != after:
        return None
    if isinstance(shape[-1], int) and shape[-1] == layout.channels:
        return Layout(shape, False, layout.pitch)
    ones = all(isinstance(d, int) and d == 1 for d in shape[2:])
    if len(shape) in (3, 4) and ones and shape[1] == layout.channels:
        return Layout(shape, True, layout.pitch)
    return None
