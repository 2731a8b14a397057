"""Models run on a GPU, an emulated one, as they do on a processor: from the file to the kernels, bit for bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cuda_emulator
import numpy as np
import pytest
import tiny
import tiny_gpu

from qcompile import device
from qcompile.artifact import Artifact
from qcompile.errors import ConfigError, DeviceError
from qcompile.runtime import Model

pytestmark = [
    pytest.mark.skipif(device.machine()[0] != "x86_64", reason="the tiny model is built for x86-64"),
    pytest.mark.skipif(cuda_emulator.available() is not None, reason=str(cuda_emulator.available())),
]
TESTS = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(Path(__file__).parent))))
PRELUDE = """
import ctypes, sys
import numpy as np
import qcompile
from qcompile.errors import ConfigError, DeviceError, InputError
counts = ctypes.CDLL("libcudart.so.13")
counts.qcompile_emulated_counter.restype = ctypes.c_int64
def counter(name): return counts.qcompile_emulated_counter(name.encode())
path = sys.argv[1]
"""


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return tiny_gpu.artifact()


@pytest.fixture(scope="module")
def chain() -> Artifact:
    return tiny_gpu.chain()


def _python(artifact: Artifact, code: str, **options: str) -> str:
    return tiny_gpu.python(artifact, PRELUDE + code, **options)


def test_a_deployed_model_gives_the_right_bits(artifact: Artifact) -> None:
    code = """
before = counter("allocations")
assert before == 0
model = qcompile.load(path)
assert model.target == "cuda-sm_80"
assert [model.selftest() for _ in range(3)] == [(1, 320, 0)] * 3
assert not {"torch", "tvm", "tvm_ffi", "concurrent.futures"} & set(sys.modules)
assert "libtvm_compiler" not in open("/proc/self/maps").read()
"""
    _python(artifact, code)


def test_weights_are_copied_once_and_inputs_to_where_those_of_their_shape_were(artifact: Artifact) -> None:
    code = """
model = qcompile.load(path)
x = model.artifact.golden[0].inputs[0]
assert counter("host_to_device") == 2
model(x)
held = counter("allocations")
for _ in range(5):
    model(x)
assert counter("allocations") == held
assert counter("host_to_device") == 2 + 6
for size in range(1, 9):
    assert (model(np.resize(x, (size, 64)))["rest"][0] == np.resize(x, (size, 64))).all()
held = counter("allocations")
for size in range(1, 9):
    model(np.resize(x, (size, 64)))
assert counter("allocations") == held
"""
    _python(artifact, code)


def test_outputs_belong_to_the_caller_and_inputs_may_lie_in_any_way(artifact: Artifact) -> None:
    code = """
model = qcompile.load(path)
x = model.artifact.golden[0].inputs[0]
y, z, b = model.flat(x)
kept = y.copy(), z.copy(), b.copy()
for forms in (np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2], x[::-1][::-1]):
    for got, want in zip(model.flat(forms), kept):
        np.testing.assert_array_equal(got, want)
        got[...] = 7
for got, want in zip((y, z, b), kept):
    np.testing.assert_array_equal(got, want)
assert model.selftest().passed
for wrong in ((x.astype(np.int16),), (x[:, 1:],), (x, x)):
    try:
        model(*wrong)
    except InputError:
        continue
    raise AssertionError
"""
    _python(artifact, code)


def test_kernels_between_input_and_output_are_one_graph(chain: Artifact) -> None:
    code = """
model = qcompile.load(path)
x = model.artifact.golden[0].inputs[0]
for call in range(4):
    assert model.selftest().passed
    assert counter("captured_launches") == 2
    assert counter("graph_launches") == call
"""
    _python(chain, code)


def test_calls_from_threads_give_the_same_answers(artifact: Artifact, chain: Artifact) -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
models = [qcompile.load(path) for _ in range(2)]
with ThreadPoolExecutor(4) as pool:
    assert all(pool.map(lambda i: models[i % 2].selftest().passed, range(24)))
assert all(model.selftest().passed for model in models)
"""
    _python(artifact, code)
    _python(chain, code)


def test_a_process_forked_after_loading_is_told_so(artifact: Artifact) -> None:
    code = """
import os
model = qcompile.load(path)
child = os.fork()
if child == 0:
    try:
        model.selftest()
    except DeviceError as error:
        os._exit(0 if "forked" in str(error) else 1)
    os._exit(2)
assert os.waitpid(child, 0)[1] == 0
assert model.selftest().passed
"""
    _python(artifact, code)


TORCH = """
import fake_torch
torch = fake_torch.stand_in()
model = qcompile.load(path)
x = model.artifact.golden[0].inputs[0]
wanted = [array for array in model.artifact.golden[0].outputs]
"""


def test_tensors_on_the_gpu_are_used_where_they_lie(artifact: Artifact) -> None:
    code = """
given = torch.on_gpu(x)
copied = counter("host_to_device"), counter("device_to_host")
result = model(given)
assert fake_torch.copies == 2  # of the input and of the constant, which are not the caller's; by way of the host
assert (counter("host_to_device"), counter("device_to_host")) == (copied[0] + 2, copied[1] + 2)
y, z, b = result["y"], *result["rest"]
assert [t.device for t in (y, z, b)] == ["cuda:0"] * 3
assert z.data_ptr() != given.data_ptr()
for got, want in zip((y, z, b), wanted):
    np.testing.assert_array_equal(got.cpu(), want)
kept = [model(given)["y"] for _ in range(5)]
assert len({t.data_ptr() for t in kept}) == 5
assert all((t.cpu() == wanted[0]).all() for t in kept)
"""
    _python(artifact, TORCH + code, PYTHONPATH=TESTS)


def test_calls_on_other_streams_come_one_after_another(chain: Artifact) -> None:
    code = """
given = torch.on_gpu(x)
for call in range(3):
    for stream in (lambda: torch.use_stream(0), torch.use_new_stream, torch.use_new_stream):
        stream()
        np.testing.assert_array_equal(model(given).cpu(), wanted[0])
        np.testing.assert_array_equal(model(x), wanted[0])
assert counter("captured_launches") == 2
assert counter("graph_launches") == 17
"""
    _python(chain, TORCH + code, PYTHONPATH=TESTS)


def test_a_stream_may_still_read_an_output_that_was_dropped(chain: Artifact) -> None:
    code = """
given, other = torch.on_gpu(x), torch.on_gpu(x[::-1] + 1)
first = torch.use_new_stream()
y = model(given)
second = torch.use_new_stream()
model(other)
torch.use_stream(first)
read, place = y.clone_later(), y.data_ptr()
del y
torch.use_stream(second)
z = model(other)
assert z.data_ptr() == place
assert not np.array_equal(z.cpu(), wanted[0])
torch.use_stream(first)
np.testing.assert_array_equal(read.cpu(), wanted[0])
"""
    _python(chain, TORCH + code, PYTHONPATH=TESTS)


def test_a_call_is_not_recorded_in_a_graph_of_pytorchs(chain: Artifact) -> None:
    code = """
import pytest
given = torch.on_gpu(x)
model(given)
fake_torch._capturing = True
with pytest.raises(qcompile.errors.InputError, match="would be recorded in a CUDA graph"):
    model(given)
"""
    _python(chain, TORCH + code, PYTHONPATH=TESTS)


def test_tensors_as_kernels_cannot_read_them_are_copied_on_the_gpu(artifact: Artifact) -> None:
    code = """
model(torch.on_gpu(x))
before = fake_torch.copies
np.testing.assert_array_equal(model(torch.on_gpu(x, skew=4))["y"].cpu(), wanted[0])
assert fake_torch.copies == before + 3
"""
    _python(artifact, TORCH + code, PYTHONPATH=TESTS)


def test_tensors_on_the_processor_give_tensors_there(artifact: Artifact) -> None:
    code = """
result = model(torch.from_numpy(x))
assert result["y"].device == "cpu"
np.testing.assert_array_equal(result["y"].numpy(), wanted[0])
"""
    _python(artifact, TORCH + code, PYTHONPATH=TESTS)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("torch.on_gpu(x), torch.from_numpy(x)", "on different devices: cpu, cuda:0"),
        ("torch.on_gpu(x), x", "on different devices: cuda:0, no tensor of torch's"),
        ("torch.on_gpu(x, device='cuda:1')", "on different devices: cuda:1"),
        ("torch.on_gpu(x[:, 1:])", r"shape (3, 63), and the model takes int8 (batch 1..8, 64)"),
        ("torch.on_gpu(x.astype(np.float32))", "dtype float32, and the model takes int8"),
        ("torch.on_gpu(x), torch.on_gpu(x)", "takes 1 inputs, and 2 were given"),
        ("torch.on_gpu(x, layout=torch.sparse_coo)", "layout torch.sparse_coo"),
        ("torch.Tensor(x, device='meta')", "must all be tensors on the CPU"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(inputs: str, message: str, artifact: Artifact) -> None:
    code = f"""
try:
    model({inputs})
except InputError as error:
    print(error)
"""
    assert message in _python(artifact, TORCH + code, PYTHONPATH=TESTS)


def test_a_gpu_has_no_threads(artifact: Artifact) -> None:
    code = """
try:
    qcompile.load(path, threads=2)
except ConfigError as error:
    print(error)
"""
    said = _python(artifact, code)
    assert "threads is 2, and cuda-sm_80 is a GPU" in said
    assert "leave threads out" in said


@pytest.mark.parametrize(("capability", "target"), [("75", "x86-avx2"), ("80", "cuda-sm_80"), ("90", "cuda-sm_90")])
def test_of_several_variants_the_gpu_decides(capability: str, target: str, artifact: Artifact) -> None:
    gpu = artifact.variants[0]
    later = gpu._replace(name="cuda-sm_90", features=("sm_90",), rank=101)
    fat = artifact._replace(variants=(*tiny.artifact("x86-avx2").variants, gpu, later))
    code = """
model = qcompile.load(path)
print(model.target, model.selftest().passed)
"""
    assert _python(fat, code, capability=capability) == f"{target} True\n"


def test_an_older_gpu_is_refused_before_anything_is_loaded(artifact: Artifact) -> None:
    code = """
try:
    qcompile.load(path)
except DeviceError as error:
    print(error)
assert "libtvm_runtime_cuda" not in open("/proc/self/maps").read()
"""
    said = _python(artifact, code, capability="75")
    assert "for cuda-sm_80 this machine has a GPU that is sm_75, not sm_80 or later" in said


def test_without_cudas_runtime_library_the_remedy_is_said(artifact: Artifact) -> None:
    """The driver is there, and the package is not."""
    code = """
from qcompile import cuda
cuda._RUNTIME = "libcudart.so.none"
try:
    qcompile.load(path)
except DeviceError as error:
    print(error)
"""
    said = _python(artifact, code)
    assert "needs CUDA's runtime library" in said
    assert "pip install nvidia-cuda-runtime" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device_code": b"no code for a GPU"}, "the GPU failed"),
        ({"device_kernels": "no table"}, "the GPU failed"),
        ({"device_kernels": '{"func_info": {}}'}, "Cannot find function matmul"),
        ({"library": b"no library"}, "the machine code cannot be loaded"),
    ],
)
def test_a_part_that_is_no_good_is_a_clear_error(change: dict[str, Any], message: str, artifact: Artifact) -> None:
    code = """
try:
    qcompile.load(path).selftest()
except DeviceError as error:
    print(error)
"""
    broken = artifact._replace(variants=(artifact.variants[0]._replace(**change),))
    assert message in _python(broken, code)


def test_without_a_gpu_the_model_says_what_is_missing(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_gpu", lambda: "has no NVIDIA GPU")
    with pytest.raises(DeviceError, match="for cuda-sm_80 this machine has no NVIDIA GPU"):
        Model(artifact)
    with pytest.raises(ConfigError, match="threads is 0"):
        Model(artifact, threads=0)


def test_the_module_prints_selftest_and_latency(artifact: Artifact) -> None:
    code = """
from qcompile.runtime import main
sys.exit(main([path]))
"""
    assert "passed: 0 of 320 elements wrong in 1 cases" in _python(artifact, code)
    np.testing.assert_array_equal(artifact.golden[0].outputs[2], tiny.BIAS)
