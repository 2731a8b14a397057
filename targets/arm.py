"""64-bit ARM: instruction-set rows and targets."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.tirx.script import builder as T

from qcompile.targets.base import DotProduct, InstructionSet, Narrow, TapDot, Target


def _llvm(dtype: str, intrinsic: str, *args: Any) -> Any:
    return T.call_llvm_pure_intrin(dtype, T.llvm_lookup_intrinsic_id(intrinsic), *args)


def _flat(weight: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(weight.reshape(*weight.shape[:-2], 1, -1))


_SDOT = "llvm.aarch64.neon.sdot.v4i32.v16i8"
SDOT = DotProduct(
    name="sdot",
    cycles=1,
    planes=1,
    weight_dtype="int8",
    pack=_flat,
    prepare=lambda four: (T.reinterpret("int8x16", T.broadcast(four, 4)),),
    accumulate=lambda acc, x, w: _llvm("int32x4", _SDOT, acc, x[0], w[0]),
)


def _halves(weight: np.ndarray) -> np.ndarray:
    """(..., channels, 4) -> (..., 2, channels * 2): products 0 and 1, then products 2 and 3."""
    planes = np.stack([weight[..., :2], weight[..., 2:]], axis=-3)
    return np.ascontiguousarray(planes.reshape(*planes.shape[:-2], -1))


def _two_pairs(four: Any) -> tuple[Any, ...]:
    """Activations 0 and 1, and activations 2 and 3, repeated over the channels."""
    low = T.cast(four, "int16")
    high = T.cast(T.shift_right(four, T.int32(16)), "int16")
    return tuple(T.reinterpret("int8x8", T.broadcast(pair, 4)) for pair in (low, high))


def _smull(acc: Any, x: tuple[Any, ...], w: list[Any]) -> Any:
    # |activation| <= 128 and |weight| <= 127: the sum of two products, at most 32512, fits int16.
    products = [_llvm("int16x8", "llvm.aarch64.neon.smull.v8i16", a, b) for a, b in zip(x, w, strict=True)]
    return acc + _llvm("int32x4", "llvm.aarch64.neon.saddlp.v4i32.v8i16", products[0] + products[1])


SMULL = DotProduct(
    name="smull",
    cycles=4,
    planes=2,
    weight_dtype="int8",
    pack=_halves,
    prepare=_two_pairs,
    accumulate=_smull,
)


def _joined(halves: list[Any], lanes: int) -> Any:
    return T.Shuffle(halves, list(range(lanes)))


def _pack(vectors: list[Any], zero_point: Any) -> Any:
    words = [_llvm("int16x4", "llvm.aarch64.neon.sqxtn.v4i16", vector) for vector in vectors]
    pairs = [_joined(words[i : i + 2], 8) for i in (0, 2)]
    if zero_point is not None:
        shift = T.broadcast(T.cast(zero_point, "int16"), 8)
        pairs = [_llvm("int16x8", "llvm.sadd.sat.v8i16", pair, shift) for pair in pairs]
    return _joined([_llvm("int8x8", "llvm.aarch64.neon.sqxtn.v8i8", pair) for pair in pairs], 16)


def _unpack(stored: Any) -> list[Any]:
    return [T.cast(T.Shuffle([stored], list(range(i, i + 4))), "int32x4") for i in range(0, 16, 4)]


SQXTN = Narrow(count=4, order=np.arange(16), pack=_pack, unpack=_unpack)

TAP_SDOT = TapDot("sdot", 4, SQXTN, lambda acc, x, w: _llvm("int32x4", _SDOT, acc, x, w))

NEON_DOTPROD = InstructionSet("int8", lanes=4, registers=32, dots=(SDOT,), narrows=(SQXTN,), tap_dots=(TAP_SDOT,))
NEON = InstructionSet("int8", lanes=4, registers=32, dots=(SMULL,), narrows=(SQXTN,))

_LINKERS = ("aarch64-linux-gnu-gcc", "aarch64-linux-gnu-ld", "ld.lld")

TARGETS = (
    Target(
        name="arm64-dotprod",
        machine="aarch64",
        features=("asimd", "asimddp"),
        tvm={"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+v8.2a", "+neon", "+dotprod"]},
        isa=NEON_DOTPROD,
        linkers=_LINKERS,
        rank=30,
    ),
    Target(
        name="arm64-neon",
        machine="aarch64",
        features=("asimd",),
        tvm={"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+v8a", "+neon"]},
        isa=NEON,
        linkers=_LINKERS,
        rank=10,
    ),
)
