"""Entry points of device code -> machine code, by NVIDIA's compiler. No GPU is needed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

from qcompile.errors import BuildError
from qcompile.targets.cuda.launch import Entry
from qcompile.targets.nvidia import Gpu

DEVICE = Path(__file__).parent / "device"
# A product and a sum are joined only where the code says fma.
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "--split-compile=0", "-Xcudafe", "--diag_suppress=177")


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
    """A fatbin: machine code for `gpu`, and PTX from which drivers make it for later ones.

    Raises:
        BuildError: there is no compiler for this GPU, or it fails.
    """
    nvcc = compiler(gpu)
    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
        source, output = Path(folder) / "kernels.cu", Path(folder) / "kernels.fatbin"
        source.write_text(source_of(entries))
        codes = f"arch=compute_{gpu.capability},code=[{gpu.architecture},compute_{gpu.capability}]"
        command = [nvcc, "--fatbin", *FLAGS, "-gencode", codes, "-I", str(DEVICE), "-o", str(output), str(source)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise BuildError("nvcc failed", where=gpu.architecture, remedy=result.stderr.strip() or "see its output")
        return output.read_bytes()


def compiler(gpu: Gpu) -> str:
    """The path of an nvcc that compiles for `gpu`.

    Raises:
        BuildError: there is none.
    """
    found = shutil.which("nvcc") or shutil.which(
        "nvcc", path=os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    )
    if found is None:
        raise BuildError(
            f"no compiler for {gpu.architecture} on this machine",
            where="looked for nvcc in PATH and CUDA_HOME",
            remedy="install NVIDIA's CUDA toolkit (no GPU is needed), or set CUDA_HOME to where it is",
        )
    if f"compute_{gpu.capability}" not in _architectures(found):
        raise BuildError(
            f"this nvcc does not compile for {gpu.architecture}",
            where=found,
            remedy="install another CUDA toolkit: 12 is the last for GPUs before sm_75, 11.8 the first for sm_90",
        )
    return found


@cache
def _architectures(nvcc: str) -> list[str]:
    return subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
