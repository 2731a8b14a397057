"""The machine's own limit: how many int8 multiply-accumulates its dot product can do in a second.

A kernel that only repeats the target's dot product on registers, with as many independent
accumulators as the processor has registers to spare, on every thread at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tvm
from tvm import tirx
from tvm.tirx.script import builder as T

from qcompile.targets.base import Target
from qcompile.targets.cpu import emit

REPEAT = 50_000
# Of a dot product made of several instructions, LLVM would move some out of such a loop.
SINGLE_INSTRUCTION = ("vpdpbusd", "sdot")


@dataclass(frozen=True)
class PeakKernel:
    """The function, what it is called with, and its multiply-accumulates a call."""

    func: tirx.PrimFunc
    arguments: list[np.ndarray]
    macs: int


def peak_kernel(target: Target, threads: int) -> PeakKernel | None:
    """The kernel for `target` on `threads` threads; None where it has no int8 dot product instruction."""
    isa, dot = target.isa, target.isa.dots[0]
    if dot.name not in SINGLE_INSTRUCTION:
        return None
    accumulators, lanes = isa.registers - 8, isa.lanes
    with emit.function("peak") as (arguments, done):
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
