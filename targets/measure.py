"""What tuning runs in processes of its own: building a candidate, and racing several.

Measuring is the same on this machine and on a device behind a TVM RPC tracker: there a session takes the place
of the local runtime. On a GPU, tensors lie in its memory, and a library is given the device code that it launches.
"""

from __future__ import annotations

import math
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

from qcompile import cuda
from qcompile.errors import ConfigError
from qcompile.executable import BIG_CORES, set_threads
from qcompile.targets.build import compile_module, link

TIMEOUT = 120.0  # seconds for what takes a few: building, a few calls, the answer of a device
RUN_SECONDS = 0.02  # of a run of the library, at most, unless one call takes longer
HOPELESS = 2.0  # times as long as the fastest, at the first call: such a candidate takes no part in the race
BLOCK_SECONDS = 0.004  # of runs, for one figure
FIRST_ROUNDS, FINALISTS = 3, 6
FINAL_ROUNDS, UNDISTURBED = 15, 4  # of which the fastest so many count
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
class LocalGpu:
    """The GPU of this machine."""


Place = Remote | LocalGpu | None
"""Where candidates run; None: on this machine's processor."""


@dataclass(frozen=True)
class Candidate:
    """A built library.

    Attributes:
        constants: a safetensors file with what its kernel takes.
        pools: the names of these tensors, in order.
        copies: of each that it is given, one after the other in one tensor.
        device_code: for a GPU, files with the kernels that it launches, each with what TVM must know of them.
    """

    library: Path
    constants: Path
    pools: tuple[str, ...]
    copies: int = 1
    device_code: tuple[tuple[Path, str], ...] = ()


def build_candidate(module: Any, tvm_target: dict[str, Any], linker: str, path: Path) -> None:
    """Compile `module` to a shared object."""
    link(compile_module(module, tvm_target, keep_unused=True), path, linker)


def answers(
    candidate: Candidate, inputs: Sequence[Sequence[np.ndarray]], threads: int, place: Place
) -> tuple[list[np.ndarray], float]:
    """What a call of the candidate computes from each of `inputs`, the second in the memory of the first; and the
    seconds of a call: of one, or of many in a row where that takes no time."""
    with _device(threads, place, TIMEOUT) as device:
        machine, constants = device.load(candidate)
        arguments = [[*map(device.tensor, each), *constants] for each in inputs]
        outputs = [machine["once"](*each).numpy() for each in arguments]
        seconds = device.seconds(machine, "once", 1, arguments[0])
        if (number := int(BLOCK_SECONDS / seconds)) > 1:
            seconds = min(seconds, device.seconds(machine, "once", number, arguments[0]))
        return outputs, seconds


@dataclass(frozen=True)
class Race:
    """Who runs against whom, and how: decided by what one call of each has taken.

    Attributes:
        seconds: candidate -> of one call. Number 0 is the default.
        most_calls: in one run of function "main" of a library; in one of "once" there is one.
    """

    seconds: Mapping[int, float]
    most_calls: int

    @property
    def runners(self) -> list[int]:
        """Those that may win, and the default, with which they are compared."""
        fastest = min(self.seconds.values())
        return [index for index, taken in self.seconds.items() if index == 0 or taken <= HOPELESS * fastest]

    @property
    def calls(self) -> int:
        """In a run."""
        return self.most_calls if self.most_calls * min(self.seconds.values()) <= RUN_SECONDS else 1

    @property
    def duration(self) -> float:
        """About how many seconds it takes at most, on a machine that does nothing else."""
        runs = [self.calls * self.seconds[index] for index in self.runners]
        blocks = [run + max(run, BLOCK_SECONDS) for run in runs]  # each after a run to warm up
        return (1 + FIRST_ROUNDS) * sum(blocks) + FINAL_ROUNDS * sum(sorted(blocks)[-FINALISTS - 1 :])


def run_race(
    race: Race,
    candidates: Mapping[int, Candidate],
    inputs: Sequence[np.ndarray],
    threads: int,
    place: Place,
    limit: float,
) -> dict[int, tuple[float, float]]:
    """The fastest few of the race: candidate -> (seconds of a call, how many times as fast as the default).

    They run in turns, round after round, and the figure of each is the mean of its fastest rounds: other load
    on the machine meets all of them, and can only add. `limit`: seconds after which a device drops us.
    """
    function = "main" if race.calls > 1 else "once"
    with _device(threads, place, limit) as device:
        arguments = [device.tensor(x) for x in inputs]
        runners = {}
        for index in race.runners:
            machine, constants = device.load(candidates[index])
            given = [*arguments, *constants]
            number = max(1, int(BLOCK_SECONDS / device.seconds(machine, function, 1, given)))
            runners[index] = (machine, function, number, given)

        def rounds(count: int, racing: Sequence[int]) -> dict[int, list[float]]:
            times: dict[int, list[float]] = {index: [] for index in racing}
            for _ in range(count):
                for index in racing:
                    times[index].append(device.seconds(*runners[index]) / race.calls)
            return times

        first = rounds(FIRST_ROUNDS, list(runners))
        fastest = sorted(runners, key=lambda index: min(first[index]))[:FINALISTS]
        final = rounds(FINAL_ROUNDS, sorted({0, *fastest}))
        seconds = {index: statistics.mean(sorted(times)[:UNDISTURBED]) for index, times in final.items()}
        return {index: (taken, seconds[0] / taken) for index, taken in seconds.items()}


class _Device:
    """Where candidates run: `device` of this process, or of an RPC session."""

    def __init__(self, device: Any, session: Any = None) -> None:
        self._device, self._session = device, session

    def tensor(self, array: np.ndarray) -> Any:
        return tvm.runtime.tensor(array, self._device)

    def load(self, candidate: Candidate) -> tuple[Any, list[Any]]:
        """The library's machine, and the constants where the device can read them."""
        if self._session is None:
            module = tvm.runtime.load_module(str(candidate.library))
        else:
            self._session.upload(str(candidate.library))
            module = self._session.load_module(candidate.library.name)
        for code, kernels in candidate.device_code:
            _import_kernels(module, code, kernels)
        machine = relax.VirtualMachine(module, self._device)
        constants = load_file(candidate.constants)
        return machine, [self.tensor(np.tile(constants[name], candidate.copies)) for name in candidate.pools]

    def seconds(self, machine: Any, function: str, number: int, arguments: list[Any]) -> float:
        """The mean of `number` runs, after one to warm up."""
        return float(machine.time_evaluator(function, self._device, number=number, repeat=1)(*arguments).mean)


def _import_kernels(module: Any, code: Path, kernels: str) -> None:
    """Let the host code of a library find the kernels that it launches, as `qcompile.gpu` does without tvm."""
    create, table = map(tvm.get_global_func, ("ffi.Module.create.cuda", "runtime.LoadMetaDataFromJSON"))
    module.imports[0].import_module(create(code.read_bytes(), "fatbin", table(kernels), {}))


def pool_of(remote: Remote) -> int:
    """How many threads a call can use on the device."""
    return _use(_session(remote, TIMEOUT), _MANY)


@contextmanager
def _device(threads: int, place: Place, limit: float) -> Iterator[_Device]:
    """`limit`: seconds after which a device drops us."""
    if isinstance(place, LocalGpu):
        cuda.load()
        yield _Device(tvm.cuda(cuda.DEVICE))
        return
    if place is None:
        set_threads(threads)
        yield _Device(tvm.cpu())
        return
    session = _session(place, limit)
    if (used := _use(session, threads)) != threads:
        raise ConfigError(
            f"{used} threads are used of the {threads} that were asked for",
            where=str(place),
            remedy=f"start its server with TVM_NUM_THREADS={threads}",
        )
    yield _Device(session.cpu(), session)


def _session(remote: Remote, limit: float) -> Any:
    return rpc.connect_tracker(remote.host, remote.port).request(remote.key, session_timeout=math.ceil(limit))


def _use(session: Any, threads: int) -> int:
    """Ask for so many threads; returns how many it will be."""
    session.get_function("runtime.config_threadpool")(BIG_CORES, threads)
    return int(session.get_function("runtime.NumThreads")())
