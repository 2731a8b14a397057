"""One engine in a process of its own, measuring a block of calls whenever its parent asks.

    main(ENGINE, MODEL_FILE, THREADS, INPUT.npy)

Between blocks the process sleeps, so its thread pool does not disturb the engine whose turn it is.
A line "SECONDS" on standard input asks for a block; the answer is a line of JSON: the median seconds
a call, and whether other load disturbed the block.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.child import answer
from benchmarks.engines import ENGINES

TICK = 1 / os.sysconf("SC_CLK_TCK")
CORES = os.cpu_count() or 1
MAX_WAITING = 0.03  # of the block, our threads ready to run while somebody else ran
MAX_TAKEN = 0.1  # cores that somebody else used beyond those we leave free


@dataclass(frozen=True)
class Block:
    """What one block of calls showed."""

    seconds: float  # median of a call
    calls: int
    disturbed: bool


def _busy() -> float:
    """Seconds that all cores have been busy, as the kernel counts them."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) * TICK


def _own() -> float:
    times = os.times()
    return times.user + times.system


def _waiting() -> float:
    """Seconds that our threads have been ready to run without a core."""
    schedules = [Path(task, "schedstat").read_text().split() for task in Path("/proc/self/task").iterdir()]
    return sum(int(fields[1]) for fields in schedules) * 1e-9


def measure(call: Callable[[], object], seconds: float, threads: int) -> Block:
    """Call for about `seconds`; disturbed when somebody else made us wait for a core, or used ours.

    An engine with more threads than cores waits for itself, which is no disturbance.
    """
    busy, own, waiting, start = _busy(), _own(), _waiting(), time.perf_counter()
    taken: list[float] = []
    while time.perf_counter() - start < seconds or len(taken) < 3:
        before = time.perf_counter()
        call()
        taken.append(time.perf_counter() - before)
    wall = time.perf_counter() - start
    waited = (_waiting() - waiting) / wall
    # The kernel counts in ticks: two of them are below what a block can tell.
    others = max(0.0, (_busy() - busy) - (_own() - own) - 2 * TICK) / wall
    free = max(0, CORES - threads)
    disturbed = others - free > MAX_TAKEN or (free > 0 and min(waited, others) > MAX_WAITING)
    return Block(statistics.median(taken), len(taken), disturbed)


def main(engine: str, model_path: str, threads: str, input_path: str) -> None:
    x = ENGINES[engine].arrange(np.load(input_path))
    run = ENGINES[engine].load(Path(model_path), int(threads))
    for _ in range(5):
        run(x)
    print("ready", flush=True)
    for line in sys.stdin:
        answer(asdict(measure(lambda: run(x), float(line), int(threads))))
