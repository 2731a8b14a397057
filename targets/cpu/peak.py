"""The machine's own limit: how many int8 multiply-accumulates it can do in a second.

A kernel that only repeats the target's dot product on registers, with as many independent
accumulators as the processor has registers to spare, on every thread at once; or the products of its matrix unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tvm
from tvm import tirx
from tvm.tirx.script import builder as T

from qcompile.targets.base import InstructionSet, MatrixUnit, Target
from qcompile.targets.cpu import emit
from qcompile.targets.function import function

REPEAT = 50_000
# Of a dot product made of several instructions, LLVM would move some out of such a loop.
SINGLE_INSTRUCTION = ("vpdpbusd", "sdot")


@dataclass(frozen=True)
class PeakKernel:
    """The function, what it is called with, and its multiply-accumulates a call."""

    func: tirx.PrimFunc
    arguments: list[np.ndarray]
    macs: int


def peak_instruction(isa: InstructionSet) -> str | None:
    """The one that multiplies the most in a cycle, as kernels name it; None where there is no int8 dot product."""
    if isa.matrix is not None:
        return isa.matrix.name
    return isa.dots[0].name if isa.dots[0].name in SINGLE_INSTRUCTION else None


def peak_kernel(target: Target, threads: int) -> PeakKernel | None:
    """The kernel for `target` on `threads` threads; None where it has no int8 dot product instruction."""
    isa = target.isa
    if peak_instruction(isa) is None:
        return None
    return _dots(isa, threads) if isa.matrix is None else _matrices(isa, isa.matrix, threads)


def _dots(isa: InstructionSet, threads: int) -> PeakKernel:
    dot, accumulators, lanes = isa.dots[0], isa.registers - 8, isa.lanes
    with function("peak") as (arguments, done):
        x = arguments.buffer("x", 1, "int32")
        weights = arguments.buffer("weights", lanes * 4, dot.weight_dtype)
        out = arguments.buffer("out", threads * lanes, "int32")
        with T.parallel(0, threads) as task:
            acc = emit.Registers(accumulators, lanes, "int32")
            for i in range(accumulators):
                acc[i] = emit.splat(T.int32(i), lanes)
            with T.serial(0, REPEAT) as _:
                operands, vectors = dot.prepare(x[0]), [emit.load(weights, 0, lanes * 4)]
                for i in range(accumulators):
                    acc[i] = dot.accumulate(acc[i], operands, vectors)
            total = acc[0]
            for i in range(1, accumulators):
                total = total + acc[i]
            emit.store(out, task * lanes, total, lanes)
    rng = np.random.default_rng(0)
    buffers = [
        rng.integers(0, 1 << 30, 1).astype("int32"),
        rng.integers(-100, 100, lanes * 4).astype(dot.weight_dtype),
        np.zeros(threads * lanes, "int32"),
    ]
    return PeakKernel(done.result, buffers, threads * REPEAT * accumulators * lanes * 4)


def _matrices(isa: InstructionSet, unit: MatrixUnit, threads: int) -> PeakKernel:
    tall = wide = 2  # as many as keep the unit busy
    registers, lanes = unit.registers(tall, wide, unit.rows, unit.depth), isa.lanes
    pixel, line = 4 * unit.depth, 4 * lanes  # bytes of a row of pixels, of a row of weights
    with function("peak") as (arguments, done):
        x = arguments.buffer("x", unit.rows * pixel, isa.storage)
        weights = arguments.buffer("weights", unit.depth * line, "int8")
        out = arguments.buffer("out", threads * lanes, "int32")
        with T.parallel(0, threads) as task:
            with T.attr(0, "pragma_import_llvm", registers.code):
                registers.begin()
            for i in range(tall):
                registers.load_pixels(i, T.address_of(x[0]), pixel)
            for j in range(wide):
                registers.load_weights(j, T.address_of(weights[0]), line)
            with T.serial(0, REPEAT) as _:
                for i, j in np.ndindex(tall, wide):
                    registers.multiply(i, j)
            memory = registers.memory(1)
            registers.store_sum(0, 0, memory, 0)
            emit.store(out, task * lanes, registers.sums(memory, 0, 0), lanes)
            registers.end()
    rng = np.random.default_rng(0)
    buffers = [
        rng.integers(0, 256, unit.rows * pixel).astype(isa.storage),
        rng.integers(-100, 100, unit.depth * line).astype("int8"),
        np.zeros(threads * lanes, "int32"),
    ]
    return PeakKernel(done.result, buffers, threads * REPEAT * tall * wide * unit.rows * lanes * 4 * unit.depth)


def peak_rate(target: Target, threads: int, repeat: int = 300) -> float | None:
    """Multiply-accumulates a second of this machine, in this process; the best of `repeat` runs of a
    millisecond each, since a limit is not a median. None as for `peak_kernel`."""
    made = peak_kernel(target, threads)
    if made is None:
        return None
    module = tvm.IRModule({"peak": made.func.with_attr("global_symbol", "peak")})
    library = tvm.compile(module, tvm.target.Target(target.tvm)).mod
    buffers = [tvm.runtime.tensor(a) for a in made.arguments]
    times = library.time_evaluator("peak", tvm.cpu(), number=1, repeat=repeat)(*buffers).results
    return made.macs / min(times)
