"""The device code of the candidates of tuning: every entry point is compiled once, whatever kernels call it.

Layers differ in the numbers that they give to an entry point, and seldom in which one they call: all tiles of all
layers of a network need some forty. NVIDIA's compiler takes about a second to start and a third of one for each, so
entries are compiled in as many parts as there are processes to do it.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from qcompile.targets.base import InstructionSet
from qcompile.targets.cuda import compile as cuda
from qcompile.targets.cuda.launch import Entry
from qcompile.targets.function import Kernel
from qcompile.targets.workers import Workers


class DeviceCode:
    """The device code that the kernels of a network share. Kernels of processors have none.

    Args:
        isa: what it is compiled for.
        workers, parts: the processes that compile, and how many there are.
        folder: for the files.
    """

    def __init__(self, isa: InstructionSet, workers: Workers, parts: int, folder: Path) -> None:
        self._isa, self._workers, self._parts, self._folder = isa, workers, parts, folder
        self._numbers = itertools.count()
        self._files: dict[Entry, tuple[Path, Future[None]]] = {}

    def begin(self, kernels: Iterable[Kernel]) -> None:
        """Compile what these need and nobody asked for before."""
        needed = {entry: None for kernel in kernels for entry, _ in kernel.launches}
        new = [entry for entry in needed if entry not in self._files]
        for part in range(min(self._parts, len(new))):
            entries, path = new[part :: self._parts], self._folder / f"{next(self._numbers)}.device"
            # By its name there: what stands for the compiler here stands for it in the other process too.
            task = self._workers.submit(compile_part, cuda.compiled, entries, self._isa, path)
            self._files |= dict.fromkeys(entries, (path, task))

    def of(self, kernel: Kernel) -> tuple[tuple[Path, str], ...]:
        """The files with the entries of `kernel`, each with what TVM must know of these; waits until they are there.

        Raises:
            Exception: whatever compiling them raised.
        """
        found: dict[Path, list[Entry]] = {}
        for entry, _ in kernel.launches:
            path, task = self._files[entry]
            task.result()
            found.setdefault(path, []).append(entry)
        return tuple((path, cuda.information_of(entries)) for path, entries in found.items())


def compile_part(
    compiled: Callable[[Sequence[Entry], Any], bytes], entries: Sequence[Entry], isa: InstructionSet, path: Path
) -> None:
    """In a process of its own: compile `entries` to `path`."""
    # A compiler that is ended leaves its files: where they go with ours.
    os.environ["TMPDIR"] = tempfile.tempdir = str(path.parent)
    path.write_bytes(compiled(entries, isa))
