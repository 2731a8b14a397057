"""Engines measured in turns: block A, block B, block C, block A, ... in one run.

The speed of a machine drifts by tens of percent within minutes, so figures taken one after the other
do not compare. Here every round gives each engine one block, and what is reported is the median over
the rounds of the ratio within a round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from benchmarks.child import Child, Failed
from benchmarks.engines import ENGINES
from benchmarks.worker import Block


class Racer(NamedTuple):
    """What takes part: an engine, by name, with a model that it prepared."""

    engine: str
    model: Path


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
    """A measuring process and what it measured."""

    def __init__(self, racer: Racer, threads: int, x: Path) -> None:
        arguments = (racer.engine, str(racer.model), str(threads), str(x))
        self.child = Child(ENGINES[racer.engine].python, "benchmarks.worker", *arguments, threads=threads)
        self.measured = Measurement()
        try:
            self.child.wait_for("ready")
        except Failed:
            self.child.close()
            raise

    def block(self, seconds: float) -> None:
        self.child.write(str(seconds))
        self.measured.blocks.append(Block(**self.child.answer()))


def interleave(
    racers: Mapping[str, Racer], threads: int, x: Path, *, rounds: int, max_rounds: int, seconds: float
) -> tuple[dict[str, Measurement], dict[str, str]]:
    """Measure the racers, which have a name each, in turns; each takes the input `x`.

    Runs until each has `rounds` undisturbed blocks, at most `max_rounds` rounds. Returns the
    measurements, and for each racer that failed the reason; the others go on without it.
    """
    workers: dict[str, Worker] = {}
    failed: dict[str, str] = {}
    try:
        for name, racer in racers.items():
            try:
                workers[name] = Worker(racer, threads, x)
            except Failed as error:
                failed[name] = str(error)
        for turn in range(max_rounds):
            names = list(workers)
            start = turn % max(1, len(names))
            for name in names[start:] + names[:start]:
                time.sleep(0.01)  # let the last one's threads go to sleep
                try:
                    workers[name].block(seconds)
                except Failed as error:
                    failed[name] = str(error)
                    workers.pop(name).child.close()
            if all(sum(not b.disturbed for b in w.measured.blocks) >= rounds for w in workers.values()):
                break
    finally:
        for worker in workers.values():
            worker.child.close()
    return {name: worker.measured for name, worker in workers.items()}, failed


def ratio(slow: Measurement, fast: Measurement) -> tuple[float, int]:
    """How many times faster `fast` is: the median over rounds in which neither was disturbed, and their number.

    Where every round was disturbed, the median over all rounds, and 0.
    """
    pairs = list(zip(slow.blocks, fast.blocks, strict=True))
    clean = [(s, f) for s, f in pairs if not (s.disturbed or f.disturbed)]
    return statistics.median(s.seconds / f.seconds for s, f in clean or pairs), len(clean)
