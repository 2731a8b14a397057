"""Ways to multiply real numbers that every processor with a fused multiply-add has."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.tirx.script import builder as T

from qcompile.ops.real import FLOAT32
from qcompile.targets.base import InstructionSet, Products
from qcompile.targets.cpu.emit import llvm, splat, vector_type
from qcompile.targets.cpu.real import bfloat16_bits


def _float(word: Any, lanes: int) -> Any:
    return T.reinterpret(vector_type("float32", lanes), word)


FMA = Products(
    name="fma",
    depth=1,
    pack=lambda weight: weight[..., 0],
    accumulate=lambda acc, x, w, lanes: llvm("float32", lanes, "llvm.fma", _float(x, lanes), w, acc),
)


def pairs(weight: np.ndarray) -> np.ndarray:
    """(..., 2) float32 -> (...) int32: two bfloat16, the first one low."""
    bits = bfloat16_bits(weight).astype(np.uint32)
    return (bits[..., 0] | bits[..., 1] << 16).view(np.int32)


def _halves(word: Any, lanes: int) -> tuple[Any, Any]:
    """Two bfloat16 as float32 each: a bfloat16 is the upper half of a float32."""
    low = T.shift_left(word, splat(T.int32(16), lanes))
    high = T.bitwise_and(word, splat(T.int32(-65536), lanes))
    return _float(low, lanes), _float(high, lanes)


def _widening(acc: Any, x: Any, w: Any, lanes: int) -> Any:
    for a, b in zip(_halves(x, lanes), _halves(w, lanes), strict=True):
        acc = llvm("float32", lanes, "llvm.fma", a, b, acc)
    return acc


# Two products a word, by two multiply-adds: no faster than float32, in half of its memory.
BF16_FMA = Products(name="bf16_fma", depth=2, pack=pairs, accumulate=_widening, cycles=4)


def products(numerics: str, isa: InstructionSet) -> Products:
    """The fastest way for factors of `numerics` ("float32" or "bfloat16")."""
    return FMA if numerics == FLOAT32 else isa.bfloat16 or BF16_FMA
