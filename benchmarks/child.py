"""Processes that do one thing and answer, in an environment of their own; with the reason when one fails."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

from benchmarks.engines import Engine
from benchmarks.engines.base import ROOT

SECONDS = 900  # that one may take to answer


class Failed(RuntimeError):
    """A process ended without an answer; the message is the last thing it said."""


class Child:
    """The function `main` of a module, in a process with pipes to it, one line at a time.

    All engines start alike: without the hooks that other packages of an environment, or an editable install,
    run in every start of Python (`-S`), and with NumPy's BLAS, which none of them uses, on one thread: it
    spins on another core for a while after it was loaded, and disturbs whoever starts then.
    """

    def __init__(self, python: Path, module: str, *arguments: str, threads: int | None = None) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (a file cannot fill up, as a pipe would)
        (packages,) = python.parents[1].glob("lib/python*/site-packages")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, packages))),
            "OPENBLAS_NUM_THREADS": "1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # or sources would be compiled anew, but installed engines not
        if threads:
            environment |= {"OMP_NUM_THREADS": str(threads), "TVM_NUM_THREADS": str(threads)}
        try:
            self.process = subprocess.Popen(
                [str(python), "-S", "-c", f"import sys; from {module} import main; main(*sys.argv[1:])", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env=environment,
                cwd=ROOT,
            )
        except OSError as error:
            raise Failed(f"{python} cannot be started: {error.strerror}") from error

    def read(self) -> str:
        """The next line. Raises Failed where there is none."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise Failed(self._reason())
        return line.strip()

    def wait_for(self, word: str) -> None:
        """Read up to the line `word`: libraries may print what they like before."""
        while self.read() != word:
            pass

    def write(self, line: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.process.wait()
            raise Failed(self._reason()) from None

    def answer(self) -> dict[str, Any]:
        """What the process answers after the line "answer"."""
        self.wait_for("answer")
        return json.loads(self.read())

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._errors.close()

    def _reason(self) -> str:
        self._errors.seek(0)
        said = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        status = self.process.returncode
        ended = f"killed by signal {-status}" if status < 0 else f"ended with status {status}"
        last = next((line for line in reversed(said) if "Error" in line), said[-1] if said else "")
        return f"{ended}: {last}"[:300] if last else ended


def answer(value: dict[str, Any]) -> None:
    """Inside the process: give `value` to the parent."""
    print("answer", json.dumps(value), sep="\n", flush=True)


def ask(python: Path, module: str, *arguments: str, threads: int | None = None) -> dict[str, Any]:
    """Run one to its end, and return its answer. Raises Failed."""
    child = Child(python, module, *arguments, threads=threads)
    limit = threading.Timer(SECONDS, child.process.kill)
    limit.start()
    try:
        return child.answer()
    finally:
        limit.cancel()
        child.close()


def missing(engine: Engine) -> str | dict[str, str]:
    """Why `engine` cannot be used in this installation; when it can, its packages and their versions."""
    if not engine.python.exists():
        return f"its environment {engine.python.parents[1].name} is missing: `make bench` makes it"
    try:
        return ask(engine.python, "benchmarks.prepare", engine.name)
    except Failed as failed:
        return str(failed)
