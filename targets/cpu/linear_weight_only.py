"""Linear layers on float inputs, with integer weights that are widened in registers.

A register tile computes `rows` rows of the input x `vectors` vectors of outputs; each lane is one chain of fma along
K, so the order of the sum is the contract's whatever the tile:

    acc[i, j] = fma(x[row i, k], f32(weight[j, k]), acc[i, j])        for every k of a group
    total[i, j] = fma(acc[i, j], scale[j, group], total[i, j])

Weights of up to 4 bits lie eight to a 32-bit lane, k after k, the first in the lowest bits. A row of one input is
bound by the memory that weights come from, so what counts there is how few bytes they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from qcompile.targets.base import InstructionSet
from qcompile.targets.cpu.emit import Registers, llvm, load, splat, store_first
from qcompile.targets.cpu.tasks import split_row
from qcompile.targets.function import Kernel, function
from qcompile.targets.layout import Dim, align

LANES = 16  # of a vector here, on every processor: LLVM cuts it into registers
NIBBLES = 8  # in a lane


@dataclass(frozen=True)
class Packed:
    """Weights as the kernel reads them: (block, step, lane of the block), `per_step` values of k in a step."""

    data: np.ndarray
    per_step: int

    def widen(self, loaded: Any, j: int, lookup: Callable[[Any], Any] | None) -> Any:
        """The weights of the step's j-th k as float32; `lookup`: of the low four bits, where there is a faster way."""
        if self.per_step == 1:
            return T.cast(loaded, f"float32x{LANES}")
        if lookup is not None:
            return lookup(T.shift_right(loaded, splat(T.int32(4 * j), LANES)) if j else loaded)
        up = T.shift_left(loaded, splat(T.int32(28 - 4 * j), LANES))
        return T.cast(T.shift_right(up, splat(T.int32(28), LANES)), f"float32x{LANES}")


def pack(weight: np.ndarray, vectors: int) -> Packed:
    """`weight` (N, K) int8: as bytes, or as nibbles where all values fit."""
    outputs, features = weight.shape
    block = vectors * LANES
    nibbles = bool((np.abs(weight.astype(np.int16)) <= 7).all())
    per_step = NIBBLES if nibbles else 1
    full = np.zeros((align(outputs, block), align(features, per_step)), np.int8)
    full[:outputs, :features] = weight
    ordered = full.reshape(-1, block, full.shape[1] // per_step, per_step).transpose(0, 2, 1, 3)
    if not nibbles:
        return Packed(np.ascontiguousarray(ordered[..., 0]), 1)
    words = (ordered.astype(np.uint32) & 15) << (4 * np.arange(NIBBLES, dtype=np.uint32))
    return Packed(np.bitwise_or.reduce(words, axis=3).view(np.int32), NIBBLES)


def tile_of(rows: Dim, outputs: int, isa: InstructionSet) -> tuple[int, int]:
    """(rows, vectors) of the register tile: of one row as many chains as hide the latency of an fma, of many
    rows those that share a widened weight best."""
    total = align(outputs, LANES) // LANES
    registers = isa.registers * isa.lanes // LANES  # of LANES lanes
    most = 6 if not isinstance(rows, int) else min(6, rows)

    def cost(vectors: int) -> float:
        chains = min(most, (registers - 1) // vectors - 1) * vectors
        return (2 * vectors + max(chains, 8)) / max(chains, 1)

    able = [v for v in range(1, min(8, total) + 1) if total % v == 0 and (registers - 1) // v >= 2]
    vectors = min(able or [1], key=lambda v: (cost(v), -v))
    return max(1, min(most, (registers - 1) // vectors - 1)), vectors


def linear_weight_only(
    x: tuple[Dim, ...],
    weight: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray,
    group_size: int,
    isa: InstructionSet,
    symbols: tuple[tirx.Var, ...] = (),
) -> Kernel:
    """The kernel on a dense float tensor `x` (rows, K); `weight` (N, K) int8, `scale` (N, groups), `bias` (N,)."""
    rows, features = x
    outputs = len(weight)
    count_of_rows, vectors = tile_of(rows, outputs, isa)
    packed = pack(weight, vectors)
    blocks, steps = packed.data.shape[:2]
    block = vectors * LANES
    groups, last = features // group_size, features % group_size  # whole groups, and what is left of one
    padded = np.pad(scale, ((0, blocks * block - outputs), (0, 0))).reshape(blocks, block, -1)
    constants = {
        "weights": packed.data.reshape(-1),
        "scales": np.ascontiguousarray(padded.transpose(0, 2, 1)).reshape(-1),
        "biases": np.pad(bias, (0, blocks * block - outputs)),
    }
    per_step = packed.per_step
    if isa.lookup is not None and per_step > 1:
        constants["table"] = np.asarray([*range(8), *range(-8, 0)], np.float32)
    unrolled = NIBBLES if per_step > 1 else 4
    with function("linear_weight_only") as (args, done):
        source = args.buffer("x", rows * features, "float32")
        weights, scales, biases, *table = args.constants(**constants)
        args.symbols(symbols)
        y = args.buffer("y", rows * outputs, "float32")

        def tile(r: Any, b: Any, count: int) -> None:
            lookup = partial(isa.lookup, load(table[0], 0, LANES)) if isa.lookup is not None and table else None
            acc, total = (Registers(count * vectors, LANES, "float32") for _ in range(2))
            for i in range(count * vectors):
                total[i] = load(biases, b * block + i % vectors * LANES, LANES)

            def steps_from(k: Any, size: int) -> None:
                """`size` products of each chain, from a whole step on."""
                for first in range(0, size, per_step):
                    at = ((b * steps + (k + first) // per_step) * vectors) * LANES
                    loaded = [load(weights, at + v * LANES, LANES) for v in range(vectors)]
                    for j in range(min(per_step, size - first)):
                        wide = [packed.widen(word, j, lookup) for word in loaded]
                        for i in range(count):
                            value = splat(source[(r + i) * features + (k + first + j)], LANES)
                            for v in range(vectors):
                                at_i = i * vectors + v
                                acc[at_i] = llvm("float32", LANES, "llvm.fma", value, wide[v], acc[at_i])

            def group(g: Any, size: int) -> None:
                for i in range(count * vectors):
                    acc[i] = splat(T.float32(0), LANES)
                whole = size // unrolled
                if whole:
                    with T.serial(0, whole) as s:
                        steps_from(g * group_size + s * unrolled, unrolled)
                if size % unrolled:
                    steps_from(g * group_size + whole * unrolled, size % unrolled)
                for i in range(count * vectors):
                    at = (b * scale.shape[1] + g) * block + i % vectors * LANES
                    total[i] = llvm("float32", LANES, "llvm.fma", acc[i], load(scales, at, LANES), total[i])

            if groups:
                with T.serial(0, groups) as g:
                    group(g, group_size)
            if last:
                group(groups, last)
            for i in range(count * vectors):
                channel = b * block + i % vectors * LANES
                store_first(y, (r + i // vectors) * outputs, channel, total[i], LANES, outputs)

        split_row(rows, count_of_rows, blocks, "channels", tile)
    bits = 4 if per_step > 1 else 8
    return Kernel(f"linear_weight_only_int{bits}_{count_of_rows}x{block}", done.result, tuple(constants.values()))
