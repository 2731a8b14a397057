"""Tuning for GPUs, on the emulated one: candidates are held to the reference and race in processes that have it.

What it takes there says nothing of a GPU: these tests are about what is measured, and what becomes of it.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import cuda_emulator
import gpu_machine
import numpy as np
import pytest
import torch
from passing import randomize
from safetensors.numpy import save_file
from torch import Tensor, nn

import qcompile
from qcompile import device
from qcompile.errors import ConfigError, DeviceError
from qcompile.ir import Program
from qcompile.quantizer import quantize
from qcompile.targets import get, kernels, measure, tune
from qcompile.targets.build import linker
from qcompile.targets.cuda import compile as cuda
from qcompile.targets.cuda.convolution import TILES
from qcompile.targets.database import NO_THREADS, Database
from qcompile.targets.device_code import DeviceCode
from qcompile.targets.emitters import emitters_for
from qcompile.targets.function import Kernel
from qcompile.targets.lower import lower
from qcompile.targets.measure import Candidate, LocalGpu, build_candidate
from qcompile.targets.nvidia import SM_80
from qcompile.targets.places import where_to_measure
from qcompile.targets.trial import Rotation, Trial
from qcompile.targets.tune import Tuned
from qcompile.targets.workers import Workers
from qcompile.targets.workload import Workload
from qcompile.tuning import Tuning

TARGET = get("cuda-sm_80")
NAME = "emulated sm_80"
WRONG, FAILING = 1000, 1001  # shares of what stands for broken tiles


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This machine has a GPU: new processes find it, and code is compiled for it."""
    if reason := gpu_machine.unavailable():
        pytest.skip(f"code for GPUs cannot run here: {reason}")
    monkeypatch.setattr(tune, "cores", lambda: 1)  # a process takes longer to start than what it does here
    if not gpu_machine.REAL:
        folders = [str(cuda_emulator.ROOT), str(cuda_emulator.ROOT / "tests")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))
        monkeypatch.setenv("LD_LIBRARY_PATH", str(cuda_emulator.libraries()))
        monkeypatch.setenv("QCOMPILE_EMULATED_SM", "80")
        monkeypatch.setattr(device, "_gpu", lambda: (8, 0))
        monkeypatch.setattr(tune, "gpu_name", lambda: NAME)
    with gpu_machine.compiling():
        yield


class Small(nn.Module):
    """A first layer, and one that is deep enough for blocks to share its depth, with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(32, 32, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        y: Tensor = (self.deep(x) + x).relu()
        return y


def images() -> list[Tensor]:
    return [torch.randn(1, 3, 12, 12) for _ in range(2)]


def program_of(model: nn.Module, channels: int = 3) -> Program:
    data = [torch.randn(1, channels, 12, 12) for _ in range(2)]
    return quantize(randomize(model.eval()), calibration=data).program


def workloads_of(program: Program) -> list[Workload]:
    return lower(program, TARGET, emitters_for(TARGET)).workloads


def run(program: Program, path: Path) -> list[Tuned]:
    found: list[Tuned] = []
    tune.tune(program, TARGET, Tuning(path), report=found.append)
    return found


@pytest.mark.slow
def test_what_is_found_is_remembered_and_used_and_no_bit_changes(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: gpu_machine.GpuMachine
) -> None:
    monkeypatch.setattr(tune, "MOST_ON_GPU", 3)
    model, path = randomize(Small().eval()), tmp_path / "tuned.sqlite"
    data = images()
    program = quantize(model, calibration=data).program
    tuned = run(program, path)
    assert [(found.candidates, found.failed) for found in tuned] == [(3, {}), (3, {})]
    assert run(program, path) == []
    database, workloads = Database(path), {workload.key: workload for workload in workloads_of(program)}
    entries = database.entries()
    assert {(e.operator, e.features, e.threads) for e in entries} == {("cuda_tiles", "x86_64: sm_80", NO_THREADS)}
    assert gpu_machine.REAL or {entry.processor for entry in entries} == {NAME}
    assert all(entry.gain >= 1 and entry.microseconds > 0 for entry in entries)
    expected = {}
    for entry in entries:  # whatever won: another one
        workload = workloads[entry.operator, entry.shape]
        other = workload.configs()[1]
        expected[workload.node.name] = workload.kernel(other).name
        database.add(replace(entry, config=json.dumps(asdict(other))))
    if not gpu_machine.REAL:
        monkeypatch.setattr(device, "_gpu", lambda: "has no GPU")  # in this process, where it would be run
    compiled = qcompile.compile(model, TARGET, calibration=data, tuning=Tuning(path, measure=False))
    used = {row.node: row.kernel for row in compiled.coverage if row.kind == "integer"}
    assert len(expected) == 2
    assert {node: used[node] for node in expected} == expected
    cases = [[x.numpy()] for x in (*data, 5 * torch.randn(1, 3, 12, 12))]
    for (x,), (got,) in zip(cases, gpu.run_all(compiled.artifact, cases), strict=True):
        np.testing.assert_array_equal(got, compiled.reference(x))


def _configs(*given: Any) -> list[Any]:
    """Those of tiles, and between the first two one that has wrong bits, and one with which the GPU fails."""
    first, second, *_ = TILES.configs(*given)
    return [first, replace(first, shares=WRONG), replace(first, shares=FAILING), second]


def _kernel(shape: Any, filters: Any, numbers: Any, gpu: Any, symbols: Any, config: Any) -> Kernel:
    if config is None or config.shares < WRONG:
        return TILES.kernel(shape, filters, numbers, gpu, symbols, config)
    if config.shares == WRONG:
        wrong = replace(filters, bias=filters.bias + 1000)
        return replace(TILES.kernel(shape, wrong, numbers, gpu, symbols, None), name="wrong")
    made = TILES.kernel(shape, filters, numbers, gpu, symbols, None)
    weight, *others = made.constants
    return replace(made, name="failing", constants=(weight[:16], *others))


@pytest.mark.slow
def test_a_wrong_candidate_is_left_out_and_spoils_no_other(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that had a kernel fail could not use its GPU any more."""
    broken = replace(TILES, configs=_configs, kernel=_kernel)
    monkeypatch.setattr(kernels, "CUDA", replace(kernels.CUDA, generator_for=lambda *_: broken))
    (tuned,) = run(program_of(nn.Conv2d(3, 40, 5, padding=1)), tmp_path / "tuned.sqlite")
    assert tuned.candidates == 4
    assert sorted(tuned.failed) == ["failing", "wrong"]
    assert tuned.failed["wrong"] == "other bits than the reference"
    (entry,) = Database(tmp_path / "tuned.sqlite").entries()
    assert json.loads(entry.config).get("shares", 1) < WRONG


def launches(candidate: Candidate, inputs: list[np.ndarray]) -> list[tuple[int, int]]:
    """How many graphs were launched, and kernels captured, by three runs of "main" and then by measuring three more
    after one to warm up."""
    counter = ctypes.CDLL("libcudart.so.13").qcompile_emulated_counter
    counter.restype, counter.argtypes = ctypes.c_int64, [ctypes.c_char_p]

    def counts() -> np.ndarray:
        return np.array([counter(name) for name in (b"graph_launches", b"captured_launches")])

    with measure._device(NO_THREADS, LocalGpu(), 100.0) as gpu:
        machine, constants = gpu.load(candidate)
        given = [*map(gpu.tensor, inputs), *constants]
        found = [counts()]
        for _ in range(3):
            machine["main"](*given)
            found.append(counts())
        gpu.seconds(machine, "main", 3, given)
        steps = [after - before for before, after in pairwise([*found, counts()])]
        return [(int(graphs), int(captured)) for graphs, captured in steps]


@pytest.mark.skipif(gpu_machine.REAL, reason="only the emulated GPU counts what it is given")
def test_all_calls_of_a_run_are_one_graph(here: None, tmp_path: Path) -> None:
    """Also those of kernels that are lent memory; and what is measured is launches of the graph."""
    program = program_of(nn.Conv2d(32, 32, 5, padding=2), 32)
    (workload,) = workloads_of(program)
    trial = Trial(program, workload, Rotation(1 << 20, 5))
    assert trial.calls == 5
    made = [workload.kernel(next(c for c in workload.configs() if c.shares == shares)) for shares in (1, 2)]
    assert [kernel.scratch > 0 for kernel in made] == [False, True]
    entries = [entry for kernel in made for entry, _ in kernel.launches]
    code = tmp_path / "code"
    code.write_bytes(cuda.compiled(entries, SM_80))
    device_code = ((code, cuda.information_of(entries)),)
    with Workers(1, 100.0) as workers:
        for kernel in made:
            constants, library = tmp_path / f"{kernel.name}.safetensors", tmp_path / f"{kernel.name}.so"
            save_file(trial.constants(kernel), constants)
            build_candidate(trial.module(kernel), TARGET.tvm, linker(TARGET), library)
            candidate = Candidate(library, constants, tuple(kernel.pools()), trial.calls, device_code)
            found = workers.submit(launches, candidate, trial.inputs[0]).result()
            assert found == [(0, 5), (1, 0), (1, 0), (4, 0)]


def test_a_tile_that_several_layers_call_is_compiled_once(here: None, tmp_path: Path) -> None:
    program = program_of(nn.Sequential(nn.Conv2d(32, 32, 3), nn.Conv2d(32, 48, 3), nn.Conv2d(48, 32, 1)), 32)
    made = [[workload.kernel(config) for config in workload.configs()] for workload in workloads_of(program)]
    parts: list[int] = []

    class Counting(Workers):
        def submit(self, function: Any, *arguments: Any, timeout: float | None = None) -> Future[Any]:
            parts.append(len(arguments[1]))
            return super().submit(len, arguments[1])

    with Counting(1, 100.0) as workers:
        code = DeviceCode(TARGET.isa, workers, 4, tmp_path)
        for kernels_of_one in made:
            code.begin(kernels_of_one)
    entries = {entry for kernels_of_one in made for kernel in kernels_of_one for entry, _ in kernel.launches}
    assert sum(parts) == len(entries) < sum(map(len, made)) / 2
    assert len(parts) == 4  # at the first layer


def test_the_calls_of_a_kernel_take_turns_among_as_many_weights_as_the_network_has() -> None:
    rotation = tune._bench(LocalGpu(), NO_THREADS, 25 << 20).rotation
    assert [rotation.copies(nbytes) for nbytes in (1 << 12, 1 << 21, 1 << 26)] == [tune.MOST_LAUNCHES, 14, 2]
    assert tune._bench(LocalGpu(), NO_THREADS, 1 << 30).rotation.copies(1 << 22) == 18


def test_what_cannot_be_measured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_gpu", lambda: "has no NVIDIA GPU")
    for place, reason in (("gpu@127.0.0.1:9", r"through RPC(.|\n)*that machine itself"), (None, "has no NVIDIA GPU")):
        with pytest.raises(DeviceError, match=reason):
            where_to_measure(TARGET, Tuning("tuned.sqlite", device=place), None)
    monkeypatch.setattr(device, "_gpu", lambda: (7, 5))
    with pytest.raises(DeviceError, match=r"sm_75, not sm_80(.|\n)*a machine that can run it"):
        where_to_measure(TARGET, Tuning("tuned.sqlite"), None)
    monkeypatch.setattr(device, "_gpu", lambda: (9, 0))
    assert where_to_measure(TARGET, Tuning("tuned.sqlite"), None) == LocalGpu()
    with pytest.raises(ConfigError, match="no threads to choose"):
        where_to_measure(TARGET, Tuning("tuned.sqlite"), 1)


def test_a_row_that_fits_no_kernel_counts_as_unknown() -> None:
    (depthwise,) = workloads_of(program_of(nn.Conv2d(32, 32, 3, groups=32), 32))
    assert depthwise.chosen({depthwise.key: {"tall": 64}}) is None
    assert depthwise.settled({})
