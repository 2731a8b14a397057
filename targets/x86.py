"""x86: instruction-set rows and targets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from tvm.tirx.script import builder as T

from qcompile.targets import amx
from qcompile.targets.base import DotProduct, InstructionSet, MatrixUnit, Narrow, Products, TapDot, Target
from qcompile.targets.cpu.products import pairs


def _llvm(dtype: str, intrinsic: str, *args: Any) -> Any:
    return T.call_llvm_pure_intrin(dtype, T.llvm_lookup_intrinsic_id(intrinsic), *args)


def _flat(weight: np.ndarray) -> np.ndarray:
    """(..., channels, 4) -> (..., 1, channels * 4): the order vpdpbusd takes."""
    return np.ascontiguousarray(weight.reshape(*weight.shape[:-2], 1, -1))


VPDPBUSD = DotProduct(
    name="vpdpbusd",
    cycles=1,
    planes=1,
    weight_dtype="int8",
    pack=_flat,
    prepare=lambda four: (T.reinterpret("uint8x64", T.broadcast(four, 16)),),
    accumulate=lambda acc, x, w: _llvm("int32x16", "llvm.x86.avx512.vpdpbusd.512", acc, x[0], w[0]),
)


# In LLVM IR, because TVM has no type for 32 bfloat16 in a register. It flushes subnormal numbers, and rounds sums to
# nearest even whatever the rounding mode.
VDPBF16PS = Products(
    name="vdpbf16ps",
    depth=2,
    pack=pairs,
    accumulate=lambda acc, x, w, lanes: T.call_pure_extern("float32x16", "qcompile_vdpbf16ps", acc, x, w),
    calls="""
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define internal <16 x float> @qcompile_vdpbf16ps(<16 x float> %acc, <16 x i32> %x, <16 x i32> %w) alwaysinline {
  %a = bitcast <16 x i32> %x to <32 x bfloat>
  %b = bitcast <16 x i32> %w to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %acc, <32 x bfloat> %a, <32 x bfloat> %b)
  ret <16 x float> %r
}
""",
)


def _pairs_fit_int16(weight: np.ndarray) -> bool:
    """No sum of two neighbouring products leaves int16, so vpmaddubsw cannot saturate."""
    pairs = 255 * weight.astype(np.int32).reshape(-1, 2)
    least, most = np.minimum(pairs, 0).sum(1), np.maximum(pairs, 0).sum(1)
    return bool((least >= -(1 << 15)).all() and (most < 1 << 15).all())


def _four_products(acc: Any, unsigned: Any, signed: Any) -> Any:
    pairs = _llvm("int16x16", "llvm.x86.avx2.pmadd.ub.sw", unsigned, signed)
    return acc + _llvm("int32x8", "llvm.x86.avx2.pmadd.wd", pairs, T.broadcast(T.int16(1), 16))


def _repeat(four: Any) -> tuple[Any, ...]:
    return (T.reinterpret("uint8x32", T.broadcast(four, 8)),)


# Three instructions for 32 products, but the pair sums saturate at int16: only for proven weights.
VPMADDUBSW = DotProduct(
    name="vpmaddubsw",
    cycles=1,
    planes=1,
    weight_dtype="int8",
    pack=_flat,
    prepare=_repeat,
    accumulate=lambda acc, x, w: _four_products(acc, x[0], w[0]),
    exact_for=_pairs_fit_int16,
)


def _magnitudes_and_signs(weight: np.ndarray) -> np.ndarray:
    """(..., channels, 4) -> (..., 2, channels * 4) uint8: |w|, and what turns x into x - 128 or, where w < 0, into
    its complement 127 - x."""
    planes = np.stack([np.abs(weight).view(np.uint8), np.where(weight < 0, 0x7F, 0x80).astype(np.uint8)], axis=-3)
    return np.ascontiguousarray(planes.reshape(*planes.shape[:-2], -1))


def _signed_surplus(weight: np.ndarray) -> np.ndarray:
    """|w| (x - 128) is 128 w less than w x, and |w| (127 - x) is 127 w less."""
    return np.asarray(-(np.where(weight < 0, 127, 128) * weight).sum(1))


# Four instructions for 32 products, exact for every weight: a weight's sign moves to the activation, which is then the
# signed factor, and 2 * 127 * 128 fits int16.
VPXOR_VPMADDUBSW = DotProduct(
    name="vpxor_vpmaddubsw",
    cycles=1.2,
    planes=2,
    weight_dtype="uint8",
    pack=_magnitudes_and_signs,
    prepare=_repeat,
    accumulate=lambda acc, x, w: _four_products(acc, w[0], T.bitwise_xor(x[0], w[1])),
    surplus=_signed_surplus,
)


def _interleaved(count: int, lanes: int) -> np.ndarray:
    """Lane i of part q (of four lanes) of vector j -> its byte among `count` vectors packed part by part."""
    vector, part, lane = np.ogrid[:count, : lanes // 4, :4]
    return np.asarray((part * count + vector) * 4 + lane).reshape(-1)


def _narrow(count: int, lanes: int, packssdw: str, packuswb: str) -> Narrow:
    """`count` (2 or 4) vectors through saturating int16 words to uint8."""
    order = _interleaved(count, lanes)
    words = f"int16x{2 * lanes}"

    def pack(vectors: list[Any], zero_point: Any) -> Any:
        pairs = [_llvm(words, packssdw, *vectors[i : i + 2]) for i in range(0, count, 2)]
        if zero_point is not None:
            shift = T.broadcast(T.cast(zero_point, "int16"), 2 * lanes)
            pairs = [_llvm(words, f"llvm.sadd.sat.v{2 * lanes}i16", pair, shift) for pair in pairs]
        if count == 4:
            return T.reinterpret(f"uint8x{4 * lanes}", _llvm(f"int8x{4 * lanes}", packuswb, *pairs))
        lowest, highest = (T.broadcast(T.int16(bound), 2 * lanes) for bound in (0, 255))
        return T.cast(T.min(T.max(pairs[0], lowest), highest), f"uint8x{2 * lanes}")

    def unpack(stored: Any) -> list[Any]:
        each = order.reshape(count, lanes).tolist()
        return [T.cast(T.Shuffle([stored], indices), f"int32x{lanes}") for indices in each]

    return Narrow(count, order, pack, unpack)


def _tap_dot(lanes: int, narrow: Narrow) -> TapDot:
    intrinsic, acc, activations = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", f"int32x{lanes}", f"uint8x{4 * lanes}"

    def accumulate(a: Any, x: Any, w: Any) -> Any:
        return _llvm(acc, intrinsic, a, T.reinterpret(activations, x), w)

    return TapDot("vpdpbusd", lanes, narrow, accumulate)


_NARROW_512 = "llvm.x86.avx512.packssdw.512", "llvm.x86.avx512.packuswb.512"
_NARROW_256 = "llvm.x86.avx2.packssdw", "llvm.x86.avx2.packuswb"
_NARROW_128 = "llvm.x86.sse2.packssdw.128", "llvm.x86.sse2.packuswb.128"

AVX512_VNNI = InstructionSet(
    "uint8",
    lanes=16,
    registers=32,
    dots=(VPDPBUSD,),
    narrows=(_narrow(4, 16, *_NARROW_512), _narrow(2, 16, *_NARROW_512)),
    tap_dots=tuple(
        _tap_dot(lanes, _narrow(4, lanes, *by)) for lanes, by in ((16, _NARROW_512), (8, _NARROW_256), (4, _NARROW_128))
    ),
    lookup=lambda table, index: _llvm("float32x16", "llvm.x86.avx512.permvar.sf.512", table, index),
    issue=(1, 2),  # AMD Zen 4, and Intel's servers
)
AVX512_BF16 = replace(AVX512_VNNI, bfloat16=VDPBF16PS)
AMX = replace(
    AVX512_BF16,
    matrix=MatrixUnit(
        "tdpbusd",
        tiles=amx.TILES,
        rows=amx.ROWS,
        depth=amx.LINE // 4,
        latency=52,
        l2_bytes_a_cycle=40,
        registers=amx.AmxRegisters,
    ),
    issue=(2,),
    l1_bytes=48 << 10,
    l2_bytes=2 << 20,
)
AVX2 = InstructionSet(
    "uint8",
    lanes=8,
    registers=16,
    dots=(VPMADDUBSW, VPXOR_VPMADDUBSW),
    narrows=(_narrow(4, 8, *_NARROW_256), _narrow(2, 8, *_NARROW_256)),
)

_LINKERS = ("gcc", "cc", "clang", "ld.lld", "x86_64-linux-gnu-ld", "ld")

# All that the compiler may choose by itself for these processors, not only what the kernels ask for.
_AVX2 = ("avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "popcnt", "movbe")
_AVX512 = (*_AVX2, "avx512f", "avx512cd", "avx512bw", "avx512vl", "avx512dq", "avx512vnni")

TARGETS = (
    Target(
        name="x86-amx",
        machine="x86_64",
        features=(*_AVX512, "avx512bf16", "amxtile", "amxint8"),
        tvm={
            "kind": "llvm",
            "mtriple": "x86_64-linux-gnu",
            "mcpu": "cooperlake",
            "mattr": ["-prefer-256-bit", "+amx-tile", "+amx-int8"],
        },
        isa=AMX,
        linkers=_LINKERS,
        rank=40,
    ),
    Target(
        name="x86-avx512-vnni",
        machine="x86_64",
        features=_AVX512,
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
        name="x86-avx512-bf16",
        machine="x86_64",
        features=(*_AVX512, "avx512bf16"),
        tvm={
            "kind": "llvm",
            "mtriple": "x86_64-linux-gnu",
            "mcpu": "cooperlake",
            "mattr": ["-prefer-256-bit"],
        },
        isa=AVX512_BF16,
        linkers=_LINKERS,
        rank=20,  # where bfloat16 is not asked for, "native" is the target whose kernels are tuned
    ),
    Target(
        name="x86-avx2",
        machine="x86_64",
        features=_AVX2,
        tvm={"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "haswell"},
        isa=AVX2,
        linkers=_LINKERS,
        rank=10,
    ),
)
