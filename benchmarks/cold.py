"""Cold start and peak memory: a fresh process that loads one engine and one prepared model, and answers.

The time is the parent's, from the start of the interpreter to the first answer; the files have been
read before, so the disk does not count. The memory is the most that the process ever held.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.child import Child, Failed
from benchmarks.engines import ENGINES


@dataclass
class Starts:
    """What the starts of one engine showed."""

    seconds: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    torch: bool = False  # was PyTorch loaded?

    def median(self) -> tuple[float, int]:
        return statistics.median(self.seconds), int(statistics.median(self.bytes))


def cold_starts(
    models: Mapping[str, Path], threads: int, x: Path, starts: int
) -> tuple[dict[str, Starts], dict[str, str]]:
    """Start every engine `starts` times, in turns; returns what they showed, and why one failed.

    The order is another in every turn: who starts after a process that held much memory starts later.
    """
    shown: dict[str, Starts] = {engine: Starts() for engine in models}
    failed: dict[str, str] = {}
    inputs = {engine: x.with_name(f"input for {engine}.npy") for engine in models}
    for engine, path in inputs.items():
        np.save(path, ENGINES[engine].arrange(np.load(x)))
    order = random.Random(0)
    for _ in range(starts):
        for engine in order.sample(list(shown), len(shown)):
            try:
                _start(engine, models[engine], threads, inputs[engine], shown[engine])
            except Failed as error:
                failed[engine] = str(error)
                del shown[engine]
    return shown, failed


def _start(engine: str, path: Path, threads: int, x: Path, into: Starts) -> None:
    python, loader = ENGINES[engine].python, ENGINES[engine].loader
    start = time.perf_counter()
    child = Child(python, "benchmarks.first", loader, str(path), str(threads), str(x), threads=threads)
    try:
        child.wait_for("first")
        seconds = time.perf_counter() - start
        held = child.answer()
    finally:
        child.close()
    into.seconds.append(seconds)
    into.bytes.append(held["peak_bytes"])
    into.torch |= held["torch"]
