"""The CPU that runs CUDA kernels in tests does what the hardware does, and finds what it must not be asked to do."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import cuda_emulator
import numpy as np
import pytest
from cuda_emulator import ROOT, compile_device

pytestmark = pytest.mark.skipif(cuda_emulator.available() is not None, reason=str(cuda_emulator.available()))

SOURCE = (ROOT / "tests/cuda/emulator_tests.cu").read_text()
KERNELS = re.findall(r"__global__ void (\w+)", SOURCE)
LANES = np.arange(32)


@pytest.fixture(scope="module")
def library() -> bytes:
    return compile_device(SOURCE, KERNELS)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def test_matrices_are_multiplied_and_added(library: bytes, random: np.random.Generator) -> None:
    a = random.integers(-128, 128, (16, 32), dtype=np.int8)
    b = random.integers(-128, 128, (32, 8), dtype=np.int8)
    c = random.integers(-(2**31), 2**31, (16, 8), dtype=np.int32)
    g, t = LANES // 4, LANES % 4
    of_a = np.stack([a.view(np.int32)[g + i % 2 * 8, t + i // 2 * 4] for i in range(4)], axis=1)
    of_b = np.stack([np.ascontiguousarray(b.T).view(np.int32)[g, t + i * 4] for i in range(2)], axis=1)
    sums = np.stack([c[g + i // 2 * 8, 2 * t + i % 2] for i in range(4)], axis=1)
    cuda_emulator.run(library, "multiply_matrices", (1,), 32, 0, [of_a, of_b, sums])
    expected = c + a.astype(np.int32) @ b.astype(np.int32)  # wraps around
    assert np.array_equal(sums, np.stack([expected[g + i // 2 * 8, 2 * t + i % 2] for i in range(4)], axis=1))


def test_lanes_read_matrices_whose_rows_lie_anywhere(library: bytes, random: np.random.Generator) -> None:
    memory = random.integers(0, 256, 1024, dtype=np.uint8)
    rows = (random.integers(0, 64, 32) * 16).astype(np.int32)
    words = np.zeros((32, 4), np.uint32)
    cuda_emulator.run(library, "read_matrices", (1,), 32, 1024, [memory, rows, words])
    for lane in LANES:
        for matrix in range(4):
            start = rows[matrix * 8 + lane // 4] + lane % 4 * 4
            assert words[lane, matrix] == memory[start : start + 4].view(np.uint32)[0]


def test_bytes_of_words(library: bytes, random: np.random.Generator) -> None:
    a, b = random.integers(0, 2**32, (2, 256), dtype=np.uint32)
    dots, larger, chosen = np.zeros(256, np.int32), np.zeros(256, np.uint32), np.zeros(256, np.uint32)
    cuda_emulator.run(library, "bytes", (4,), 64, 0, [a, b, dots, larger, chosen])
    each_a, each_b = (x.view(np.int8).reshape(256, 4) for x in (a, b))
    assert np.array_equal(dots, a.view(np.int32) + (each_a.astype(np.int32) * each_b).sum(axis=1, dtype=np.int32))
    assert np.array_equal(larger, np.maximum(each_a, each_b).view(np.uint32)[:, 0])
    both = np.concatenate([each_a, each_b], axis=1)
    assert np.array_equal(chosen, np.ascontiguousarray(both[:, [0, 5, 2, 7]]).view(np.uint32)[:, 0])


def test_numbers_are_rounded_once(library: bytes, random: np.random.Generator) -> None:
    a, b = (random.standard_normal((2, 256)) * 1000).astype(np.float32)
    a[:12] = [0.5, 1.5, -2.5, np.nan, np.inf, -np.inf, 2.0**31, -(2.0**31), 2.0**31 - 128, -0.5, 1 + 2.0**-23, 3e9]
    b[10] = -1 - 2.0**-22
    product, total, back = np.zeros((3, 256), np.float32)
    rounded = np.zeros(256, np.int32)
    cuda_emulator.run(library, "numbers", (8,), 32, 0, [a, b, product, total, rounded, back])
    assert np.array_equal(product, a * b, equal_nan=True)
    # A product of two float32 is exact in longdouble, and so are these sums.
    exact = (a.astype(np.longdouble) * b + b).astype(np.float32)
    assert np.array_equal(total, exact, equal_nan=True)
    assert not np.array_equal(total, a * b + b, equal_nan=True)
    finite = np.nan_to_num(np.rint(a.astype(np.float64)), nan=0.0)
    assert np.array_equal(rounded, np.clip(finite, -(2**31), 2**31 - 1).astype(np.int32))
    assert np.array_equal(back, rounded.astype(np.float32))


def test_lanes_exchange_values(library: bytes, random: np.random.Generator) -> None:
    values = random.integers(-(2**31), 2**31, 96, dtype=np.int32)
    masks = random.integers(0, 32, 50, dtype=np.int32)
    expected, threads = values.copy(), np.arange(96, dtype=np.int32)
    for mask in masks:
        expected = expected[threads ^ mask] + threads
    cuda_emulator.run(library, "exchange_all", (1,), 96, 0, [values, masks, 50])
    assert np.array_equal(values, expected)


@pytest.mark.parametrize("threads", [64, 256, 1024])
def test_a_barrier_orders_threads_and_without_one_sums_are_wrong(
    library: bytes, random: np.random.Generator, threads: int
) -> None:
    values = random.integers(-(2**24), 2**24, (16, threads), dtype=np.int32)
    total = np.zeros(16, np.int32)
    cuda_emulator.run(library, "reduce", (16,), threads, threads * 4, [values, total, 1])
    assert np.array_equal(total, values.sum(axis=1, dtype=np.int32))
    cuda_emulator.run(library, "reduce", (16,), threads, threads * 4, [values, total, 0])
    assert not np.array_equal(total, values.sum(axis=1, dtype=np.int32))


@pytest.mark.parametrize("take", [0, 1])
@pytest.mark.parametrize("left", [0, 1, 2])
def test_copies_are_there_after_the_wait_for_their_group(
    library: bytes, random: np.random.Generator, left: int, take: int
) -> None:
    values = random.integers(-(2**31), 2**31, (2, 32, 4), dtype=np.int32)
    seen = np.zeros_like(values)
    cuda_emulator.run(library, "copy_groups", (1,), 32, 1024, [values, seen, left, take])
    assert np.array_equal(seen[0], values[0]) == (left < 2)
    assert np.array_equal(seen[1], values[1] * take) == (left < 1)


def test_every_block_runs_once_and_not_in_order(library: bytes) -> None:
    order, where = np.zeros(61, np.int32), np.zeros((60, 7), np.int32)
    cuda_emulator.run(library, "number_blocks", (5, 4, 3), 7, 0, [order, where])
    assert np.array_equal(where, np.repeat(np.arange(60), 7).reshape(60, 7))
    assert sorted(order[:60]) == list(range(60))
    assert list(order[:60]) != list(range(60))


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (0, r"barrier at .*: 63 threads wait, 1 have ended"),
        (1, r"exchange at .* waits for all 32 lanes of warp 0, but 1 have ended or wait elsewhere"),
        (2, r"barriers at .* and .* wait for each other"),
        (3, r"lanes of warp \d are in exchange at .* and in exchange at .*"),
        (4, r"load_matrices at .*: byte 8 is not at a multiple of 16"),
        (5, r"load_matrices at .*: byte 1024 of 1024 bytes of shared memory"),
        (6, r"copy_async at .*: 0x\w+ is not at a multiple of 8"),
        (7, r"a read or write at 0x\w+, where it may not"),
        (8, r"a write beyond an array"),
        (9, r"a read or write at 0x\w+, where it may not"),
        (10, r"kernels.cu:\d+: 0x\w+ is not aligned for its type"),
        (11, r"kernels.cu:\d+: index 4 is outside the array"),
        (12, r"permute at .*: order 0x8"),
    ],
)
def test_mistakes_are_found(library: bytes, which: int, message: str) -> None:
    memory = np.array([1, 2, 3, 4], np.int32)
    with pytest.raises(RuntimeError, match=message):
        cuda_emulator.run(library, "mistake", (1,), 64, 1024, [which, memory])
    # and nothing of the launch is left
    cuda_emulator.run(library, "mistake", (2,), 64, 1024, [100, memory])


def test_a_write_beyond_odd_shared_memory_is_found(library: bytes) -> None:
    with pytest.raises(RuntimeError, match="a write beyond the shared memory"):
        cuda_emulator.run(library, "mistake", (1,), 64, 1000, [13, np.ones(4, np.int32)])


def test_device_headers_find_the_emulated_instructions(tmp_path: Path) -> None:
    Path(tmp_path, "instructions.cuh").write_text("#error the real one\n")
    Path(tmp_path, "helper.cuh").write_text(
        '#pragma once\n#include "instructions.cuh"\ninline int one() { return 1; }\n'
    )
    source = '#include "helper.cuh"\nextern "C" __global__ void set(int* x) { x[qcompile::thread()] = one(); }\n'
    x = np.zeros(5, np.int32)
    cuda_emulator.run(compile_device(source, ["set"], [tmp_path]), "set", (1,), 5, 0, [x])
    assert list(x) == [1] * 5
    with pytest.raises(RuntimeError, match=r"kernels.cu:1:.*error"):
        compile_device("int x = nothing;", [], [tmp_path])


# --- the driver and the runtime, each time in a process of its own ----------------------------------------------------

PREAMBLE = """
import ctypes, sys
from pathlib import Path
import cuda_emulator
import numpy as np

def count(name):
    return driver.qcompile_emulated_counter(name.encode())

def allocate(bytes):
    pointer = ctypes.c_void_p()
    assert driver.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(bytes)) == 0
    return pointer

def copy(to, source, bytes, kind, stream=None):
    return driver.cudaMemcpyAsync(to, source, ctypes.c_size_t(bytes), kind, stream)
"""


def process(script: str, library: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    text = PREAMBLE + textwrap.dedent(script)
    path = f"{ROOT / 'tests'}:{ROOT}"
    return subprocess.run(
        [sys.executable, "-c", text, str(library)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def library_file(library: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kernels") / "kernels.so"
    path.write_bytes(library)
    return path


def test_a_graph_replays_what_a_stream_recorded(library_file: Path) -> None:
    script = """
        driver = cuda_emulator.load_driver()
        x, y = np.arange(100, dtype=np.int32), np.zeros(100, np.int32)
        a, b = allocate(400), allocate(400)
        assert copy(a, x.ctypes, 400, 1) == 0 and copy(b, x.ctypes, 400, 1) == 0

        module, add, stream = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        image = Path(sys.argv[1]).read_bytes()
        assert driver.cuModuleLoadData(ctypes.byref(module), image) == 0
        assert driver.cuModuleGetFunction(ctypes.byref(add), module, b"nothing") == 500
        assert driver.cuModuleGetFunction(ctypes.byref(add), module, b"add") == 0
        assert driver.cudaStreamCreate(ctypes.byref(stream)) == 0

        count_, more = ctypes.c_int64(100), ctypes.c_float(2.5)
        parameters = (ctypes.c_void_p * 4)(*map(ctypes.addressof, (a, b, count_, more)))
        config = np.zeros(7, np.uint64)
        config.view(np.uint32)[:7] = 4, 1, 1, 32, 1, 1, 0
        config[4] = stream.value

        assert driver.cudaStreamBeginCapture(stream, 0) == 0
        for _ in range(2):
            assert driver.cuLaunchKernelEx(config.ctypes, add, parameters, None) == 0
        assert copy(a, b, 400, 3, stream) == 0
        assert driver.cudaStreamEndCapture(stream, ctypes.byref(graph)) == 0
        more.value = 77  # too late for the graph
        assert driver.cudaGraphInstantiate(ctypes.byref(executable), graph, 0) == 0
        assert driver.cudaGraphDestroy(graph) == 0
        assert (count("launches"), count("captured_launches")) == (0, 2)
        for _ in range(2):
            assert driver.cudaGraphLaunch(executable, None) == 0
        assert copy(y.ctypes, b, 400, 2) == 0
        assert (count("launches"), count("graph_launches"), count("device_to_device")) == (4, 2, 2)
        assert np.array_equal(y, 9 * x + 4 * 2 + 2 * 4), y

        # What cannot be recorded spoils the recording.
        assert driver.cudaStreamBeginCapture(stream, 0) == 0
        assert driver.cudaMalloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(4)) == 900
        assert driver.cudaStreamEndCapture(stream, ctypes.byref(graph)) == 901
        assert driver.cudaGetLastError() == 901 and driver.cudaGetLastError() == 0

        # Copies end where the memory does, and lie where they say.
        assert copy(b, x.ctypes, 404, 1) == 1 and copy(b, x.ctypes, 400, 2) == 1

        # A kernel's mistake is an error of every later call.
        count_.value = 101
        config[4] = 0
        assert driver.cuLaunchKernelEx(config.ctypes, add, parameters, None) == 0
        assert driver.cudaStreamSynchronize(None) == 700
        assert driver.qcompile_emulated_message() == b"a write beyond 400 bytes of memory"
        assert driver.cudaStreamSynchronize(None) == 700
        driver.qcompile_emulated_reset()
        assert driver.cudaStreamSynchronize(None) == 0
    """
    done = process(script, library_file)
    assert done.returncode == 0, done.stderr


def test_the_host_cannot_touch_memory_of_the_device(library_file: Path) -> None:
    done = process("driver = cuda_emulator.load_driver(); ctypes.memset(allocate(4), 0, 4)", library_file)
    assert done.returncode == -signal.SIGSEGV


def test_tvm_finds_one_gpu_of_the_capability_asked_for(library_file: Path) -> None:
    script = """
        driver = cuda_emulator.load()
        import tvm
        import tvm_ffi

        cuda = ctypes.CDLL("libcuda.so.1")
        number = ctypes.c_int()
        assert cuda.cuDeviceGetCount(ctypes.byref(number)) == 3  # not initialized
        assert cuda.cuInit(0) == 0
        assert (cuda.cuDeviceGetCount(ctypes.byref(number)), number.value) == (0, 1)
        assert (cuda.cuDeviceGetAttribute(ctypes.byref(number), 75, 0), number.value) == (0, 8)
        assert (cuda.cuDeviceGetAttribute(ctypes.byref(number), 76, 0), number.value) == (0, 6)
        assert (cuda.cuDriverGetVersion(ctypes.byref(number)), number.value) == (0, 13000)

        assert tvm_ffi.get_global_func("runtime.GetCudaDeviceCount")() == 1
        device = tvm.cuda(0)
        assert device.exist and device.compute_version == "8.6"
        x = np.arange(1000, dtype=np.int32)
        a, b = tvm.runtime.tensor(x, device), tvm.runtime.tensor(x, device)
        assert np.array_equal(b.numpy(), x)

        def number64(value):
            return value.to_bytes(8, "little")

        def text(value):
            return number64(len(value)) + value

        # A module as it is saved: its format, its functions (arguments, launch parameters, tags) and its code.
        types = [(3, 64), (3, 64), (0, 64), (2, 32)]  # two pointers, int64, float32
        tags = [b"blockIdx.x", b"threadIdx.x"]
        info = text(b"add") + number64(4) + b"".join(bytes([code, bits, 1, 0]) for code, bits in types)
        info += number64(2) + b"".join(map(text, tags)) + number64(4) + bytes(16)
        saved = text(b"cubin") + number64(1) + text(b"add") + info + text(Path(sys.argv[1]).read_bytes())
        module = tvm_ffi.get_global_func("ffi.Module.load_from_bytes.cuda")(saved)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (a, b)]
        module["add"](*pointers, 1000, 2.5, 32, 32)
        assert count("launches") == 0  # nobody has waited
        assert np.array_equal(b.numpy(), 2 * x + 2)
        assert count("launches") == 1
        try:
            module["add"](*pointers, 100000, 2.5, 3200, 32)
            b.numpy()
        except Exception as error:
            assert "a read or write" in str(error), error
        else:
            raise AssertionError("a mistake was not found")
    """
    done = process(script, library_file, QCOMPILE_EMULATED_SM="86")
    assert done.returncode == 0, done.stderr


def test_tvm_finds_it_also_where_it_was_imported_before(library_file: Path) -> None:
    script = """
        import tvm
        driver = cuda_emulator.load()
        assert np.array_equal(tvm.runtime.tensor(np.arange(5), tvm.cuda(0)).numpy(), np.arange(5))
    """
    done = process(script, library_file)
    assert done.returncode == 0, done.stderr
