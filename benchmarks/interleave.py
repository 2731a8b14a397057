"""Engines measured in turns: block A, block B, block C, block A, ... in one run.

The speed of a machine drifts by tens of percent within minutes, so figures taken one after the other
do not compare. Here every round gives each engine one block, and what is reported is the median over
the rounds of the ratio within a round.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.worker import Block


@dataclass
class Measurement:
    """The blocks of one engine, one a round."""

    blocks: list[Block] = field(default_factory=list)

    def milliseconds(self, which: Callable[[Block], bool] = lambda b: not b.disturbed) -> float:
        """Median over the undisturbed blocks; over all where there is none."""
        chosen = [b.seconds for b in self.blocks if which(b)] or [b.seconds for b in self.blocks]
        return 1e3 * statistics.median(chosen)

    @property
    def disturbed(self) -> float:
        """The fraction of blocks that other load disturbed."""
        return sum(b.disturbed for b in self.blocks) / len(self.blocks)


class Worker:
    """A measuring process and the pipes to it."""

    def __init__(self, engine: str, model: Path, threads: int, x: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.worker", engine, str(model), str(threads), str(x)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        while (line := self._read()) != "ready":
            print(f"{engine}: {line}")

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the measuring process ended: {self.process.args!r}")
        return line.strip()

    def block(self, seconds: float) -> Block:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        return Block(**json.loads(self._read()))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def interleave(
    models: Mapping[str, Path], threads: int, x: Path, *, rounds: int, max_rounds: int, seconds: float
) -> dict[str, Measurement]:
    """Measure every engine of `models` (engine name -> prepared file) in turns.

    Runs until each engine has `rounds` undisturbed blocks, at most `max_rounds` rounds.
    """
    workers = {engine: Worker(engine, path, threads, x) for engine, path in models.items()}
    results = {engine: Measurement() for engine in models}
    try:
        for turn in range(max_rounds):
            order = list(workers)[turn % len(workers) :] + list(workers)[: turn % len(workers)]
            for engine in order:
                time.sleep(0.01)  # let the last engine's threads go to sleep
                results[engine].blocks.append(workers[engine].block(seconds))
            if all(sum(not b.disturbed for b in m.blocks) >= rounds for m in results.values()):
                break
    finally:
        for worker in workers.values():
            worker.close()
    return results


def ratio(slow: Measurement, fast: Measurement) -> tuple[float, int]:
    """How many times faster `fast` is: the median over rounds in which neither was disturbed, and their number.

    Where every round was disturbed, the median over all rounds, and 0.
    """
    pairs = list(zip(slow.blocks, fast.blocks, strict=True))
    clean = [(s, f) for s, f in pairs if not (s.disturbed or f.disturbed)]
    return statistics.median(s.seconds / f.seconds for s, f in clean or pairs), len(clean)
