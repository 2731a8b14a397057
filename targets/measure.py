"""What tuning runs in processes of its own: building a candidate, and racing several.

Measuring is the same on this machine and on a device behind a TVM RPC tracker: there a session takes the place
of the local runtime.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from safetensors.numpy import load_file
from tvm import relax, rpc

from qcompile.errors import ConfigError
from qcompile.executable import BIG_CORES, set_threads
from qcompile.targets.build import compile_module, link

BLOCK_SECONDS = 0.004  # of calls, for one figure
FIRST_ROUNDS, FINALISTS = 3, 6
FINAL_ROUNDS, UNDISTURBED = 15, 4  # of which the fastest so many count
SESSION_SECONDS = 600  # after which a device drops us
_MANY = 1 << 16  # threads; TVM takes as many as its pool has


@dataclass(frozen=True)
class Remote:
    """A device behind a TVM RPC tracker.

    Attributes:
        host, port: of the tracker.
        key: what the device registered as.
    """

    host: str
    port: int
    key: str

    def __str__(self) -> str:
        return f"{self.key} at {self.host}:{self.port}"


@dataclass(frozen=True)
class Candidate:
    """A built library.

    Attributes:
        constants: a safetensors file with what its kernel takes.
        pools: the names of these tensors, in order.
    """

    library: Path
    constants: Path
    pools: tuple[str, ...]


def build_candidate(module: Any, tvm_target: dict[str, Any], linker: str, path: Path) -> None:
    """Compile `module` to a shared object."""
    link(compile_module(module, tvm_target, keep_unused=True), path, linker)


def answers(candidate: Candidate, inputs: Sequence[Sequence[np.ndarray]], threads: int, remote: Remote | None) -> Any:
    """What the candidate computes from each of `inputs`; the second reuses the memory of the first."""
    with _device(threads, remote) as device:
        machine, constants = device.load(candidate)
        return [machine["main"](*[device.tensor(x) for x in each], *constants).numpy() for each in inputs]


def race(
    candidates: Mapping[int, Candidate],
    inputs: Sequence[np.ndarray],
    threads: int,
    calls: int,
    remote: Remote | None,
) -> dict[int, tuple[float, float]]:
    """The fastest few of `candidates`: number -> (seconds of a kernel, how many times as fast as number 0).

    They run in turns, round after round, and the figure of each is the mean of its fastest rounds: other load
    on the machine meets all of them, and can only add. `calls`: of the kernel in one run of the library.
    """
    with _device(threads, remote) as device:
        arguments = [device.tensor(x) for x in inputs]
        runners = {}
        for index, candidate in candidates.items():
            machine, constants = device.load(candidate)
            number = max(1, int(BLOCK_SECONDS / device.seconds(machine, 3, [*arguments, *constants])))
            runners[index] = (machine, number, [*arguments, *constants])

        def rounds(count: int, racing: Sequence[int]) -> dict[int, list[float]]:
            times: dict[int, list[float]] = {index: [] for index in racing}
            for _ in range(count):
                for index in racing:
                    times[index].append(device.seconds(*runners[index]) / calls)
            return times

        first = rounds(FIRST_ROUNDS, list(runners))
        fastest = sorted(runners, key=lambda index: min(first[index]))[:FINALISTS]
        final = rounds(FINAL_ROUNDS, sorted({0, *fastest}))
        seconds = {index: statistics.mean(sorted(times)[:UNDISTURBED]) for index, times in final.items()}
        return {index: (taken, seconds[0] / taken) for index, taken in seconds.items()}


class _Device:
    """Where candidates run: this process, or an RPC session."""

    def __init__(self, session: Any = None) -> None:
        self._session = session
        self._cpu = tvm.cpu() if session is None else session.cpu()

    def tensor(self, array: np.ndarray) -> Any:
        return tvm.runtime.tensor(array, self._cpu)

    def load(self, candidate: Candidate) -> tuple[Any, list[Any]]:
        """The library's machine, and the constants where the device can read them."""
        if self._session is None:
            module = tvm.runtime.load_module(str(candidate.library))
        else:
            self._session.upload(str(candidate.library))
            module = self._session.load_module(candidate.library.name)
        machine = relax.VirtualMachine(module, self._cpu)
        constants = load_file(candidate.constants)
        return machine, [self.tensor(constants[name]) for name in candidate.pools]

    def seconds(self, machine: Any, number: int, arguments: list[Any]) -> float:
        """The mean of `number` runs, after one to warm up."""
        return float(machine.time_evaluator("main", self._cpu, number=number, repeat=1)(*arguments).mean)


def pool_of(remote: Remote) -> int:
    """How many threads a call can use on the device."""
    return _use(_session(remote), _MANY)


@contextmanager
def _device(threads: int, remote: Remote | None) -> Iterator[_Device]:
    if remote is None:
        set_threads(threads)
        yield _Device()
        return
    session = _session(remote)
    if (used := _use(session, threads)) != threads:
        raise ConfigError(
            f"{used} threads are used of the {threads} that were asked for",
            where=str(remote),
            remedy=f"start its server with TVM_NUM_THREADS={threads}",
        )
    yield _Device(session)


def _session(remote: Remote) -> Any:
    return rpc.connect_tracker(remote.host, remote.port).request(remote.key, session_timeout=SESSION_SECONDS)


def _use(session: Any, threads: int) -> int:
    """Ask for so many threads; returns how many it will be."""
    session.get_function("runtime.config_threadpool")(BIG_CORES, threads)
    return int(session.get_function("runtime.NumThreads")())
