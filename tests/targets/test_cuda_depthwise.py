"""Depthwise convolutions on a GPU: filters and strides that have kernels of their own, and widths that no four fit."""

from __future__ import annotations

import pytest
import torch
from execution import mismatches, operator, program_of

from qcompile.ops import Act, Sample
from qcompile.ops.conv import CONV2D, sample_weighted
from qcompile.ops.row import random_int8


def _sample(g: torch.Generator, channels: int, width: int, size: int, stride: int, residual: bool) -> Sample:
    x = random_int8(g, 2, channels, 6, width)
    shape = (2, channels, (6 - 1) // stride + 1, (width - 1) // stride + 1)
    args, kwargs = sample_weighted(g, (channels, 1, size, size), random_int8(g, *shape) if residual else None)
    geometry = ([stride, stride], [size // 2] * 4, [1, 1], channels)
    return Sample((Act(x), *args, *geometry), kwargs, f"{channels}x{width} k{size} s{stride} {residual}")


@pytest.mark.parametrize("target", ["cuda-sm_90", pytest.param("cuda-sm_61", marks=pytest.mark.slow)])
def test_every_filter_with_a_kernel_of_its_own_is_exact(target: str, request: pytest.FixtureRequest) -> None:
    g = torch.Generator().manual_seed(5)
    samples = [
        _sample(g, channels, width, size, stride, residual)
        for size in (3, 5)
        for stride in (1, 2)
        for channels, width, residual in ((8, 9, False), (6, 6, True), (5, 3, False), (4, 1, False), (12, 8, True))
    ]
    program, inputs = program_of([(operator(CONV2D), sample) for sample in samples])
    assert mismatches(program, inputs, [sample.label for sample in samples], target, request) == []
