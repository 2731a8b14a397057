"""This project, for the machine it runs on, or held to one target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.engines.base import Array, Engine, Source


class Qcompile(Engine):
    """Strict: a model in which an operator stayed float is not measured."""

    name = "qcompile"
    loader = "qcompile"
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
        compiled = qcompile.compile(
            source.program, self.target, calibration=calibration, tuning=self.tuning(), strict=True
        )
        compiled.save(path)
        return path

    def tuning(self) -> Any:
        """What the package ships is used."""
        return None


class QcompileUntuned(Qcompile):
    """With the analytic defaults alone: no measured config, not even those that ship."""

    name = "qcompile untuned"

    def tuning(self) -> Any:
        from qcompile.tuning import Tuning

        return Tuning(shipped=False)


class QcompileNormalizing(Qcompile):
    """The network takes normalized pixels, and NumPy normalizes them before each call, as photographs are."""

    name = "qcompile, normalizing in NumPy"

    def load(self, path: Path, threads: int) -> Callable[[Array], Array]:
        run = super().load(path, threads)
        return lambda x: run((x - 127.0) / 128.0)
