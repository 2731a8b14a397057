"""Tuning: measured on this machine, held to the reference, remembered, and no bit changed by it."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from execution import native_vectors, skip_unless_runnable
from passing import randomize
from torch import Tensor, nn
from tvm.tirx.script import builder as T

import qcompile
from qcompile.errors import BuildError
from qcompile.quantizer import quantize
from qcompile.targets import get, measure, tune
from qcompile.targets.cpu import choose
from qcompile.targets.cpu.conv import CONV
from qcompile.targets.database import Database
from qcompile.targets.emitters import emitters_for
from qcompile.targets.function import Kernel, function
from qcompile.targets.lower import lower
from qcompile.targets.measure import Candidate
from qcompile.targets.tune import Tuned
from qcompile.tuning import Tuning

NATIVE = native_vectors()


class Small(nn.Module):
    """A first layer, a depthwise one, a residual sum in the epilogue, a padded output, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 24, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.pointwise = nn.Conv2d(24, 24, 1)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = (self.pointwise(self.depthwise(x).relu()) + x).relu()
        head: Tensor = self.head(x.mean((2, 3)))
        return head


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return randomize(Small().eval())


def images(batch: int = 1) -> list[Tensor]:
    return [torch.randn(batch, 3, 18, 18) for _ in range(2)]


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_unless_runnable(NATIVE)
    monkeypatch.setattr(tune, "MOST_CANDIDATES", 4)


def run(model: nn.Module, path: Path, **options: Any) -> list[Tuned]:
    program = quantize(model, calibration=images(), **options).program
    found: list[Tuned] = []
    tune.tune(program, get(NATIVE), Tuning(path), threads=1, report=found.append)
    return found


@pytest.fixture(scope="module")
def steps() -> list[Any]:
    return []


@pytest.fixture(scope="module")
def tuned_file(model: nn.Module, steps: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tuning found for `model`."""
    path = tmp_path_factory.mktemp("tuned") / "tuned.sqlite"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "MOST_CANDIDATES", 4)
        qcompile.compile(
            model, NATIVE, calibration=images(), tuning=path, threads=1, progress=lambda *step: steps.append(step)
        )
    return path


@pytest.fixture
def path(tuned_file: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copy(tuned_file, tmp_path))


def test_every_kernel_is_measured_once_and_no_bit_changes(model: nn.Module, path: Path, steps: list[Any]) -> None:
    data = images()
    compiled = qcompile.compile(model, NATIVE, calibration=data, tuning=path, threads=1)  # all known
    assert [step for step in steps if step[0] == "tuning"] == [("tuning", done, 4) for done in range(5)]
    entries = Database(path).entries()
    workloads = lower(compiled.program, get(NATIVE), emitters_for(get(NATIVE))).workloads
    assert len(entries) == 4
    assert {(entry.operator, entry.shape) for entry in entries} == {workload.key for workload in workloads}
    assert all(entry.gain >= 1 and entry.microseconds > 0 for entry in entries)
    for x in (*data, 5 * torch.randn(1, 3, 18, 18)):
        assert torch.equal(compiled(x), compiled.reference(x))
    assert run(model, path) == []


def test_compiling_uses_what_was_found(model: nn.Module, path: Path) -> None:
    """The ledger names other kernels after every entry was given the last config instead of the first."""
    database = Database(path)
    program = quantize(model, calibration=images()).program
    workloads = {
        workload.key: workload for workload in lower(program, get(NATIVE), emitters_for(get(NATIVE))).workloads
    }
    for entry in database.entries():
        last = workloads[entry.operator, entry.shape].configs()[-1]
        database.add(replace(entry, config=json.dumps(asdict(last))))
    known = Tuning(path, measure=False)
    plain, tuned = (qcompile.compile(model, NATIVE, calibration=images(), tuning=t, threads=1) for t in (None, known))
    kernels = [{row.where: row.kernel for row in c.coverage if row.kind == "integer"} for c in (plain, tuned)]
    changed = {name for name in kernels[0] if kernels[0][name] != kernels[1][name]}
    assert {"first", "depthwise", "pointwise"} <= changed
    x = torch.randn(1, 3, 18, 18)
    assert torch.equal(tuned(x), tuned.reference(x))
    profiled = {row.kernel.rstrip("0123456789").rstrip("_") for row in tuned.profile(x, seconds=0.01).rows}
    assert any(kernels[1]["pointwise"].startswith(kernel) for kernel in profiled if kernel.startswith("gemm"))


def test_a_dynamic_batch_is_tuned_at_the_size_of_the_example(tmp_path: Path) -> None:
    model, path = randomize(nn.Conv2d(3, 24, 3, padding=1).eval()), tmp_path / "tuned.sqlite"
    batch = {0: torch.export.Dim("batch", min=1, max=8)}
    compiled = qcompile.compile(model, NATIVE, calibration=images(3), dynamic_shapes=(batch,), tuning=path, threads=1)
    (entry,) = Database(path).entries()
    assert entry.shape.startswith("d0x18x18x3")
    for size in (1, 2, 8):
        x = torch.randn(size, 3, 18, 18)
        assert torch.equal(compiled(x), compiled.reference(x))


class Again(nn.Module):
    """The residual of the convolution is its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x) + x
        return y


def test_a_residual_may_be_the_input_itself(tmp_path: Path) -> None:
    (tuned,) = run(randomize(Again().eval()), tmp_path / "tuned.sqlite")
    assert not tuned.failed


INTERRUPTED = """
import sys, threading, os, signal, time
sys.path[:0] = sys.argv[1:3]
import test_tune
threading.Thread(target=lambda: (time.sleep(float(sys.argv[4])), os.killpg(0, signal.SIGINT)), daemon=True).start()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it runs in the background
try:
    test_tune.run(test_tune.randomize(test_tune.Small().eval()), test_tune.Path(sys.argv[3]))
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("after", [1.5, 3.0])
def test_ctrl_c_in_a_terminal_ends_it_at_once(tmp_path: Path, after: float) -> None:
    """The terminal interrupts the whole group of processes, workers included."""
    folders = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    command = [sys.executable, "-c", INTERRUPTED, *folders, str(tmp_path / "tuned.sqlite"), str(after)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=90, start_new_session=True, check=False)
    assert result.stdout == "interrupted\n", result.stderr


def _broken(kind: str) -> Any:
    """The generator of convolutions with two more configs in front of its last ones: both fast, both wrong."""

    def configs(shape: Any, filters: Any, isa: Any) -> list[Any]:
        good = CONV.configs(shape, filters, isa)
        return [good[0], replace(good[0], rows=good[0].rows + 100), *good[1:3]]

    def kernel(shape: Any, filters: Any, numbers: Any, isa: Any, symbols: Any, config: Any) -> Kernel:
        if config is None or config.rows < 100:
            return CONV.kernel(shape, filters, numbers, isa, symbols, config)
        if kind == "bits":
            wrong = replace(filters, bias=filters.bias + 1000)
            return replace(CONV.kernel(shape, wrong, numbers, isa, symbols, None), name="wrong")
        with function("crash") as (args, done):
            x = args.buffer("x", shape.flat().x.size, isa.storage)
            if shape.residual is not None:
                args.buffer("residual", shape.residual.size, isa.storage)
            y = args.buffer("y", shape.flat().y.size, isa.storage)
            T.buffer_store(y, x[T.int64(1 << 40)], [0])
        return Kernel("wrong", done.result)

    return replace(CONV, configs=configs, kernel=kernel)


@pytest.mark.parametrize(("kind", "reason"), [("bits", "other bits"), ("crash", "crashed")])
def test_a_wrong_candidate_is_left_out_however_fast(
    kind: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "CONV", _broken(kind))
    (tuned,) = run(randomize(nn.Conv2d(3, 24, 3, stride=2, padding=1).eval()), tmp_path / "tuned.sqlite")
    assert list(tuned.failed) == ["wrong"]
    assert reason in tuned.failed["wrong"]
    (entry,) = Database(tmp_path / "tuned.sqlite").entries()
    assert json.loads(entry.config).get("rows", 0) < 100


@pytest.mark.parametrize("gain", [1.02, 1.05])
def test_a_config_is_remembered_where_it_is_clearly_faster_than_the_default(
    gain: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "run_race", lambda *_: {0: (2.0, 1.0), 2: (2.0 / gain, gain)})
    model, path = randomize(nn.Conv2d(3, 24, 3, padding=1).eval()), tmp_path / "tuned.sqlite"
    (tuned,) = run(model, path)
    (entry,) = Database(path).entries()
    program = quantize(model, calibration=images()).program
    (workload,) = lower(program, get(NATIVE), emitters_for(get(NATIVE))).workloads
    if gain < 1.03:
        assert (json.loads(entry.config), entry.gain, entry.microseconds) == ({}, 1.0, 2e6)
        assert tuned.kernel == tuned.default
    else:
        assert json.loads(entry.config) == asdict(workload.configs()[2])
        assert (entry.gain, entry.microseconds) == (gain, 2e6 / gain)


def test_where_the_default_is_best_a_later_default_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "WORTH", math.inf)
    model, path = randomize(nn.Conv2d(3, 24, 3, padding=1).eval()), tmp_path / "tuned.sqlite"
    (tuned,) = run(model, path)

    def later(*given: Any) -> list[Any]:
        return CONV.configs(*given)[::-1]

    def kernel(shape: Any, filters: Any, numbers: Any, isa: Any, symbols: Any, config: Any) -> Kernel:
        return CONV.kernel(shape, filters, numbers, isa, symbols, config or later(shape, filters, isa)[0])

    monkeypatch.setattr(choose, "CONV", replace(CONV, configs=later, kernel=kernel))
    compiled = qcompile.compile(model, NATIVE, calibration=images(), tuning=Tuning(path, measure=False), threads=1)
    (used,) = {row.kernel for row in compiled.coverage if row.kernel.startswith("conv")}
    assert used != tuned.default
    assert run(model, path) == []


def test_a_candidate_that_is_slow_at_its_first_call_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four candidates the second is nearly as fast as the first; the last one that raced wins here."""

    def answers(candidate: Candidate, *others: Any) -> Any:
        first_calls = {"0": 1.0, "1": 1.9, "2": 2.1, "3": 50.0}
        return measure.answers(candidate, *others)[0], first_calls[candidate.library.stem]

    monkeypatch.setattr(tune, "answers", lambda *given: answers(*given))
    monkeypatch.setattr(tune, "run_race", lambda race, *_: {index: (1.0, 1.0 + index) for index in race.runners})
    run(randomize(nn.Conv2d(3, 24, 3, padding=1).eval()), tmp_path / "tuned.sqlite")
    (entry,) = Database(tmp_path / "tuned.sqlite").entries()
    assert entry.gain == 2.0


def test_kernels_that_cannot_be_measured_now_and_then_do_not_end_the_rest(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[bool] = []

    def best(*_: object) -> Tuned:
        if outcomes.pop(0):
            return Tuned("conv", "", "a", "a", 1.0, 1.0, 1, {})
        raise BuildError("a kernel could not be measured")

    monkeypatch.setattr(tune, "MOST_FAILURES", 2)
    monkeypatch.setattr(tune.Tuner, "best", best)
    outcomes[:] = [False, True, False, True]
    with pytest.warns(UserWarning, match="a kernel keeps its default"):
        assert len(run(model, tmp_path / "tuned.sqlite")) == 2
    outcomes[:] = [True, False, False, True]
    with pytest.raises(BuildError), pytest.warns(UserWarning, match="keeps its default"):
        run(model, tmp_path / "tuned.sqlite")
    assert outcomes == [True]


def test_what_was_found_before_an_interruption_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: nn.Module
) -> None:
    path = tmp_path / "tuned.sqlite"
    monkeypatch.setattr(tune, "MOST_CANDIDATES", 1)

    def interrupt(step: str, done: int, total: int | None) -> None:
        if done == 3:
            raise KeyboardInterrupt

    program = quantize(model, calibration=images()).program
    with pytest.raises(KeyboardInterrupt):
        tune.tune(program, get(NATIVE), Tuning(path), threads=1, progress=interrupt)
    assert len(Database(path).entries()) == 3
    assert len(run(model, path)) == 1


def test_blocks_of_a_matrix_unit_are_measured_where_there_is_one(model: nn.Module, tmp_path: Path) -> None:
    skip_unless_runnable("x86-amx")
    data, path = images(), tmp_path / "tuned.sqlite"
    compiled = qcompile.compile(model, "x86-amx", calibration=data, tuning=path, threads=1)
    entries = Database(path).entries()
    assert {entry.operator for entry in entries} == {"conv", "depthwise_dot", "matrix"}
    assert torch.equal(compiled(data[0]), compiled.reference(data[0]))


def test_an_entry_that_fits_no_kernel_counts_as_unknown(model: nn.Module, path: Path) -> None:
    """It is neither used nor kept."""
    database = Database(path)
    for entry in database.entries():
        database.add(replace(entry, config='{"rows": 1000, "evil": true}'))
    compiled = qcompile.compile(model, NATIVE, calibration=images(), tuning=Tuning(path, measure=False), threads=1)
    x = torch.randn(1, 3, 18, 18)
    assert torch.equal(compiled(x), compiled.reference(x))
    assert len(run(model, path)) == 4
    assert not any("evil" in entry.config for entry in database.entries())
    assert run(model, path) == []


def test_all_threads_are_those_of_the_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", "1")
    program = quantize(randomize(nn.Conv2d(3, 24, 3).eval()), calibration=images()).program
    tune.tune(program, get(NATIVE), Tuning(tmp_path / "tuned.sqlite"))
    assert [entry.threads for entry in Database(tmp_path / "tuned.sqlite").entries()] == [1]


def test_what_ships_counts_on_the_processor_that_was_measured(
    model: nn.Module, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, target = quantize(model, calibration=images()).program, get(NATIVE)

    def chosen() -> object:
        return tune.best_known(program, target, None, 2, None)

    monkeypatch.setattr(tune, "SHIPPED", path)
    assert len(Database(path).chosen(target, 2)) == 4
    assert chosen() == Database(path).chosen(target, 2)
    monkeypatch.setattr(tune, "processor", lambda: "another")
    assert chosen() == {}
