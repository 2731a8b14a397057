"""Entry points of device code -> what a GPU's driver loads, by NVIDIA's compilers. No GPU is needed.

nvcc, where it is installed and knows the GPU, else NVRTC: a Python package, whose version 12 knows older GPUs. What
comes out is machine code and PTX, from which a driver makes machine code for later GPUs; or, where there is no CUDA
toolkit to pack them together, PTX alone: then a driver compiles it too for the GPU that it is meant for, when a model
is loaded the first time, and keeps the result on disk.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qcompile.errors import BuildError
from qcompile.targets.cuda import nvrtc
from qcompile.targets.cuda.launch import Entry
from qcompile.targets.nvidia import Gpu

DEVICE = Path(__file__).parent / "device"
# Of all compilers. A product and a sum are joined only where the code says fma.
FLAGS = ("-std=c++17", "-fmad=false", "--split-compile=0", f"-I{DEVICE}")
_NVCC_FLAGS = ("-O3", "-Xcudafe", "--diag_suppress=177")


def source_of(entries: Sequence[Entry]) -> str:
    """One file of CUDA C++ with all `entries`."""
    entries = sorted(entries, key=lambda entry: entry.name)
    headers = sorted({entry.header for entry in entries})
    return "".join([*(f'#include "{header}"\n' for header in headers), "\n", *(f"{e.source}\n" for e in entries)])


def information_of(entries: Sequence[Entry]) -> str:
    """What TVM must know of `entries`, as JSON."""
    information = {entry.name: entry.information for entry in entries}
    return json.dumps({"tvm_version": version("apache-tvm"), "func_info": information}, sort_keys=True)


def compiled(entries: Sequence[Entry], gpu: Gpu) -> bytes:
    """A fatbin or PTX.

    Raises:
        BuildError: there is no compiler for this GPU, or it fails.
    """
    return compiler(gpu)(source_of(entries), gpu)


def compiler(gpu: Gpu) -> Callable[[str, Gpu], bytes]:
    """What compiles a source for `gpu`.

    Raises:
        BuildError: there is no compiler that does.
    """
    nvcc = _tool("nvcc")
    if nvcc and shutil.which("gcc") and f"compute_{gpu.capability}" in _architectures(nvcc):  # nvcc starts gcc
        return partial(_by_nvcc, nvcc)
    library = nvrtc.library_for(gpu.capability)
    if library is not None:
        return partial(_by_nvrtc, library)
    raise BuildError(
        f"no compiler for {gpu.architecture} on this machine",
        where=f"looked for nvcc, which needs gcc, in PATH and CUDA_HOME (found: {nvcc or 'none'}), and for "
        f"{' and '.join(nvrtc.LIBRARIES)} in NVIDIA's packages and the system's folders",
        remedy=nvrtc.REMEDY,
    )


def _by_nvcc(nvcc: str, source: str, gpu: Gpu) -> bytes:
    codes = f"arch=compute_{gpu.capability},code=[{gpu.architecture},compute_{gpu.capability}]"
    options = ("--fatbin", *FLAGS, *_NVCC_FLAGS, "-gencode", codes)

    def make(folder: Path, output: Path) -> list[str]:
        (folder / "kernels.cu").write_text(source)
        return [nvcc, *options, "-o", str(output), str(folder / "kernels.cu")]

    return _made(make, gpu)


def _by_nvrtc(library: Any, source: str, gpu: Gpu) -> bytes:
    pack = _tool("fatbinary")
    # Without a packer machine code is of no use, and is not made.
    result = nvrtc.compiled(library, source, gpu.architecture if pack else f"compute_{gpu.capability}", FLAGS)
    if not pack:
        return result.ptx

    def make(folder: Path, output: Path) -> list[str]:
        (folder / "kernels.ptx").write_bytes(result.ptx.rstrip(b"\0"))
        (folder / "kernels.cubin").write_bytes(result.cubin)
        images = [
            f"--image3=kind={kind},sm={gpu.capability},file={folder / name}"
            for kind, name in (("elf", "kernels.cubin"), ("ptx", "kernels.ptx"))
        ]
        return [str(pack), "-64", f"--create={output}", *images]

    return _made(make, gpu)


def _made(make: Callable[[Path, Path], list[str]], gpu: Gpu) -> bytes:
    """The output of the command that `make` says for a folder and an output in it."""
    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
        output = Path(folder) / "kernels.fatbin"
        command = make(Path(folder), output)
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            said = (result.stderr + result.stdout).strip()
            raise BuildError(f"{Path(command[0]).name} failed", where=gpu.architecture, remedy=said or "see its output")
        return output.read_bytes()


def _tool(name: str) -> str | None:
    """The path of a program of the CUDA toolkit."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(name, path=os.path.join(home, "bin"))


@cache
def _architectures(nvcc: str) -> list[str]:
    """Those that it knows; none where it does not run."""
    try:
        return subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []
