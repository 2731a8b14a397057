"""Tuning: the best config of every convolution and linear layer of a network, found by measuring.

The analytic default is one candidate of a few dozen, all that fit the registers. Each is built, must give
the bits of the reference, and then races the others on the target. So few candidates need no cleverer search
than to measure all of them briefly and the fastest again.

A candidate runs as it would in the network: called by the same virtual machine, with other weights at every
call (copies that together exceed the second-level cache), its input as a former layer has left it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import socket
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.numpy import save_file

from qcompile.device import cores, lacks, processor
from qcompile.errors import BuildError, ConfigError, DeviceError
from qcompile.executable import check_threads, pool_size
from qcompile.ir import Program, source, where
from qcompile.targets.base import Target
from qcompile.targets.build import linker
from qcompile.targets.database import SHIPPED, Database, Entry, features_of, nearest, toolchain
from qcompile.targets.emitters import emitters_for
from qcompile.targets.function import Kernel
from qcompile.targets.lower import lower
from qcompile.targets.measure import TIMEOUT, Candidate, Race, Remote, answers, build_candidate, pool_of, run_race
from qcompile.targets.requests import refuse_tuning
from qcompile.targets.trial import Trial
from qcompile.targets.workers import Workers
from qcompile.targets.workload import Chosen, Workload
from qcompile.tuning import Tuning

NEEDED = ("cloudpickle", "psutil")  # by TVM's worker processes
MOST_CANDIDATES = 24
PATIENCE = 3.0  # times as long as it takes by itself a race may take: others may be using the machine
MOST_FAILURES = 3  # kernels in turn that cannot be measured: then it is not them
WORTH = 1.03  # times as fast as the default a config must be to take its place: less is noise

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Tuned:
    """What tuning made of one kernel.

    Attributes:
        operator, shape: `Workload.key`.
        kernel, default: the names of the best kernel and of the default one, which may be the same.
        gain: how many times as fast as the default it is.
        seconds: of a call.
        candidates: how many were tried.
        failed: why the others took no part: kernel -> reason.
    """

    operator: str
    shape: str
    kernel: str
    default: str
    gain: float
    seconds: float
    candidates: int
    failed: dict[str, str]


def best_known(
    program: Program, target: Target, tuning: Tuning | str | Path | None, threads: int | None, progress: Progress | None
) -> Chosen:
    """The configs to compile `program` with: what ships, overridden by what `tuning` knows or measures now.

    Of what ships, only what was measured on a processor like this one: on another the default may well be the faster.

    Raises:
        ConfigError: there is no such database, or it is none. And what `tune` raises.
    """
    tuning = tuning if isinstance(tuning, Tuning) else Tuning(tuning)
    if tuning.database is not None and tuning.measure:
        tune(program, target, tuning, threads, progress)
    shipped = Database(SHIPPED).entries() if tuning.shipped else []
    entries = [entry for entry in shipped if entry.processor == processor()]
    if tuning.database is not None:
        entries += Database(tuning.database).entries()
    return nearest(entries, target, threads or pool_size())


def tune(
    program: Program,
    target: Target,
    tuning: Tuning,
    threads: int | None = None,
    progress: Progress | None = None,
    report: Callable[[Tuned], None] | None = None,
) -> None:
    """Measure the candidates of every kernel of `program` of which the database knows nothing that can be used, and
    remember the best. Where that is the default, this is remembered, and not its config: a later version may have a
    better one.

    Each kernel is remembered as soon as it is measured: whatever ends this early, what was found is kept.

    Args:
        program: an integer program.
        tuning: the database (a path), and where to measure.
        threads: of a call; default: all that the machine or the device has.
        progress: called with ("tuning", kernels done, kernels in all).
        report: called with what became of each kernel.

    Raises:
        ConfigError: a package that tuning needs is not installed, the file is no tuning database, or `threads` is no
            number of threads, or more than there are.
        DeviceError: this machine cannot run code for `target`, and no device was given; or no tracker answers, or
            code for `target` cannot run on a device.
        BuildError: a layer cannot be lowered, or measured; or there is no linker.
    """
    remote = where_to_measure(target, tuning, threads)
    assert tuning.database is not None
    database = Database(tuning.database)
    database.prepare()
    # All cores build together; measuring is one task at a time, while the other workers sleep.
    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder, Workers(cores(), TIMEOUT) as workers:
        threads = _threads(threads, remote, workers)
        known = database.chosen(target, threads, exactly=True)
        unknown = [w for w in lower(program, target, emitters_for(target)).workloads if not w.settled(known)]
        failures = 0
        tuner = Tuner(program, target, threads, remote, workers, Path(folder))
        for done, workload in enumerate(unknown):
            if progress is not None:
                progress("tuning", done, len(unknown))
            try:
                tuned = tuner.best(workload, database)
            except BuildError as error:
                failures += 1
                if failures == MOST_FAILURES or failures == len(unknown):
                    raise
                warnings.warn(f"a kernel keeps its default: {error}", stacklevel=2)
            else:
                failures = 0
                if report is not None:
                    report(tuned)
        if progress is not None:
            progress("tuning", len(unknown), len(unknown))


def where_to_measure(target: Target, tuning: Tuning, threads: int | None) -> Remote | None:
    """A device, or None for this machine; whatever forbids to tune is found here, before any work.

    Raises:
        ConfigError, DeviceError: as `tune` does.
    """
    if tuning.database is None:
        raise ConfigError("tuning has no database to remember in", remedy='give a path: Tuning("tuned.sqlite")')
    refuse_tuning(target, tuning)
    check_threads(threads, None if tuning.address else pool_size())
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"tuning needs {' and '.join(missing)}", remedy="pip install 'qcompile[tune]'")
    remote = Remote(*tuning.address) if tuning.address else None
    here = lacks(target.machine, target.features)
    if remote is None and here:
        raise DeviceError(
            f"code for {target.name} cannot be measured here: this machine {here}",
            remedy='measure on a device: tuning=Tuning(..., device="KEY@HOST:PORT") of a TVM RPC tracker',
        )
    if remote is not None:
        if target.isa.matrix is not None:
            raise DeviceError(
                f"code for {target.name} cannot be measured through RPC: its server asks Linux for no tile registers",
                where=str(remote),
                remedy="tune on that machine itself",
            )
        _reach(remote)
    return remote


def _threads(asked: int | None, remote: Remote | None, workers: Workers) -> int:
    """As many as were asked for, or all that are there. Raises ConfigError where the device has fewer."""
    if remote is None:
        return asked or pool_size()
    try:
        largest: int = workers.submit(pool_of, remote).result()
    except Exception as error:
        raise DeviceError(
            f"the device does not answer: {_reason(error)}",
            where=str(remote),
            remedy="see whether its server has registered: python -m tvm.exec.query_rpc_tracker",
        ) from error
    check_threads(asked, largest)
    return asked or largest


def _reach(remote: Remote) -> None:
    """Raises DeviceError where nothing listens; TVM's client would go on trying for a minute, each time."""
    try:
        socket.create_connection((remote.host, remote.port), timeout=10).close()
    except OSError as error:
        raise DeviceError(
            f"no RPC tracker answers: {error}",
            where=f"{remote.host}:{remote.port}",
            remedy="start it (python -m tvm.exec.rpc_tracker), and the device's server (python -m tvm.exec.rpc_server)",
        ) from error


class Tuner:
    """Measures the kernels of one program."""

    def __init__(
        self, program: Program, target: Target, threads: int, remote: Remote | None, workers: Workers, folder: Path
    ) -> None:
        self._program, self._target, self._threads, self._remote = program, target, threads, remote
        self._workers, self._folder = workers, folder
        self._linker = linker(target)

    def best(self, workload: Workload, database: Database) -> Tuned:
        """Race the candidates of `workload`, and remember the winner.

        Raises:
            BuildError: not even the default works.
        """
        configs = workload.configs()[:MOST_CANDIDATES]
        kernels = [workload.kernel(config) for config in configs]
        trial = Trial(self._program, workload)
        failed: dict[int, str] = {}
        # Interrupted, its files are still written while it is removed; what stays goes with self._folder.
        with tempfile.TemporaryDirectory(dir=self._folder, ignore_cleanup_errors=True) as folder:
            candidates = self._built(trial, kernels, Path(folder), failed)
            once = {i: self._check(trial, i, candidate, failed) for i, candidate in candidates.items()}
            if 0 in failed:
                raise self._unusable(workload, kernels[0], failed[0])
            race = Race({i: taken for i, taken in once.items() if i not in failed}, trial.calls)
            limit = TIMEOUT + PATIENCE * race.duration
            given = race, candidates, trial.inputs[0], self._threads, self._remote, limit
            try:
                shown = self._workers.submit(run_race, *given, timeout=limit).result()
            except Exception as error:
                raise self._unusable(workload, kernels[0], _reason(error)) from error
        fastest = max(shown, key=lambda i: shown[i][1])
        winner = fastest if shown[fastest][1] >= WORTH else 0
        seconds, gain = shown[winner]
        operator, shape = workload.key
        database.add(
            Entry(
                operator,
                shape,
                features_of(self._target),
                toolchain(),
                self._threads,
                json.dumps(asdict(configs[winner]) if winner else {}),
                gain,
                seconds * 1e6,
                processor() if self._remote is None else str(self._remote),
            )
        )
        reasons = {kernels[i].name: reason for i, reason in failed.items()}
        return Tuned(operator, shape, kernels[winner].name, kernels[0].name, gain, seconds, len(configs), reasons)

    def _built(
        self, trial: Trial, kernels: Sequence[Kernel], folder: Path, failed: dict[int, str]
    ) -> dict[int, Candidate]:
        """The candidates, built on all cores at once."""
        pending: dict[int, tuple[Candidate, Future[None]]] = {}
        for i, kernel in enumerate(kernels):
            candidate = Candidate(folder / f"{i}.so", folder / f"{i}.safetensors", tuple(kernel.pools()))
            save_file(trial.constants(kernel), candidate.constants)
            module = trial.module(kernel)
            build = self._workers.submit(build_candidate, module, self._target.tvm, self._linker, candidate.library)
            pending[i] = candidate, build
        for i, (_, build) in pending.items():
            try:
                build.result()
            except Exception as error:  # noqa: BLE001  # whatever TVM and LLVM raise, and the end of a process
                failed[i] = _reason(error)
        return {i: candidate for i, (candidate, _) in pending.items() if i not in failed}

    def _check(self, trial: Trial, i: int, candidate: Candidate, failed: dict[int, str]) -> float:
        """Hold a candidate to the bits of the reference; returns the seconds of a call."""
        given = candidate, trial.inputs, self._threads, self._remote
        try:
            outputs, seconds = self._workers.submit(answers, *given).result()
        except Exception as error:  # noqa: BLE001
            failed[i] = _reason(error)
            return math.inf
        if not trial.exact(outputs):
            failed[i] = "other bits than the reference"
        return float(seconds)

    def _unusable(self, workload: Workload, kernel: Kernel, reason: str) -> BuildError:
        return BuildError(
            f"{kernel.name}, the default kernel, could not be measured for {self._target.name}: {reason}",
            where=where(workload.node) or workload.node.name,
            source=source(workload.node),
            remedy="check that the device can be reached and has memory to spare; compile without tuning meanwhile",
        )


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it took too long"
    if isinstance(error, ChildProcessError):
        return "its process crashed"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
