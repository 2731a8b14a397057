"""Running an artifact: right answers, clear refusals, and nothing loaded that a device does not need."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import arm
import numpy as np
import pytest
import tiny
import torch

from qcompile import device, runtime
from qcompile.artifact import Artifact
from qcompile.errors import ArtifactError, ConfigError, DeviceError, InputError
from qcompile.runtime import Model, load

pytestmark = pytest.mark.skipif(device.machine()[0] != "x86_64", reason="the tiny model is built for x86-64")


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return tiny.artifact("x86-avx2")


@pytest.fixture(scope="module")
def model(artifact: Artifact) -> Model:
    return Model(artifact)


@pytest.fixture
def saved(artifact: Artifact, tmp_path: Path) -> Path:
    artifact.save(tmp_path / "model.qcm")
    return tmp_path / "model.qcm"


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_saved_model_gives_the_right_answers_at_every_batch(saved: Path, batch: int) -> None:
    x = tiny.random_input(batch)
    result = load(saved)(x)
    np.testing.assert_array_equal(result["y"], tiny.expected(x))
    np.testing.assert_array_equal(result["rest"][0], x)


def test_outputs_nest_as_the_model_says(model: Model) -> None:
    result = model(tiny.random_input(2))
    assert list(result) == ["y", "rest"]
    assert isinstance(result["rest"], tuple)


def test_torch_tensors_in_give_torch_tensors_out(model: Model) -> None:
    x = tiny.random_input(2)
    result = model(torch.from_numpy(x))
    assert isinstance(result["y"], torch.Tensor)
    np.testing.assert_array_equal(result["y"].numpy(), tiny.expected(x))


def _strided(x: np.ndarray) -> np.ndarray:
    return np.repeat(x, 2, axis=1)[:, ::2]


def _read_only(x: np.ndarray) -> np.ndarray:
    y = x.copy()
    y.flags.writeable = False
    return y


def _at_odd_address(x: np.ndarray) -> np.ndarray:
    raw = np.empty(x.size + 64, np.int8)
    begin = -raw.ctypes.data % 64 + 1
    y = raw[begin : begin + x.size].reshape(x.shape)
    y[...] = x
    return y


@pytest.mark.parametrize("form", [_strided, _read_only, _at_odd_address, np.asfortranarray])
def test_how_an_input_lies_in_memory_does_not_matter(model: Model, form: Any) -> None:
    for seed in range(3):
        x = tiny.random_input(4, seed)
        np.testing.assert_array_equal(model(form(x))["y"], tiny.expected(x))


def test_outputs_belong_to_the_caller(model: Model) -> None:
    """The model returns its input and a constant as they are; the caller may write into both."""
    x = tiny.random_input(2)
    first = model(x)
    kept = first["y"].copy()
    first["rest"][0][...] = 1
    first["rest"][1][...] = 1
    second = model(tiny.random_input(2, seed=1))
    np.testing.assert_array_equal(x, tiny.random_input(2))
    np.testing.assert_array_equal(first["y"], kept)
    np.testing.assert_array_equal(second["rest"][1], tiny.BIAS)
    np.testing.assert_array_equal(second["y"], tiny.expected(tiny.random_input(2, seed=1)))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "takes 1 inputs, and 0 were given"),
        ((tiny.random_input(1), tiny.random_input(1)), "takes 1 inputs, and 2 were given"),
        ((tiny.random_input(1).astype(np.float32),), "dtype float32, and the model takes int8"),
        ((tiny.random_input(1).astype(np.uint8),), "dtype uint8"),
        ((tiny.random_input(1)[0],), r"shape \(64,\)"),
        ((tiny.random_input(1)[:, :63],), r"shape \(1, 63\)"),
        ((tiny.random_input(9),), "out of bounds"),
        ((np.empty((0, 64), np.int8),), "out of bounds"),
        ((torch.zeros(1, 64, dtype=torch.int8), tiny.random_input(1)), "must all be tensors"),
        (("text",), "dtype"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(model: Model, inputs: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model(*inputs)


def test_equal_symbols_are_equal_sizes(artifact: Artifact) -> None:
    two = artifact._replace(inputs=(*artifact.inputs, artifact.inputs[0]._replace(name="x2")))
    with pytest.raises(InputError, match="batch is 3 here and 2 in input 'x'"):
        Model(two)(tiny.random_input(2), tiny.random_input(3))


def test_the_selftest_passes_and_notices_one_wrong_bit(artifact: Artifact, model: Model) -> None:
    assert model.selftest() == runtime.Selftest(cases=1, elements=3 * 32 + 3 * 64 + 32, wrong=0)
    golden = artifact.golden[0]
    wrong = golden.outputs[0].copy()
    wrong[1, 2] ^= 1
    changed = artifact._replace(golden=(golden._replace(outputs=(wrong, *golden.outputs[1:])),))
    assert Model(changed).selftest().wrong == 1
    assert not Model(changed).selftest().passed


@pytest.mark.parametrize(
    ("got", "want", "tolerance", "wrong"),
    [
        ([1.0, 2.0, -0.0], [1.0, 2.0, 0.0], 0.0, 1),  # a signed zero is another bit pattern
        ([np.nan, 1.0], [np.nan, 1.0], 0.0, 0),
        ([1.0, 2.02], [1.0, 2.0], 0.02, 0),
        ([1.0, 2.06], [1.0, 2.0], 0.02, 1),
        ([np.nan, 2.0], [1.0, 2.0], 0.02, 1),
        ([np.nan, np.inf], [np.nan, np.inf], 0.02, 0),
        ([1.0], [1.0, 2.0], 0.0, 2),
    ],
)
def test_differences_are_counted(got: list[float], want: list[float], tolerance: float, wrong: int) -> None:
    assert runtime.differences(np.array(got, np.float32), np.array(want, np.float32), tolerance) == wrong


def test_a_model_without_golden_vectors_does_not_pass_its_selftest(artifact: Artifact) -> None:
    result = Model(artifact._replace(golden=())).selftest()
    assert not result.passed


def test_threads_can_differ_between_models_of_one_process(artifact: Artifact) -> None:
    code = """
import sys
from qcompile import ffi
from qcompile.errors import ArtifactError, ConfigError
from qcompile.runtime import load
one, two, every = (load(sys.argv[1], threads=n) for n in (1, 2, None))
for model, count in ((one, 1), (two, 2), (every, 2), (one, 1), (every, 2)):
    assert model.selftest().passed
    assert ffi.call(ffi.function("runtime.NumThreads")) == count
try:
    load(sys.argv[1], threads=3)
except ConfigError as error:
    assert "pool has 2" in str(error)
else:
    raise AssertionError
assert one.selftest().passed and ffi.call(ffi.function("runtime.NumThreads")) == 1
"""
    _python(artifact, code, {"TVM_NUM_THREADS": "2"})


def test_an_empty_variable_means_all_cores(artifact: Artifact) -> None:
    code = """
import sys
from qcompile import device, ffi
from qcompile.runtime import load
assert load(sys.argv[1]).selftest().passed
print(ffi.call(ffi.function("runtime.NumThreads")) == device.cores())
"""
    assert _python(artifact, code, {"TVM_NUM_THREADS": ""}) == "True\n"


@pytest.mark.parametrize("text", ["all", "0", "-1", "1.5"])
def test_a_variable_that_is_no_number_of_threads_is_named(text: str, artifact: Artifact) -> None:
    code = """
import sys
from qcompile.errors import ConfigError
from qcompile.runtime import load
try:
    load(sys.argv[1]).selftest()
except ConfigError as error:
    print(error)
"""
    said = _python(artifact, code, {"TVM_NUM_THREADS": text})
    assert f"it is '{text}'" in said
    assert "TVM_NUM_THREADS" in said


@pytest.mark.parametrize("threads", [0, "2", 1.5, True], ids=repr)
def test_a_number_of_threads_that_is_none_is_refused(artifact: Artifact, threads: Any) -> None:
    with pytest.raises(ConfigError, match=f"threads is {threads!r}"):
        Model(artifact, threads=threads)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_model_that_is_pickled_or_copied_says_what_to_do(model: Model, copied: Callable[[Model], Any]) -> None:
    with pytest.raises(ArtifactError, match=r"cannot be pickled or copied(.|\n)*save\(path\)(.|\n)*load\(path\)"):
        copied(model)


def test_calls_from_many_threads_give_the_same_answers(model: Model) -> None:
    def work(seed: int) -> bool:
        x = tiny.random_input(1 + seed % 8, seed)
        return all(np.array_equal(model(x)["y"], tiny.expected(x)) for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(16)))


def _python(artifact: Artifact, code: str, environment: dict[str, str] | None = None) -> str:
    """Run `code` in a fresh process with the path of the saved artifact; returns what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.qcm")
        artifact.save(path)
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)],
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_deployed_process_loads_neither_torch_nor_the_compiler(artifact: Artifact) -> None:
    """Nor anything else that takes longer to import than the first answer takes."""
    code = """
import sys
import qcompile
model = qcompile.load(sys.argv[1])
assert model.selftest().passed
idle = {"torch", "tvm", "tvm_ffi", "typing_extensions", "rich", "zipfile", "importlib.metadata", "concurrent.futures"}
assert not idle & set(sys.modules), idle & set(sys.modules)
assert "libtvm_compiler" not in open("/proc/self/maps").read()
assert "libtvm_runtime" in open("/proc/self/maps").read()
import torch  # still importable, and then served
assert isinstance(model(torch.zeros(1, 64, dtype=torch.int8))["y"], torch.Tensor)
"""
    _python(artifact, code)


def test_the_module_prints_selftest_and_latency(saved: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qcompile.runtime", str(saved)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "passed: 0 of 320 elements wrong in 1 cases" in done.stdout
    assert "ms (median" in done.stdout


def test_the_best_variant_of_this_machine_is_taken(artifact: Artifact) -> None:
    known = artifact.variants[0]
    worse = known._replace(name="worse", rank=-1)
    better = known._replace(name="better", rank=9)
    other = known._replace(name="other", rank=99, machine="aarch64")
    unmet = known._replace(name="unmet", rank=99, features=("avx2", "no-such-feature"))
    fat = artifact._replace(variants=(worse, better, other, unmet))
    assert Model(fat).target == "better"


def test_another_processor_is_refused_before_any_code_is_loaded(artifact: Artifact) -> None:
    """The library is no library at all: loading it would fail in another way."""
    broken = artifact.variants[0]._replace(library=b"not a library")
    lacking = broken._replace(name="avx9000", features=("avx2", "avx9000"))
    foreign = broken._replace(name="arm64-neon", machine="aarch64", features=("asimd",))
    with pytest.raises(DeviceError, match="no machine code that this x86_64 machine can run") as caught:
        Model(artifact._replace(variants=(lacking, foreign)))
    assert "for avx9000 this machine lacks avx9000" in str(caught.value)
    assert "for arm64-neon this machine is x86_64, not aarch64" in str(caught.value)
    with pytest.raises(DeviceError, match="cannot be loaded"):
        Model(artifact._replace(variants=(broken,)))


def test_an_arm_processor_gives_the_same_bits(arm_machine: arm.ArmMachine) -> None:
    fat = tiny.artifact("x86-avx2", "arm64-dotprod")
    cases = [(tiny.random_input(batch, batch),) for batch in (1, 3, 8)]
    for (x,), outputs in zip(cases, arm_machine.run_all(fat, cases), strict=True):
        np.testing.assert_array_equal(outputs[0], tiny.expected(x))
        np.testing.assert_array_equal(outputs[1], x)
    assert arm_machine.selftest(fat).passed
    with pytest.raises(InputError, match="out of bounds"):
        arm_machine.run(fat, tiny.random_input(9))


def test_the_module_runs_on_arm(arm_machine: arm.ArmMachine, tmp_path: Path) -> None:
    tiny.artifact("arm64-dotprod").save(tmp_path / "model.qcm")
    done = arm.run("-m", "qcompile.runtime", str(tmp_path / "model.qcm"))
    assert done.returncode == 0, done.stderr
    assert "passed: 0 of 320 elements wrong" in done.stdout


def test_an_arm_processor_without_dot_product_refuses(arm_machine: arm.ArmMachine, tmp_path: Path) -> None:
    tiny.artifact("arm64-dotprod").save(tmp_path / "model.qcm")
    done = arm.run("-m", "qcompile.runtime", str(tmp_path / "model.qcm"), cpu="cortex-a72")
    assert done.returncode == 1
    assert "this machine lacks asimddp" in done.stderr
    assert "Traceback" not in done.stderr
