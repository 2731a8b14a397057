"""A GPU for tests: the emulated one, or with QCOMPILE_TEST_GPU=1 the one of this machine.

Run as a program, this is the process that holds it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import cuda_emulator
import far_worker
from far import FarMachine

from qcompile.targets.cuda import compile as cuda
from qcompile.targets.cuda.launch import Entry
from qcompile.targets.nvidia import Gpu

REAL = os.environ.get("QCOMPILE_TEST_GPU") == "1"


def unavailable() -> str:
    """Why code for GPUs cannot run here; "" when it can."""
    return "" if REAL else cuda_emulator.available() or ""


def emulated(entries: list[Entry], gpu: Gpu) -> bytes:
    """The device code of `entries`, for the emulated GPU: each compiled by itself, as many networks have the same."""
    objects = [cuda_emulator.compile_object(cuda.source_of([entry]), [entry.name]) for entry in entries]
    return cuda_emulator.link(objects)


@contextmanager
def compiling() -> Iterator[None]:
    """Within, code for GPUs is compiled for the GPU of the tests."""
    if REAL:
        yield
        return
    with mock.patch.object(cuda, "compiled", emulated), mock.patch.object(cuda, "compiler"):
        yield


class GpuMachine(FarMachine):
    """A process with a GPU that runs artifacts."""

    def __init__(self) -> None:
        before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        paths = os.pathsep.join([str(cuda_emulator.ROOT), str(cuda_emulator.ROOT / "tests"), *filter(None, before)])
        super().__init__([sys.executable, str(Path(__file__))], {**os.environ, "PYTHONPATH": paths})


if __name__ == "__main__":
    if not REAL:
        cuda_emulator.load_driver()
    far_worker.main()
