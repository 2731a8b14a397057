"""An ARM machine for tests: qemu, the folder that arm_sysroot.py builds, and one lasting process in it.

Starting Python with NumPy takes seconds under qemu, so `ArmMachine` starts it once and then sends it
artifacts and inputs; `run` is one fresh process, as a user would start it.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import arm_worker
import numpy as np
from arm_sysroot import READY, ROOT, SYSROOT, key

from qcompile import errors
from qcompile.artifact import Artifact
from qcompile.runtime import Selftest


def unavailable() -> str:
    """Why ARM code cannot be run here; "" when it can."""
    missing = [tool for tool in ("qemu-aarch64", "aarch64-linux-gnu-ld") if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (`make arm-tools`)"
    if not READY.exists() or READY.read_text() != key():
        return "no AArch64 Python (`python tests/arm_sysroot.py`)"
    return ""


def _command(arguments: Sequence[str], cpu: str) -> tuple[list[str], dict[str, str]]:
    command = ["qemu-aarch64", "-cpu", cpu, "-L", str(SYSROOT), str(SYSROOT / "usr/bin/python"), *arguments]
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": f"{ROOT}:{SYSROOT / 'site'}",
        "TVM_NUM_THREADS": "2",
        "OPENBLAS_NUM_THREADS": "1",
    }
    return command, environment


def run(*arguments: str, cpu: str = "max") -> subprocess.CompletedProcess[str]:
    """Run `python arguments...` on an ARM processor; "cortex-a72" has no dot product."""
    command, environment = _command(arguments, cpu)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


class ArmMachine:
    """A process on an ARM processor that runs artifacts.

    with ArmMachine() as machine:
        outputs = machine.run(artifact, x)
    """

    def __init__(self, cpu: str = "max") -> None:
        command, environment = _command([str(Path(arm_worker.__file__))], cpu)
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._folder = tempfile.TemporaryDirectory(prefix="qcompile-arm-")
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
            arm_worker.send(self._process.stdin, f"{verb} {path}", arrays)
            status, answer = arm_worker.receive(self._process.stdout)
        except (BrokenPipeError, EOFError) as error:
            raise RuntimeError(f"the ARM process ended with {self._process.wait()} on: {verb} {path}") from error
        kind, _, text = status.partition(" ")
        if kind != "ok":
            raise getattr(errors, kind, RuntimeError)(text)
        return text, answer

    def __enter__(self) -> ArmMachine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._folder.cleanup()
