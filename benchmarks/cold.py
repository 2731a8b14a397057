"""Cold start and peak memory: a fresh process that loads one engine and one prepared model, and answers.

    python -m benchmarks.cold ENGINE MODEL_FILE THREADS INPUT.npy

The time is the parent's, from the start of the interpreter to the first answer; the files have been
read before, so the disk does not count. The memory is the most that the process ever held.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.child import Child, Failed, answer
from benchmarks.engines import ENGINES

CALLS = 10  # before the memory is read


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
    """Start every engine `starts` times, in turns; returns what they showed, and why one failed."""
    shown: dict[str, Starts] = {engine: Starts() for engine in models}
    failed: dict[str, str] = {}
    for _ in range(starts):
        for engine in list(shown):
            try:
                _start(engine, models[engine], threads, x, shown[engine])
            except Failed as error:
                failed[engine] = str(error)
                del shown[engine]
    return shown, failed


def _start(engine: str, path: Path, threads: int, x: Path, into: Starts) -> None:
    start = time.perf_counter()
    child = Child(ENGINES[engine].python, "benchmarks.cold", engine, str(path), str(threads), str(x), threads=threads)
    try:
        child.wait_for("first")
        seconds = time.perf_counter() - start
        held = child.answer()
    finally:
        child.close()
    into.seconds.append(seconds)
    into.bytes.append(held["peak_bytes"])
    into.torch |= held["torch"]


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main(engine: str, model_path: str, threads: str, input_path: str) -> None:
    x = ENGINES[engine].arrange(np.load(input_path))
    run = ENGINES[engine].load(Path(model_path), int(threads))
    run(x)
    print("first", flush=True)
    for _ in range(CALLS):
        run(x)
    answer({"peak_bytes": _peak_bytes(), "torch": "torch" in sys.modules})


if __name__ == "__main__":
    main(*sys.argv[1:])
