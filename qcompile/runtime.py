"""Run an artifact: no PyTorch, no compiler. NumPy and two libraries of TVM, 3 MB each, are all it loads.

model = qcompile.load("model.qcm")
y = model(x)                       # NumPy in, NumPy out; torch tensors in, torch tensors out

python -m qcompile.runtime model.qcm     # self-test, and how long a call takes
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qcompile import ffi
from qcompile.artifact import Artifact, CoverageRow, TensorSpec, Variant
from qcompile.checks import InputChecker, check_seconds, in_order
from qcompile.device import lacks, machine
from qcompile.errors import ArtifactError, DeviceError, InputError, QcompileError
from qcompile.executable import OWNER, Executable, check_threads, refuse_threads, set_threads

if TYPE_CHECKING:
    from pathlib import Path

    from qcompile.gpu import GpuExecutable


class Selftest(NamedTuple):
    """What replaying the golden vectors gave.

    Attributes:
        cases: how many were replayed.
        elements: output elements compared.
        wrong: elements that differ (in any bit; or by more than the tolerance, where floats remain).
    """

    cases: int
    elements: int
    wrong: int

    @property
    def passed(self) -> bool:
        return self.cases > 0 and self.wrong == 0


class Timing(NamedTuple):
    """How long a call takes, in seconds: `calls` of them, after a warm-up."""

    calls: int
    median: float
    fastest: float
    slowest: float


class Model:
    """A compiled model, ready to run.

    Thread-safe: calls from several threads run one after the other, since each uses all its cores. A
    process may fork after loading a model, not after running one.
    """

    def __init__(self, artifact: Artifact, *, threads: int | None = None) -> None:
        """Load the best machine code that this device can run.

        Args:
            artifact: from `Artifact.load` or the compiler.
            threads: how many to use for a call; None: all cores (or TVM_NUM_THREADS, where set).

        Raises:
            DeviceError: no variant fits this machine; it is checked before any code is loaded.
            ConfigError: `threads` is not a positive number, or more than there are, or the machine code is for a GPU.
        """
        check_threads(threads)
        self.artifact, self._threads = artifact, threads
        self._variant = best_variant(artifact)
        self._run = _executable(self._variant, threads)
        self._check = InputChecker(artifact.inputs)
        self._lock = threading.Lock()

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The flat inputs, in call order."""
        return self.artifact.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The flat outputs."""
        return self.artifact.outputs

    @property
    def coverage(self) -> tuple[CoverageRow, ...]:
        """The ledger: what became of every operator of the model."""
        return self.artifact.coverage

    @property
    def target(self) -> str:
        """The target whose machine code was loaded."""
        return self._variant.name

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Run the model: NumPy arrays in and out, or torch tensors in and out.

        A model for a GPU takes torch tensors on the GPU where they lie, on torch's current stream, and so are its
        outputs; it does not wait for them.

        Inputs are given by position or by name and nest as the model's own do, or are all given flat, in the order
        of `inputs`. Outputs nest as the model's own do, and are the caller's to keep and to change.

        Raises:
            InputError: count, shape or dtype do not fit. (Values may be anything, NaN included.)
        """
        return self._apply(self.flat, inputs, named, self._on_gpu)

    def _apply(
        self,
        run: Callable[..., list[np.ndarray]],
        inputs: Sequence[Any],
        named: Mapping[str, Any],
        on_gpu: Callable[..., list[Any] | None] | None = None,
    ) -> Any:
        """`run`, which takes and returns flat arrays, on inputs as the user gives them; `on_gpu` on tensors there."""
        inputs = in_order(self.artifact.inputs, inputs, named)
        torch = sys.modules.get("torch")
        if torch is None or not any(isinstance(x, torch.Tensor) for x in inputs):
            return _nest(self.artifact.output_structure, run(*inputs))
        results = on_gpu(torch, inputs) if on_gpu is not None else None
        if results is None:
            results = [torch.from_numpy(array) for array in run(*_from_torch(torch, inputs))]
        return _nest(self.artifact.output_structure, results)

    def flat(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """Run the model: flat NumPy inputs to flat NumPy outputs. Raises InputError as a call does."""
        arrays = self._check(inputs)
        with self._lock:
            return OWNER.run(self._run, arrays)

    def _on_gpu(self, torch_module: Any, inputs: Sequence[Any]) -> list[Any] | None:
        """The outputs for torch tensors on the GPU; None where the inputs, or the model, are not there."""
        on_gpu = self._run.on_gpu
        if on_gpu is None:
            return None
        from qcompile.gpu import is_on_gpu, run_on_gpu

        def run(tensors: Sequence[ffi.Object], stream: int) -> list[tuple[ffi.Object, bool]]:
            with self._lock:
                return OWNER.run(on_gpu, tensors, stream)

        return run_on_gpu(torch_module, inputs, self._check, run) if is_on_gpu(torch_module, inputs) else None

    def selftest(self) -> Selftest:
        """Replay the golden vectors: every bit must match (within the tolerance, where floats remain)."""
        elements = wrong = 0
        for case in self.artifact.golden:
            for got, want in zip(self.flat(*case.inputs), case.outputs, strict=True):
                elements += want.size
                wrong += differences(got, want, self.artifact.tolerance)
        return Selftest(len(self.artifact.golden), elements, wrong)

    def benchmark(self, *inputs: Any, seconds: float = 1.0) -> Timing:
        """Time calls for about `seconds`, on `inputs` or else on the first golden vector.

        Raises:
            InputError: the inputs do not fit. ConfigError: `seconds` is no time.
        """
        check_seconds(seconds)
        if not inputs and self.artifact.golden:
            inputs = self.artifact.golden[0].inputs
        for _ in range(3):
            self(*inputs)
        times: list[float] = []
        stop = time.perf_counter() + seconds
        while not times or time.perf_counter() < stop:
            start = time.perf_counter()
            self(*inputs)
            times.append(time.perf_counter() - start)
        return Timing(len(times), float(np.median(times)), min(times), max(times))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ArtifactError(
            "a compiled model is saved as an artifact; it cannot be pickled or copied",
            where=f"pickle, copy or torch.save of a {type(self).__name__}",
            remedy="model.save(path), and qcompile.load(path) where it is needed: in each process, for each copy",
        )

    def save(self, path: str | Path) -> None:
        """Write the artifact; see `Artifact.save`."""
        self.artifact.save(path)


def load(path: str | Path, *, threads: int | None = None) -> Model:
    """Load a `.qcm` file: checks its hashes, then this machine's features, then loads its code.

    The file holds a program, so load only what you would run: the hashes protect against damage,
    not against forgery.

    Raises:
        ArtifactError: missing, truncated, altered, from a newer format, or not an artifact.
        DeviceError: built for a processor that this one is not.
    """
    return Model(Artifact.load(path, meanwhile=ffi.load), threads=threads)


def best_variant(artifact: Artifact) -> Variant:
    """The highest-ranked variant that this machine can run; loads nothing.

    Raises:
        DeviceError: there is none; says what each of them needs.
    """
    reasons = {variant.name: lacks(variant.machine, variant.features) for variant in artifact.variants}
    runnable = [variant for variant in artifact.variants if not reasons[variant.name]]
    if not runnable:
        built = "; ".join(f"for {name} this machine {reason}" for name, reason in reasons.items())
        raise DeviceError(
            f"the artifact holds no machine code that this {machine()[0]} machine can run",
            where=built or "the artifact has no targets",
            remedy="compile the model for a target that this machine has (`qcompile targets` lists them)",
        )
    return max(runnable, key=lambda variant: variant.rank)


def _executable(variant: Variant, threads: int | None) -> Executable | GpuExecutable:
    """What runs the machine code of a variant."""
    if not variant.device_code:
        if threads is not None:  # else the first call makes the pool: a process may fork before it
            OWNER.run(set_threads, threads)
        return Executable(variant.library, variant.constants.values(), threads, variant.alignments)
    refuse_threads(threads, variant.name)
    from qcompile.gpu import GpuExecutable  # by now the driver is there

    arguments = variant.library, variant.constants.values(), variant.device_code, variant.device_kernels
    return OWNER.run(GpuExecutable, *arguments)


def _from_torch(torch: Any, inputs: Sequence[Any]) -> list[Any]:
    if not all(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in inputs):
        raise InputError(
            "torch inputs must all be tensors on the CPU", remedy="call .cpu() on each, or give NumPy arrays"
        )
    try:
        return [x.detach().numpy() for x in inputs]
    except (TypeError, RuntimeError) as error:
        raise InputError(
            f"a torch input is no plain array: {error}", remedy="give dense tensors of a dtype that NumPy has"
        ) from error


def _nest(structure: Any, flat: Sequence[Any]) -> Any:
    """Flat outputs as the model's own structure."""
    if structure is None:
        return None
    if isinstance(structure, int):
        return flat[structure]
    ((kind, inner),) = structure.items()
    if kind == "dict":
        return {name: _nest(value, flat) for name, value in inner.items()}
    nested = [_nest(value, flat) for value in inner]
    return nested if kind == "list" else tuple(nested)


def differences(got: np.ndarray, want: np.ndarray, tolerance: float) -> int:
    """How many elements differ: in any bit when `tolerance` is 0."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return int(want.size) or 1
    if tolerance == 0.0:
        raw = np.uint8, (*want.shape, want.dtype.itemsize)
        a, b = (np.ascontiguousarray(x).view(raw[0]).reshape(raw[1]) for x in (got, want))
        return int(np.count_nonzero((a != b).any(axis=-1)))
    got, want = got.astype(np.float64), want.astype(np.float64)
    limit = tolerance * float(np.nanmax(np.abs(want), initial=0.0))
    with np.errstate(invalid="ignore"):  # infinity - infinity
        close = (np.abs(got - want) <= limit) | (np.isnan(got) & np.isnan(want)) | (got == want)
    return int(want.size - np.count_nonzero(close))


def report(model: Model) -> tuple[bool, str]:
    """Self-test and latency of `model`; returns (passed, a plain table)."""
    result = model.selftest()
    timing = model.benchmark() if result.cases else None
    verdict = "passed" if result.passed else "FAILED" if result.cases else "FAILED: the artifact has no golden vectors"
    rows = [("target", model.target)]
    rows += [("input", f"{spec.name}: {spec.text}") for spec in model.inputs]
    rows += [("output", f"{spec.name}: {spec.text}") for spec in model.outputs]
    rows += [("selftest", f"{verdict}: {result.wrong} of {result.elements} elements wrong in {result.cases} cases")]
    if timing:
        rows += [
            ("latency", f"{timing.median * 1e3:.3f} ms (median of {timing.calls}, fastest {timing.fastest * 1e3:.3f})")
        ]
    return result.passed, "\n".join(f"{name:<9} {value}" for name, value in rows)


def main(arguments: Sequence[str]) -> int:
    """`python -m qcompile.runtime model.qcm`: 0 when the self-test passes."""
    if len(arguments) != 1:
        print("usage: python -m qcompile.runtime model.qcm", file=sys.stderr)
        return 2
    try:
        passed, table = report(load(arguments[0]))
    except QcompileError as error:
        print(error, file=sys.stderr)
        return 1
    print(table)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
