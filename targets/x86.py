"""x86: instruction-set rows and targets."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.tirx.script import builder as T

from qcompile.targets.base import DotProduct, InstructionSet, Target


def _llvm(dtype: str, intrinsic: str, *args: Any) -> Any:
    return T.call_llvm_pure_intrin(dtype, T.llvm_lookup_intrinsic_id(intrinsic), *args)


def _flat(weight: np.ndarray) -> np.ndarray:
    """(..., channels, 4) -> (..., 1, channels * 4): the order vpdpbusd takes."""
    return np.ascontiguousarray(weight.reshape(*weight.shape[:-2], 1, -1))


VPDPBUSD = DotProduct(
    name="vpdpbusd",
    planes=1,
    weight_dtype="int8",
    pack=_flat,
    prepare=lambda four: (T.reinterpret("uint8x64", T.broadcast(four, 16)),),
    accumulate=lambda acc, x, w: _llvm("int32x16", "llvm.x86.avx512.vpdpbusd.512", acc, x[0], w[0]),
)


def _pairs_fit_int16(weight: np.ndarray) -> bool:
    """Every 255 * (|w0| + |w1|) of neighbouring products fits int16, so vpmaddubsw cannot saturate."""
    pairs = np.abs(weight.astype(np.int32)).reshape(-1, 2).sum(1)
    return bool((pairs * 255 <= np.iinfo(np.int16).max).all())


def _maddubs(acc: Any, x: tuple[Any, ...], w: list[Any]) -> Any:
    pairs = _llvm("int16x16", "llvm.x86.avx2.pmadd.ub.sw", x[0], w[0])
    return acc + _llvm("int32x8", "llvm.x86.avx2.pmadd.wd", pairs, T.broadcast(T.int16(1), 16))


# Three instructions for 32 products, but the pair sums saturate at int16: only for proven weights.
VPMADDUBSW = DotProduct(
    name="vpmaddubsw",
    planes=1,
    weight_dtype="int8",
    pack=_flat,
    prepare=lambda four: (T.reinterpret("uint8x32", T.broadcast(four, 8)),),
    accumulate=_maddubs,
    exact_for=_pairs_fit_int16,
)


def _even_odd(weight: np.ndarray) -> np.ndarray:
    """(..., channels, 4) -> (..., 2, channels * 2) int16: products 0 and 2, then products 1 and 3."""
    planes = np.stack([weight[..., 0::2], weight[..., 1::2]], axis=-3).astype(np.int16)
    return np.ascontiguousarray(planes.reshape(*planes.shape[:-2], -1))


def _split_bytes(four: Any) -> tuple[Any, ...]:
    """Bytes 0 and 2, and bytes 1 and 3, of every int32 as pairs of uint16."""
    all_four = T.broadcast(four, 8)
    mask = T.broadcast(T.int32(0x00FF00FF), 8)
    even = T.bitwise_and(all_four, mask)
    odd = T.bitwise_and(T.shift_right(all_four, T.broadcast(T.int32(8), 8)), mask)
    return T.reinterpret("int16x16", even), T.reinterpret("int16x16", odd)


def _maddwd(acc: Any, x: tuple[Any, ...], w: list[Any]) -> Any:
    for four, weights in zip(x, w, strict=True):
        acc = acc + _llvm("int32x8", "llvm.x86.avx2.pmadd.wd", four, weights)
    return acc


# Four instructions for 32 products, exact for every weight: 16-bit operands, 32-bit sums.
VPMADDWD = DotProduct(
    name="vpmaddwd",
    planes=2,
    weight_dtype="int16",
    pack=_even_odd,
    prepare=_split_bytes,
    accumulate=_maddwd,
)

AVX512_VNNI = InstructionSet("uint8", lanes=16, registers=32, dots=(VPDPBUSD,))
AVX2 = InstructionSet("uint8", lanes=8, registers=16, dots=(VPMADDUBSW, VPMADDWD))

_LINKERS = ("gcc", "cc", "clang", "ld.lld", "x86_64-linux-gnu-ld", "ld")

TARGETS = (
    Target(
        name="x86-avx512-vnni",
        machine="x86_64",
        features=("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni"),
        tvm={
            "kind": "llvm",
            "mtriple": "x86_64-linux-gnu",
            "mcpu": "cascadelake",
            "mattr": ["-prefer-256-bit"],
        },
        isa=AVX512_VNNI,
        linkers=_LINKERS,
        rank=30,
    ),
    Target(
        name="x86-avx2",
        machine="x86_64",
        features=("avx2", "fma"),
        tvm={"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "haswell"},
        isa=AVX2,
        linkers=_LINKERS,
        rank=10,
    ),
)
