"""Take: where the elements of a result come from, dimension by dimension."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.targets.layout import Dim


@dataclass(frozen=True)
class Take:
    """Where one dimension of the source index comes from: start + step * (index of `dim` of the result),
    or always `start` where `dim` is None."""

    dim: int | None
    start: Dim = 0
    step: int = 1


def identity(x_shape: tuple[Dim, ...], y_shape: tuple[Dim, ...]) -> tuple[Take, ...]:
    """Every dimension from itself; an extent of one repeats."""
    return tuple(
        Take(None if isinstance(a, int) and a == 1 and not (isinstance(b, int) and b == 1) else d)
        for d, (a, b) in enumerate(zip(x_shape, y_shape, strict=True))
    )
