"""This project, for the machine it runs on, or held to one target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from benchmarks.engines.base import Array, Engine, Source


class Qcompile(Engine):
    """Strict: a model in which an operator stayed float is not measured."""

    name = "qcompile"
    target: ClassVar[str] = "native"
    modules = ("torch", "qcompile.compiler")
    packages = ("qcompile", "apache-tvm", "torch")
    from_torch = True
    peer = False

    def prepare(self, source: Source) -> Path:
        import torch

        import qcompile

        path = source.folder / "model.qcm"
        calibration = [torch.from_numpy(x) for x in source.calibration]
        qcompile.compile(source.program, self.target, calibration=calibration, strict=True).save(path)
        return path

    def load(self, path: Path, threads: int) -> Callable[[Array], Array]:
        import qcompile

        return qcompile.load(path, threads=threads)
