"""Processes that build and measure for tuning: TVM's workers, which may crash or hang and are started anew.

TVM's own pool of them closes a worker's pipes while the thread that drives it still reads from them, so that
ending the pool in the middle of its work may fail or hang. Here the process is ended instead, and each thread
finds that out by itself.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import PriorityQueue
from typing import Any

from tvm.support.popen_pool import PopenWorker, kill_child_processes

from qcompile.device import machine

_POLL = 0.005  # seconds


class Workers:
    """So many processes, started when first needed. Leaving the context ends them and all that they started.

    Args:
        timeout: of a task that has none of its own, in seconds.
    """

    def __init__(self, count: int, timeout: float) -> None:
        self._timeout = timeout
        self._workers = [_Worker() for _ in range(count)]
        # The first idle one works, so that tasks one after the other share a process, with what it has at hand: its
        # pool of threads, or its part of a GPU.
        self._idle: PriorityQueue[int] = PriorityQueue()
        for number in range(count):
            self._idle.put(number)
        self._threads = ThreadPoolExecutor(count)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        while self._idle.qsize() < len(self._workers):  # a thread may just have started a process: ask again
            for worker in self._workers:
                worker.end()
            time.sleep(_POLL)
        for worker in self._workers:
            worker.kill()

    def submit(self, function: Callable[..., Any], *arguments: Any, timeout: float | None = None) -> Future[Any]:
        """`function(*arguments)` in one of the processes, for `timeout` seconds at most.

        The future raises what the function raised, TimeoutError, or ChildProcessError where the process ended.
        """
        return self._threads.submit(self._run, function, arguments, timeout or self._timeout)

    def _run(self, function: Callable[..., Any], arguments: tuple[Any, ...], timeout: float) -> Any:
        number = self._idle.get()
        worker = self._workers[number]
        try:
            worker.send(function, arguments, timeout=timeout)
            return worker.recv()
        except Exception:
            worker.kill()  # a GPU whose kernel has failed does nothing more for its process
            raise
        finally:
            self._idle.put(number)


class _Worker(PopenWorker):
    def __init__(self) -> None:
        super().__init__(_prepare, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def end(self) -> None:
        """End the process, from whatever thread; the one that drives it is told that the process ended."""
        process = self._proc
        if process is not None:
            # Stopped first: it shall neither answer for a child that was ended nor start another.
            process.send_signal(signal.SIGSTOP)
            kill_child_processes(process.pid)
            process.kill()


def _prepare() -> None:
    """Ctrl-C in a terminal reaches all processes, but only the one that tunes shall act on it. And code may run here
    for which a process must ask the system first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    machine()
