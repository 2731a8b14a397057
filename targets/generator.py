"""What the generators of convolution kernels have in common: a choice of configs, all with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qcompile.targets.filters import ConvShape, Filters
from qcompile.targets.function import Kernel


@dataclass(frozen=True)
class Generator:
    """Makes the kernels of one kind of convolution.

    Attributes:
        name: in the tuning database.
        configs: (shape, filters, isa) -> every config it may be given, the most promising first.
        kernel: (shape, filters, numbers, isa, symbols, config) -> the kernel; without a config, the first.
        instruction: (shape, filters, isa) -> what it multiplies with.
    """

    name: str
    configs: Callable[[ConvShape, Filters, Any], list[Any]]
    kernel: Callable[..., Kernel]
    instruction: Callable[[ConvShape, Filters, Any], str]


def tile_name(rows: int, channels: int, order: str) -> str:
    """How the name of a kernel ends: with its tile, and with what a thread takes."""
    return f"{rows}x{channels}_{order}"
