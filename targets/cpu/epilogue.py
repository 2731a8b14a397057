"""From an accumulator to a stored activation: the contract of qcompile.arith, as TIR.

Float multiply-add is never left to the compiler: where the contract says fma it is `llvm.fma`, and
nowhere else does a product meet a sum. `llvm.lrint` rounds half to even in the default rounding mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.tirx.script import builder as T

from qcompile.targets.base import InstructionSet, Narrow
from qcompile.targets.cpu.emit import fill, llvm, load, splat, store, widen
from qcompile.targets.layout import NO_HALO, Layout

# Per-layer numbers are data, not code, so that layers of one shape share one kernel. They head the
# constant buffers; the per-channel values follow at this offset, aligned for vectors.
HEAD = 16


@dataclass(frozen=True)
class Requantize:
    """The numbers of one requantize, in the units of the integer graph."""

    zero_point: int
    lo: int = -128
    hi: int = 127
    other_m: float = 0.0
    other_zero_point: int = 0

    def integers(self, isa: InstructionSet, per_channel: np.ndarray | None = None) -> np.ndarray:
        """int32: [zero point, residual zero point, ., ., lo, hi] as stored, then the per-channel values."""
        head = np.zeros(HEAD, np.int32)
        head[:2] = self.zero_point + isa.offset, self.other_zero_point + isa.offset
        head[4:6] = self.lo + isa.offset, self.hi + isa.offset
        return head if per_channel is None else np.concatenate([head, per_channel.astype(np.int32)])

    def floats(self, per_channel: np.ndarray | None = None) -> np.ndarray:
        """float32: [lo, hi, residual multiplier], the clamp relative to the zero point."""
        head = np.zeros(HEAD, np.float32)
        head[:3] = self.lo - self.zero_point, self.hi - self.zero_point, np.float32(self.other_m)
        return head if per_channel is None else np.concatenate([head, per_channel.astype(np.float32)])

    def steps(self, largest: np.ndarray, m: np.ndarray, isa: InstructionSet) -> Steps:
        """What storing takes, where no accumulator of a channel is larger than `largest`."""
        reach = largest.astype(np.float64) * m.astype(np.float64) + 255 * abs(self.other_m)
        return Steps(
            bounded=bool((reach < 2.0**30).all()),
            shifts=self.zero_point + isa.offset != 0,
            clamps=(self.lo, self.hi) != (-128, 127),
        )


@dataclass(frozen=True)
class Steps:
    """The steps of `requantize_many` that these numbers need; leaving out the others changes no bit.

    Attributes:
        bounded: no value comes near the end of int32, so none need be clamped before it is converted.
        shifts: the stored zero point is not 0.
        clamps: the bounds are tighter than the stored type's, to which packing saturates anyway.
    """

    bounded: bool
    shifts: bool
    clamps: bool


def to_float(acc: Any, lanes: int) -> Any:
    return widen(acc, "float32", lanes)


def finish(real: Any, integers: Any, floats: Any, isa: InstructionSet, lanes: int) -> Any:
    """clamp, round half to even, add the zero point: float32 -> the stored type."""
    rounded = llvm("int32", lanes, "llvm.lrint", _clamp(real, floats, lanes))
    return widen(rounded + splat(integers[0], lanes), isa.storage, lanes)


def finish_many(
    reals: list[Any], integers: Any, floats: Any, isa: InstructionSet, lanes: int, narrow: Narrow, steps: Steps
) -> Any:
    """As `finish`, for several vectors at once, in the order of `narrow`.

    Bounds that are integers may be applied after the rounding: rne(clamp(r)) = clamp(rne(r)). So the
    clamp is done on packed bytes, unless a value might not fit int32.
    """
    if not steps.bounded:
        reals = [_clamp(real, floats, lanes) for real in reals]
    rounded = [llvm("int32", lanes, "llvm.lrint", real) for real in reals]
    packed = narrow.pack(rounded, integers[0] if steps.shifts else None)
    if not steps.clamps:
        return packed
    lo, hi = (splat(T.cast(integers[i], isa.storage), narrow.count * lanes) for i in (4, 5))
    return T.min(T.max(packed, lo), hi)


def _clamp(real: Any, floats: Any, lanes: int) -> Any:
    return T.min(T.max(real, splat(floats[0], lanes)), splat(floats[1], lanes))


def centre(stored: Any, zero_point: Any, lanes: int) -> Any:
    """A stored activation -> float32(q - zero_point)."""
    return to_float(widen(stored, "int32", lanes) - splat(zero_point, lanes), lanes)


def requantize(
    acc: Any, m: Any, integers: Any, floats: Any, isa: InstructionSet, lanes: int, residual: Any = None
) -> Any:
    """int32 accumulator (and perhaps a stored residual) -> the stored type. `m`: float32 vector."""
    wide = None if residual is None else widen(residual, "int32", lanes)
    return finish(_scaled(acc, m, integers, floats, lanes, wide), integers, floats, isa, lanes)


def requantize_many(
    accs: list[Any],
    ms: list[Any],
    integers: Any,
    floats: Any,
    isa: InstructionSet,
    lanes: int,
    narrow: Narrow,
    steps: Steps,
    residual: Any = None,
) -> Any:
    """As `requantize`, for several vectors at once, in the order of `narrow`; `residual`: their bytes."""
    others = [None] * len(accs) if residual is None else narrow.unpack(residual)
    reals = [_scaled(acc, m, integers, floats, lanes, other) for acc, m, other in zip(accs, ms, others, strict=True)]
    return finish_many(reals, integers, floats, isa, lanes, narrow, steps)


def _scaled(acc: Any, m: Any, integers: Any, floats: Any, lanes: int, residual: Any) -> Any:
    """f32(acc) * m, plus a residual (int32) by one fma."""
    real = to_float(acc, lanes) * m
    if residual is None:
        return real
    other = to_float(residual - splat(integers[1], lanes), lanes)
    return llvm("float32", lanes, "llvm.fma", other, splat(floats[2], lanes), real)


@dataclass(frozen=True)
class Finish:
    """The end of a convolution's kernel: a pixel's sums to the stored bytes of a block of output channels.

    Attributes:
        y, residual: buffers, the latter None where there is none.
        layout, residual_layout: theirs.
        integers, floats: the constants of `Requantize`.
        vectors: of output channels in a block.
        steps: that storing takes.
    """

    y: Any
    residual: Any
    layout: Layout
    residual_layout: Layout | None
    integers: Any
    floats: Any
    isa: InstructionSet
    vectors: int
    steps: Steps

    def store(self, pixel: tuple[Any, Any, Any], b: Any, sums: list[Any]) -> None:
        """Store `pixel` (image, row, column) of block `b`, whose sums are `sums`, a vector each."""
        isa, lanes, first = self.isa, self.isa.lanes, b * self.vectors * self.isa.lanes
        j = 0
        for narrow in isa.narrows_for(self.vectors):
            taken = range(j, j := j + (narrow.count if narrow else 1))
            channel, size = first + taken[0] * lanes, len(taken) * lanes
            ms = [channel_load(self.floats, first + v * lanes, lanes) for v in taken]
            accs = [sums[v] for v in taken]
            other = None
            if self.residual_layout is not None:
                other = load(self.residual, self.residual_layout.offset(*pixel, channel), size)
            if narrow is None:
                value = requantize(accs[0], ms[0], self.integers, self.floats, isa, lanes, other)
            else:
                value = requantize_many(accs, ms, self.integers, self.floats, isa, lanes, narrow, self.steps, other)
            store(self.y, self.layout.offset(*pixel, channel), value, size)


def fill_halo(y: Any, layout: Layout, integers: Any, isa: InstructionSet) -> None:
    """Write the zero point into the halo of every image."""
    if layout.halo != NO_HALO:
        fill_margin(y, layout, T.cast(integers[0], isa.storage))


def fill_margin(y: Any, layout: Layout, value: Any) -> None:
    """Write `value` into the halo, if there is one, of every image."""
    if layout.halo == NO_HALO:
        return
    top, bottom, left, right = layout.halo
    batch, height, width = layout.extents
    pitch = layout.pitch
    row = (left + width + right) * pitch
    with T.serial(0, batch) as n:
        # The margin right of one row and left of the next are neighbours in memory.
        fill(y, layout.offset(n, -top, -left, 0), top * row + left * pitch, value)
        if left + right and not (isinstance(height, int) and height <= 1):
            with T.serial(0, height - 1) as h:
                fill(y, layout.offset(n, h, width, 0), (right + left) * pitch, value)
        fill(y, layout.offset(n, height - 1, width, 0), right * pitch + bottom * row, value)


def channel_load(buffer: Any, channel: Any, lanes: int) -> Any:
    """A vector of per-channel constants from channel `channel` on."""
    return load(buffer, channel + HEAD, lanes)
