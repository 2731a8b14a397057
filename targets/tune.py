"""Tuning: the best config of every convolution and linear layer of a network, found by measuring.

The analytic default is one candidate of a few dozen, all that fit the registers. Each is built, must give
the bits of the reference, and then races the others on the target. So few candidates need no cleverer search
than to measure all of them briefly and the fastest again.

A candidate runs as it would in the network: called by the same virtual machine, with other weights at every
call (copies that together exceed the second-level cache), its input as a former layer has left it. What this means
on a GPU is said at `_bench`.
"""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from safetensors.numpy import save_file

from qcompile.device import cores, gpu_name, processor
from qcompile.errors import BuildError
from qcompile.executable import pool_size
from qcompile.ir import Program, source, where
from qcompile.targets.base import Target
from qcompile.targets.build import tools
from qcompile.targets.database import SHIPPED, Database, Entry, features_of, nearest, toolchain
from qcompile.targets.device_code import DeviceCode
from qcompile.targets.emitters import emitters_for
from qcompile.targets.function import Kernel
from qcompile.targets.lower import lower
from qcompile.targets.measure import TIMEOUT, Candidate, LocalGpu, Place, Race, answers, build_candidate, run_race
from qcompile.targets.places import local, reason_of, threads_at, where_to_measure
from qcompile.targets.trial import Rotation, Trial
from qcompile.targets.workers import Workers
from qcompile.targets.workload import Chosen, Workload
from qcompile.tuning import Tuning

MOST_CANDIDATES, MOST_ON_GPU = 24, 40
COLD = Rotation(4 << 20, 16)  # more than a second-level cache
LARGEST_ON_GPU, MOST_LAUNCHES = 64 << 20, 32  # of a rotation on a GPU
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
    entries = [entry for entry in shipped if entry.features == features_of(target)]
    if entries:  # only then is the driver of a GPU asked
        here = _processor(local(target))
        entries = [entry for entry in entries if entry.processor == here]
    if tuning.database is not None:
        entries += Database(tuning.database).entries()
    return nearest(entries, target, threads or pool_size())


def check(target: Target, tuning: Tuning | str | Path | None, threads: int | None) -> None:
    """What forbids to use `tuning` is found here, before any work. Raises as `best_known` does."""
    tuning = tuning if isinstance(tuning, Tuning) else Tuning(tuning)
    if tuning.database is None:
        return
    if not tuning.measure:
        Database(tuning.database).entries()
        return
    where_to_measure(target, tuning, threads)
    Database(tuning.database).prepare()


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
        threads: of a call; default: all that the machine or the device has. None for a GPU.
        progress: called with ("tuning", kernels done, kernels in all).
        report: called with what became of each kernel.

    Raises:
        ConfigError: a package that tuning needs is not installed, the file is no tuning database, or `threads` is no
            number of threads, or more than there are.
        DeviceError: this machine cannot run code for `target`, and no device was given; or no tracker answers, or
            code for `target` cannot run on a device.
        BuildError: a layer cannot be lowered, or measured; or there is no linker, or for a GPU no compiler.
    """
    place = where_to_measure(target, tuning, threads)
    assert tuning.database is not None
    database = Database(tuning.database)
    database.prepare()
    # All cores build together; measuring is one task at a time, while the other workers sleep.
    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder, Workers(cores(), TIMEOUT) as workers:
        threads = threads_at(place, threads, workers)
        known = database.chosen(target, threads, exactly=True)
        lowered = lower(program, target, emitters_for(target))
        unknown = [workload for workload in lowered.workloads if not workload.settled(known)]
        failures = 0
        bench = _bench(place, threads, sum(pool.nbytes for pool in lowered.constants.values()))
        tuner = Tuner(program, target, bench, workers, Path(folder))
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


def _processor(place: Place) -> str:
    """What a row says of where it was measured."""
    if isinstance(place, LocalGpu):
        return gpu_name()
    return processor() if place is None else str(place)


@dataclass(frozen=True)
class Bench:
    """Where candidates are measured, and what of measuring depends on it.

    Attributes:
        threads: of a call, as `threads_at` says.
        most: candidates.
        rotation: of their weights.
    """

    place: Place
    threads: int
    most: int
    rotation: Rotation


def _bench(place: Place, threads: int, network_bytes: int) -> Bench:
    """The bench at `place`, for kernels of a network with so many bytes of constants.

    On a processor, a kernel of a network finds its weights beyond the second-level cache. The one of a GPU may hold all
    weights of a network, from call to call (50 MB of an H100), or nearly none of them (4 MB of a T4). So calls take
    turns among about as many bytes as the network has: then they are in the cache where they would be in the network,
    whatever its size. (Layers with few weights have no more copies than launches: cold or not, it takes no time.)
    """
    if not isinstance(place, LocalGpu):
        return Bench(place, threads, MOST_CANDIDATES, COLD)
    # Also, that many launches make a graph, so that launching it takes little of the time.
    return Bench(place, threads, MOST_ON_GPU, Rotation(min(network_bytes, LARGEST_ON_GPU), MOST_LAUNCHES))


class Tuner:
    """Measures the kernels of one program."""

    def __init__(self, program: Program, target: Target, bench: Bench, workers: Workers, folder: Path) -> None:
        self._program, self._target, self._bench = program, target, bench
        self._workers, self._folder = workers, folder
        self._linker = tools(target)
        self._device_code = DeviceCode(target.isa, workers, cores(), folder)

    def best(self, workload: Workload, database: Database) -> Tuned:
        """Race the candidates of `workload`, and remember the winner.

        Raises:
            BuildError: not even the default works.
        """
        configs = workload.configs()[: self._bench.most]
        kernels = [workload.kernel(config) for config in configs]
        trial = Trial(self._program, workload, self._bench.rotation)
        failed: dict[int, str] = {}
        # Interrupted, its files are still written while it is removed; what stays goes with self._folder.
        with tempfile.TemporaryDirectory(dir=self._folder, ignore_cleanup_errors=True) as folder:
            candidates = self._built(trial, kernels, Path(folder), failed)
            once = {i: self._check(trial, i, candidate, failed) for i, candidate in candidates.items()}
            if 0 in failed:
                raise self._unusable(workload, kernels[0], failed[0])
            race = Race({i: taken for i, taken in once.items() if i not in failed}, trial.calls)
            limit = TIMEOUT + PATIENCE * race.duration
            given = race, candidates, trial.inputs[0], self._bench.threads, self._bench.place, limit
            try:
                shown = self._workers.submit(run_race, *given, timeout=limit).result()
            except Exception as error:
                raise self._unusable(workload, kernels[0], reason_of(error)) from error
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
                self._bench.threads,
                json.dumps(asdict(configs[winner]) if winner else {}),
                gain,
                seconds * 1e6,
                _processor(self._bench.place),
            )
        )
        reasons = {kernels[i].name: reason for i, reason in failed.items()}
        return Tuned(operator, shape, kernels[winner].name, kernels[0].name, gain, seconds, len(configs), reasons)

    def _built(
        self, trial: Trial, kernels: Sequence[Kernel], folder: Path, failed: dict[int, str]
    ) -> dict[int, Candidate]:
        """The candidates, built on all cores at once."""
        pending: dict[int, tuple[Candidate, Future[None]]] = {}
        self._device_code.begin(kernels)
        for i, kernel in enumerate(kernels):
            candidate = Candidate(folder / f"{i}.so", folder / f"{i}.safetensors", tuple(kernel.pools()), trial.calls)
            save_file(trial.constants(kernel), candidate.constants)
            module = trial.module(kernel)
            build = self._workers.submit(build_candidate, module, self._target.tvm, self._linker, candidate.library)
            pending[i] = candidate, build
        built: dict[int, Candidate] = {}
        for i, (candidate, build) in pending.items():
            try:
                build.result()
                built[i] = replace(candidate, device_code=self._device_code.of(kernels[i]))
            except Exception as error:  # noqa: BLE001  # whatever TVM and compilers raise, and the end of a process
                failed[i] = reason_of(error)
        return built

    def _check(self, trial: Trial, i: int, candidate: Candidate, failed: dict[int, str]) -> float:
        """Hold a candidate to the bits of the reference; returns the seconds of a call."""
        given = candidate, trial.inputs, self._bench.threads, self._bench.place
        try:
            outputs, seconds = self._workers.submit(answers, *given).result()
        except Exception as error:  # noqa: BLE001
            failed[i] = reason_of(error)
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
