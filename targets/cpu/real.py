"""Real numbers in kernels: bfloat16 as its 16 bits, and clamps that keep NaN.

bfloat16 is the upper half of a float32. It is stored as uint16, because TVM would turn its own type into float32.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm.tirx.script import builder as T

from qcompile.targets.cpu.emit import splat, vector_type, widen
from qcompile.targets.cpu.epilogue import fill_margin
from qcompile.targets.layout import Layout

BF16 = "uint16"  # how bfloat16 is stored


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bfloat16 (ties to even), uint16; infinite where it overflows."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def to_real(value: Any, dtype: str, lanes: int) -> Any:
    """A stored value -> float32."""
    if dtype != BF16:
        return value
    wide = T.shift_left(widen(value, "uint32", lanes), splat(T.uint32(16), lanes))
    return T.reinterpret(vector_type("float32", lanes), wide)


def narrow(value: Any, dtype: str, lanes: int) -> Any:
    """float32 -> as it is stored: to nearest, ties to even; NaN stays NaN."""
    if dtype != BF16:
        return value

    def word(number: int) -> Any:
        return splat(T.uint32(number), lanes)

    bits = T.reinterpret(vector_type("uint32", lanes), value)
    odd = T.bitwise_and(T.shift_right(bits, word(16)), word(1))
    nearest = bits + word(0x7FFF) + odd
    is_nan = T.bitwise_and(bits, word(0x7FFFFFFF)) > word(0x7F800000)
    upper = T.Select(is_nan, T.bitwise_or(bits, word(0x400000)), nearest)
    return widen(T.shift_right(upper, word(16)), BF16, lanes)


def real(value: Any, lo: float, hi: float, lanes: int) -> Any:
    """The clamp; the bound stands first in each comparison, so that NaN stays NaN."""
    if lo > -math.inf:
        value = T.max(splat(T.float32(lo), lanes), value)
    return T.min(splat(T.float32(hi), lanes), value) if hi < math.inf else value


def clear_halo(y: Any, layout: Layout, dtype: str) -> None:
    """Write zeros into the halo of every image."""
    fill_margin(y, layout, T.cast(T.int32(0), dtype))
