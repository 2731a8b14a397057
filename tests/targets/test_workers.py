"""The processes of tuning: what they answer, and that leaving them at any moment ends all of them at once."""

from __future__ import annotations

import os
import subprocess
import time
from concurrent.futures import CancelledError

import psutil
import pytest

from qcompile.targets.workers import Workers

LONG = 300.0  # seconds: nobody waits for it


def test_a_task_answers_or_raises_in_its_own_process() -> None:
    with Workers(1, LONG) as workers:
        assert workers.submit(os.getpid).result() != os.getpid()
        with pytest.raises(ValueError, match="invalid literal"):
            workers.submit(int, "x").result()


def test_a_process_that_crashes_or_hangs_is_started_anew() -> None:
    with Workers(1, 1.0) as workers:
        with pytest.raises(ChildProcessError):
            workers.submit(os.abort).result()
        with pytest.raises(TimeoutError):
            workers.submit(time.sleep, LONG).result()
        assert workers.submit(abs, -3).result() == 3


def test_a_task_may_have_more_time_or_less() -> None:
    with Workers(1, 1.0) as workers:
        assert workers.submit(time.sleep, 1.5, timeout=LONG).result() is None
        with pytest.raises(TimeoutError):
            workers.submit(time.sleep, LONG, timeout=0.1).result()


@pytest.mark.parametrize("after", [0.0, 0.01, 0.1, 1.0, 3.0])
def test_leaving_in_the_middle_of_work_ends_all_processes(after: float) -> None:
    """At first while they start, later while they run a task that has a process of its own."""
    before = set(psutil.Process().children(recursive=True))
    with Workers(2, LONG) as workers:
        tasks = [workers.submit(subprocess.call, ["sleep", str(LONG)]) for _ in range(5)]
        time.sleep(after)
        left = time.monotonic()
    assert time.monotonic() - left < 20
    assert set(psutil.Process().children(recursive=True)) <= before
    assert all(task.done() for task in tasks)
    for task in tasks:
        with pytest.raises((CancelledError, ChildProcessError)):
            task.result()
