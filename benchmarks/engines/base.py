"""What every engine is: how it is prepared from the float model, and how it runs.

A prepared model is a file or several, so that a measuring process loads only its own engine.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from benchmarks import loaders

Array = NDArray[np.float32]
ROOT = Path(__file__).resolve().parents[2]
INPUT = "x"


@dataclass(frozen=True)
class Source:
    """The float model and the data to calibrate it on, as files in a folder; what is not asked for is not loaded."""

    folder: Path

    @property
    def onnx(self) -> Path:
        return self.folder / "model.onnx"

    @property
    def exported(self) -> Path:
        """The model as `torch.export` saves it."""
        return self.folder / "model.pt2"

    @cached_property
    def calibration(self) -> list[Array]:
        """Batches, each the shape of the input."""
        return list(np.load(self.folder / "calibration.npy"))

    @cached_property
    def program(self) -> Any:
        """The model as a `torch.export.ExportedProgram`."""
        import torch

        return torch.export.load(self.exported)


class Engine(ABC):
    """One way to run a network.

    Attributes:
        name: as it is shown.
        loader: its function in `benchmarks.loaders`.
        modules: what `prepare` imports; importing is not counted as its time.
        packages: the distributions whose versions are reported.
        from_torch: `prepare` starts from the exported program, not from the ONNX file.
        peer: another project's.
    """

    name: ClassVar[str]
    loader: ClassVar[str]
    modules: ClassVar[tuple[str, ...]]
    packages: ClassVar[tuple[str, ...]]
    from_torch: ClassVar[bool] = False
    peer: ClassVar[bool] = True

    @property
    def python(self) -> Path:
        """The interpreter of the environment that the engine is installed in."""
        return Path(sys.executable)

    def objection(self, model: str) -> str | None:
        """Why this engine has nothing to show on `model`; None where it has."""
        return None

    @abstractmethod
    def prepare(self, source: Source) -> Path:
        """Write what `load` reads into the source's folder."""

    def files(self, path: Path) -> list[Path]:
        """All that a device needs of what `prepare` wrote as `path`; the engine itself is not counted."""
        return [path]

    def load(self, path: Path, threads: int) -> Callable[[Array], Array]:
        """A function from one input, as `arrange` gives it, to its logits."""
        return getattr(loaders, self.loader)(str(path), threads)

    def arrange(self, x: Array) -> Array:
        """An input in the layout that the engine was prepared for; done once, and not timed."""
        return x
