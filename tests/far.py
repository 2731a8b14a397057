"""A machine that tests do not run on: one lasting process there, to which artifacts and inputs are sent."""

from __future__ import annotations

import itertools
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import far_worker
import numpy as np

from qcompile import errors
from qcompile.artifact import Artifact
from qcompile.runtime import Selftest

if TYPE_CHECKING:
    from typing_extensions import Self


class FarMachine:
    """A process that runs artifacts; `command` starts it, and is given the path of a program.

    with FarMachine(command, environment) as machine:
        outputs = machine.run(artifact, x)
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._folder = tempfile.TemporaryDirectory(prefix="qcompile-far-")
        self._numbers = itertools.count()

    def run(self, artifact: Artifact, *inputs: np.ndarray) -> list[np.ndarray]:
        """Load `artifact` there, run it once on flat inputs and forget it: the flat outputs."""
        return self.run_all(artifact, [inputs])[0]

    def run_all(self, artifact: Artifact, cases: Sequence[Sequence[np.ndarray]]) -> list[list[np.ndarray]]:
        """Load `artifact` there and run it on every case of flat inputs."""
        path = self._save(artifact)
        self._ask("load", path)
        return [self._ask("run", path, inputs)[1] for inputs in cases]

    def selftest(self, artifact: Artifact) -> Selftest:
        """Load `artifact` there and replay its golden vectors."""
        path = self._save(artifact)
        self._ask("load", path)
        return Selftest(*map(int, self._ask("selftest", path)[0].split()))

    def _save(self, artifact: Artifact) -> str:
        path = str(Path(self._folder.name, f"{next(self._numbers)}.qcm"))
        artifact.save(path)
        return path

    def _ask(self, verb: str, path: str, arrays: Sequence[np.ndarray] = ()) -> tuple[str, list[np.ndarray]]:
        """One request and its answer. An error there is raised here, as the class it was."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            far_worker.send(self._process.stdin, f"{verb} {path}", arrays)
            status, answer = far_worker.receive(self._process.stdout)
        except (BrokenPipeError, EOFError) as error:
            raise RuntimeError(f"the process ended with {self._process.wait()} on: {verb} {path}") from error
        kind, _, text = status.partition(" ")
        if kind != "ok":
            raise getattr(errors, kind, RuntimeError)(text)
        return text, answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._folder.cleanup()
