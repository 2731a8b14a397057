"""What runs in tuning's processes: on as many threads as it was asked for, and no longer than was foreseen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm

from qcompile.errors import ConfigError
from qcompile.executable import pool_size
from qcompile.targets import measure
from qcompile.targets.measure import Candidate, Race, run_race
from qcompile.targets.workers import Workers

LONG = 300.0  # seconds: nobody waits for it


def used_in_a_process(threads: int) -> int:
    def used(threads: int) -> int:
        with measure._device(threads, None, LONG):
            return int(tvm.get_global_func("runtime.NumThreads")())

    with Workers(1, LONG) as workers:
        return int(workers.submit(used, threads).result())


@pytest.mark.parametrize("threads", sorted({1, pool_size()}))
def test_a_process_uses_the_threads_that_it_was_asked_for(threads: int) -> None:
    assert used_in_a_process(threads) == threads


def test_fewer_threads_than_were_asked_for_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", "1")
    with pytest.raises(ConfigError, match="2 threads were asked for, and TVM's pool has 1"):
        used_in_a_process(2)


class Clock:
    """A device whose candidates, called by their number, take as long as they are said to."""

    def __init__(self, seconds: dict[int, float], most_calls: int) -> None:
        self._calls = {"once": 1, "main": most_calls}
        self._seconds, self.now = seconds, 0.0
        self.longest_run = 0.0

    def load(self, candidate: Candidate) -> tuple[int, list[Any]]:
        return int(candidate.library.stem), []

    def tensor(self, array: np.ndarray) -> np.ndarray:
        return array

    def seconds(self, machine: int, function: str, number: int, arguments: list[Any]) -> float:
        run = self._seconds[machine] * self._calls[function]
        self.now += (1 + number) * run
        self.longest_run = max(self.longest_run, run)
        return run


def raced(seconds: dict[int, float], most_calls: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Clock, dict[int, Any]]:
    clock = Clock(seconds, most_calls)

    @contextmanager
    def device(*_: object) -> Iterator[Clock]:
        yield clock

    monkeypatch.setattr(measure, "_device", device)
    candidates = {i: Candidate(Path(f"{i}.so"), Path(f"{i}.safetensors"), ()) for i in seconds}
    return clock, run_race(Race(seconds, most_calls), candidates, [], 1, None, LONG)


@pytest.mark.parametrize("call", [1e-6, 1e-4, 3e-3, 0.1, 4.0])
@pytest.mark.parametrize("most_calls", [2, 16])
def test_a_race_takes_no_longer_than_was_foreseen(
    call: float, most_calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        count = int(rng.integers(1, 25))
        seconds = {i: call * float(factor) for i, factor in enumerate(rng.lognormal(0, 1, count))}
        race = Race(seconds, most_calls)
        clock, found = raced(seconds, most_calls, monkeypatch)
        assert race.duration / 10 < clock.now <= race.duration * (1 + 1e-9)
        assert clock.longest_run <= max(measure.RUN_SECONDS / min(seconds.values()), 1) * max(
            seconds[i] for i in race.runners
        )
        best = min(seconds, key=lambda i: seconds[i])
        assert max(found, key=lambda i: found[i][1]) == best
        assert found[best] == pytest.approx((seconds[best], seconds[0] / seconds[best]))


def test_who_is_hopelessly_slow_does_not_run_but_the_default_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Race({0: 1.0, 1: 1.9, 2: 2.1}, 2).runners == [0, 1]
    assert Race({0: 9.0, 1: 1.9, 2: 2.1, 5: 4.0}, 2).runners == [0, 1, 2]
    _, found = raced({0: 9.0, 1: 1.9, 2: 2.1, 5: 4.0}, 2, monkeypatch)
    assert set(found) == {0, 1, 2}
