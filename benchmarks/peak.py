"""The machine's own limit: how many int8 multiply-accumulates its dot product can do in a second.

A kernel that only repeats the target's dot product, on as many independent accumulators as the
processor has registers to spare, on every thread at once. The weights stay in the first-level cache;
the activation changes in every turn, so that the compiler cannot move a part of the dot product out
of the loop.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import numpy as np

REPEAT = 50_000


@functools.cache
def dot_product_peak(threads: int) -> float:
    """Multiply-accumulates per second on `threads` threads, measured in a process of its own.

    The best of several runs: a limit is not a median.
    """
    environment = {**os.environ, "TVM_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "benchmarks.peak", str(threads)]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def _measure(threads: int) -> float:
    import tvm
    from tvm.tirx.script import builder as T

    from qcompile import targets
    from qcompile.targets.cpu import emit

    target = targets.get("native")
    isa, dot = target.isa, target.isa.dots[0]
    accumulators = isa.registers - 8  # the rest: operands, and what the dot product needs
    lanes, plane = isa.lanes, isa.lanes * 4 // dot.planes
    with emit.function("peak") as (arguments, done):
        weights = arguments.buffer("weights", accumulators * dot.planes * plane, dot.weight_dtype)
        out = arguments.buffer("out", threads * lanes, "int32")
        with T.parallel(0, threads) as task:
            acc = emit.registers(accumulators, lanes, "int32")
            for i in range(accumulators):
                emit.store(acc, i * lanes, emit.splat(T.int32(i), lanes), lanes)
            with T.serial(0, REPEAT) as turn:
                operands = dot.prepare(T.cast(turn, "int32") * T.int32(0x01010101))
                for i in range(accumulators):
                    vectors = [emit.load(weights, (i * dot.planes + p) * plane, plane) for p in range(dot.planes)]
                    value = dot.accumulate(emit.load(acc, i * lanes, lanes), operands, vectors)
                    emit.store(acc, i * lanes, value, lanes)
            total = emit.load(acc, 0, lanes)
            for i in range(1, accumulators):
                total = total + emit.load(acc, i * lanes, lanes)
            emit.store(out, task * lanes, total, lanes)
    library = tvm.compile(tvm.IRModule({"peak": done.result}), tvm.target.Target(target.tvm)).mod
    rng = np.random.default_rng(0)
    buffers = [
        tvm.runtime.tensor(rng.integers(-100, 100, accumulators * dot.planes * plane).astype(dot.weight_dtype)),
        tvm.runtime.tensor(np.zeros(threads * lanes, "int32")),
    ]
    times = library.time_evaluator("peak", tvm.cpu(), number=1, repeat=200)(*buffers).results
    return threads * REPEAT * accumulators * lanes * 4 / min(times)


if __name__ == "__main__":
    print(_measure(int(sys.argv[1])))
