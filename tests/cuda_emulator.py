"""CUDA kernels on a CPU: the same device code, compiled by g++, its threads fibers, its instructions functions.

`compile_device` makes a library of kernels, and `run` launches one on NumPy arrays. `load` puts a CUDA driver and a
CUDA runtime into the process that launch kernels of such libraries, in place of NVIDIA's: TVM's own runtime for CUDA
then finds one GPU.

Device code that reads shared memory too early, misses a barrier or lets the lanes of a warp part gets wrong bits or
an error.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
EMULATED = ROOT / "tests/cuda/emulated"
DEVICE = ROOT / "targets/cuda/device"
BUILT = ROOT / ".cache/cuda-emulator"

Parameter = np.ndarray | int | float

# No product and sum may become one operation, bytes may be read as what they are not, and integers wrap around.
_ARITHMETIC = ("-mavx2", "-ffp-contract=off", "-fno-strict-aliasing", "-fwrapv")
_CHECKS = ("-fsanitize=alignment,bounds", "-fno-sanitize-recover=all")
_LIBRARY = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas")


def available() -> str | None:
    """Why kernels cannot be run here; None when they can."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return "the emulator switches stacks in x86-64 code"
    if shutil.which("g++") is None:
        return "not installed: g++"
    return None


def compile_device(source: str, names: Sequence[str], include: Sequence[Path] = (DEVICE,)) -> bytes:
    """A shared library of the kernels `names` of `source`, which may include the headers of the folders `include`.

    What the compiler says where it refuses is the text of the error.
    """
    return link([compile_object(source, names, include)])


def compile_object(source: str, names: Sequence[str], include: Sequence[Path] = (DEVICE,)) -> Path:
    """A part of such a library."""
    headers = {path.name: path for folder in include for path in sorted(folder.glob("*.cuh"))}
    headers.pop("instructions.cuh", None)  # a header's own folder is searched first: there, it would be found
    unit = '#include "instructions.cuh"\n#line 1 "kernels.cu"\n' + source
    unit += "\n" + "".join(f"QCOMPILE_KERNEL({name})\n" for name in names)

    def build(folder: Path) -> None:
        for name, path in headers.items():
            shutil.copy(path, folder / name)
        (folder / "kernels.cpp").write_text(unit)
        places = (f"-I{folder}", f"-I{_built(_build_language, *language)}")
        _gcc(*_LIBRARY, *_ARITHMETIC, *_CHECKS, *places, "-c", folder / "kernels.cpp", "-o", folder / "kernels.o")

    language = sorted(path for path in EMULATED.iterdir() if path.suffix in (".h", ".cuh"))
    return _built(build, unit, *language, *headers.values()) / "kernels.o"


def _build_language(folder: Path) -> None:
    """The headers of the emulator, the first one compiled: reading them takes longer than most kernels do."""
    for path in EMULATED.iterdir():
        shutil.copy(path, folder)
    header = folder / "instructions.cuh"
    _gcc(*_LIBRARY, *_ARITHMETIC, *_CHECKS, "-x", "c++-header", header, "-o", f"{header}.gch")


def link(objects: Sequence[Path]) -> bytes:
    """The shared library of what `compile_object` made."""

    def build(folder: Path) -> None:
        # Linked without the checks, which would bring a library that ends the process at the first error.
        _gcc("-shared", "-Wl,-z,defs", *objects, "-o", folder / "kernels.so")

    return (_built(build, *objects) / "kernels.so").read_bytes()


def run(
    library: bytes,
    name: str,
    grid: Sequence[int],
    threads: int,
    shared_bytes: int,
    parameters: Sequence[Parameter],
) -> None:
    """Launch the kernel on `grid` blocks of `threads`. Arrays go in and come back changed; a float is a float32.

    Raises RuntimeError with what the emulator found.
    """
    kernels = _open(library)
    sizes = list((ctypes.c_int * (len(parameters) + 1)).in_dll(kernels, f"{name}_parameter_sizes"))
    values: list[ctypes.c_void_p | ctypes.c_int64 | ctypes.c_int32 | ctypes.c_float] = []
    copies: list[tuple[np.ndarray, int]] = []
    for parameter, size in zip(parameters, sizes, strict=False):
        if isinstance(parameter, np.ndarray):
            assert parameter.flags.c_contiguous
            memory = kernels.qcompile_allocate(parameter.nbytes)
            ctypes.memmove(memory, parameter.ctypes.data, parameter.nbytes)
            copies.append((parameter, memory))
            values.append(ctypes.c_void_p(memory))
        elif isinstance(parameter, int):
            values.append(ctypes.c_int64(parameter) if size == 8 else ctypes.c_int32(parameter))
        else:
            values.append(ctypes.c_float(parameter))
    assert sizes == [*map(ctypes.sizeof, values), 0], f"{name} takes parameters of {sizes} bytes"
    addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    entry = ctypes.cast(getattr(kernels, f"{name}_launch"), ctypes.c_void_p)
    error = kernels.qcompile_launch(entry, *(*grid, 1, 1)[:3], threads, shared_bytes, addresses)
    for array, memory in copies:
        if array.flags.writeable:
            ctypes.memmove(array.ctypes.data, memory, array.nbytes)
        if not kernels.qcompile_free(memory):
            error = error or b"a write beyond an array"
    if error:
        raise RuntimeError(f"{name}: {error.decode()}")


def libraries() -> Path:
    """The folder with the driver and the runtime that `load_driver` loads: a process that has it in LD_LIBRARY_PATH
    from its start finds the emulated GPU."""
    return _built(_build_driver, *sorted(path for path in EMULATED.iterdir() if path.suffix != ".cuh"))


@functools.cache
def load_driver() -> ctypes.CDLL:
    """Make this process find one emulated GPU, of the compute capability that QCOMPILE_EMULATED_SM says (or 90).

    For the whole process, and before anything asks for CUDA's libraries. Returns the library: that of the driver, of
    the runtime, and

    - `qcompile_emulated_counter(name)`: how often something was done, names in tests/cuda/emulated/driver.cpp
    - `qcompile_emulated_message()`: what the last call that failed said
    - `qcompile_emulated_reset()`: a kernel that failed is forgotten; until then, every call fails
    """
    folder = libraries()
    driver = ctypes.CDLL(str(folder / "libcudart.so.13"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    driver.qcompile_emulated_counter.restype = ctypes.c_int64
    driver.qcompile_emulated_counter.argtypes = [ctypes.c_char_p]
    driver.qcompile_emulated_message.restype = ctypes.c_char_p
    return driver


@functools.cache
def load() -> ctypes.CDLL:
    """Make TVM in this process find one emulated GPU, as `load_driver` does."""
    driver = load_driver()
    import tvm  # finds the libraries by their names, which are loaded
    import tvm_ffi

    if tvm_ffi.get_global_func("runtime.GetCudaDeviceCount", allow_missing=True) is None:
        # tvm was imported before, and could not load it.
        ctypes.CDLL(str(Path(tvm.__file__).parent / "lib/libtvm_runtime_cuda.so"))
    assert tvm.cuda(0).device_name.startswith("emulated"), "CUDA's own libraries were loaded before"
    return driver


def _build_driver(folder: Path) -> None:
    sources = [EMULATED / name for name in ("device.cpp", "driver.cpp", "runtime.cpp")]
    runtime, driver = folder / "libcudart.so.13", folder / "libcuda.so.1"
    script = f"-Wl,--version-script={EMULATED / 'symbols.map'}"
    _gcc(*_LIBRARY, *sources, "-shared", "-Wl,-soname,libcudart.so.13", script, "-o", runtime)
    # All is in the first; who asks the second finds it through this one's dependency.
    (folder / "empty.cpp").touch()
    link = ("-Wl,-soname,libcuda.so.1", "-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN")
    _gcc("-shared", folder / "empty.cpp", *link, runtime, "-o", driver)


def _gcc(*arguments: str | Path) -> None:
    result = subprocess.run(["g++", *map(str, arguments)], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"g++ refuses:\n{result.stderr}")


def _built(build: Callable[[Path], None], *inputs: str | Path) -> Path:
    """The folder that `build` fills, from before where the inputs are the same. Processes may ask for it at once."""
    digest = hashlib.sha256(" ".join((*_ARITHMETIC, *_CHECKS, *_LIBRARY)).encode())
    for item in inputs:
        content = item.encode() if isinstance(item, str) else item.name.encode() + item.read_bytes()
        digest.update(len(content).to_bytes(8, "little") + content)
    target = BUILT / digest.hexdigest()[:32]
    if not target.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILT, prefix="build-") as folder:
            build(Path(folder))
            try:
                os.rename(folder, target)
            except OSError:  # another process was first
                assert target.exists()
    return target


@functools.cache
def _open(library: bytes) -> ctypes.CDLL:
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(library)
        file.flush()
        kernels = ctypes.CDLL(file.name)
    kernels.qcompile_launch.restype = ctypes.c_char_p
    kernels.qcompile_allocate.restype = ctypes.c_void_p
    kernels.qcompile_allocate.argtypes = [ctypes.c_size_t]
    kernels.qcompile_free.argtypes = [ctypes.c_void_p]
    return kernels
