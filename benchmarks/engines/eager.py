"""PyTorch in eager mode, float32: what a user has before anything is compiled."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from benchmarks.engines.base import Engine, Source


class Eager(Engine):
    """The exported program, run by PyTorch's own kernels."""

    name = "pytorch float"
    loader = "eager"
    modules: ClassVar[tuple[str, ...]] = ("torch",)
    packages: ClassVar[tuple[str, ...]] = ("torch",)
    from_torch = True

    def prepare(self, source: Source) -> Path:
        return source.exported
