"""Random calls of integer operators: odd shapes and hard numbers, beyond the op table's own samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompile import arith
from qcompile.ops.row import random_int8

Numbers = tuple[tuple[Tensor, Tensor, Tensor, int, int, int, int], dict[str, Any]]


def integer(g: torch.Generator, low: int, high: int) -> int:
    """Uniform in [low, high]."""
    return int(torch.randint(low, high + 1, (1,), generator=g))


def pick(g: torch.Generator, *choices: Any) -> Any:
    return choices[integer(g, 0, len(choices) - 1)]


def zero_point(g: torch.Generator) -> int:
    """Often at an end of the range."""
    return pick(g, -128, 127, 0, integer(g, -128, 127), integer(g, -128, 127))


def clamp(g: torch.Generator) -> tuple[int, int]:
    """(lo, hi): the whole range, a part of it, or one value."""
    a, b = sorted((integer(g, -128, 127), integer(g, -128, 127)))
    return pick(g, (-128, 127), (-128, 127), (a, b), (a, b), (a, a))


def weighted_numbers(g: torch.Generator, shape: tuple[int, ...], residual: bool) -> Numbers:
    """(weight, bias, m, zero points, clamp) and the residual's numbers, for a weight of `shape`.

    Channel by channel the multiplier is sensible, huge or tiny, and the bias small or as large as an
    int32 accumulator can bear. One tensor in three has small weights, for which saturating
    multiply-adds are allowed; one in three only the largest.
    """
    channels = shape[0]
    largest = pick(g, 127, 127, 60)
    weight = random_int8(g, *shape, lo=-largest, hi=largest)
    if pick(g, True, False, False):
        weight = torch.where(weight > 0, largest, -largest).to(torch.int8)
    x_zp, zp = zero_point(g), zero_point(g)
    taps = max(1, weight[0].numel())
    m = (torch.rand(channels, generator=g) + 0.1) * (2.0 / (127 * taps**0.5))
    kind = torch.randint(0, 12, (channels,), generator=g)
    # One tensor in two stays where converting to int32 needs no clamp, which kernels take advantage of.
    beyond = pick(g, (1e30, 1.0), (1e-6, 1e-3))
    for value, hard in enumerate((beyond[0], 1e-30, 1e-44, beyond[1])):
        m = torch.where(kind == value, torch.tensor(hard, dtype=torch.float32), m)
    spare = arith.INT32_MAX - arith.largest_accumulator(weight, torch.zeros(channels, dtype=torch.int32), x_zp)
    bias = torch.randint(-3000, 3000, (channels,), generator=g)
    bias = torch.where(kind == 5, spare, torch.where(kind == 6, -spare, bias)).to(torch.int32)
    numbers = {"residual_zero_point": zero_point(g), "residual_m": arith.float32(pick(g, 0.7, 1.0, 1e-20, 50.0))}
    return (weight, bias, m, x_zp, zp, *clamp(g)), numbers if residual else {}
