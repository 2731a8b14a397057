"""Convolutions with strides on a matrix unit: over phases of their pixels where that fills its registers."""

from __future__ import annotations

import pytest
import torch
from execution import TARGETS, different, run_on, skip_unless_runnable
from torch import Tensor, nn

import qcompile
from qcompile.targets import get
from qcompile.targets.cpu.matrix import Laid
from qcompile.targets.filters import ConvShape
from qcompile.targets.layout import Layout

MATRIX = tuple(name for name in TARGETS if get(name).isa.matrix is not None)
# kernel, stride, padding, input (channels, height, width), output channels
CASES = (
    (3, 2, 1, (64, 14, 14), 64),
    (1, 2, 0, (64, 14, 15), 48),
    (3, 2, 1, (20, 14, 14), 32),
    (5, 2, 2, (32, 13, 13), 32),
    (5, 3, 2, (32, 20, 21), 16),
    (2, 2, 0, (16, 14, 14), 16),
    (7, 4, 3, (16, 27, 28), 32),
    (3, (2, 1), 1, (32, 14, 14), 32),
    (3, (1, 2), 1, (32, 14, 14), 32),
    (1, 3, 0, (32, 20, 20), 32),
)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ModuleList(
            nn.Conv2d(size[0], out, kernel, stride, padding) for kernel, stride, padding, size, out in CASES
        )

    def forward(self, *xs: Tensor) -> tuple[Tensor, ...]:
        return tuple(conv(x) for conv, x in zip(self.each, xs, strict=True))


def inputs(batch: int) -> list[Tensor]:
    return [torch.randn(batch, *size) for _, _, _, size, _ in CASES]


@pytest.mark.parametrize("target", MATRIX)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_convolution_over_phases_has_the_bits_of_its_reference(
    target: str, batch: int, request: pytest.FixtureRequest
) -> None:
    skip_unless_runnable(target)
    compiled = qcompile.compile(Convolutions().eval(), target, calibration=[tuple(inputs(batch))], strict=True)
    cases = [inputs(batch) for _ in range(2)]  # the second finds in memory what the first has left there
    for case, outputs in zip(cases, run_on(compiled.artifact, cases, request), strict=True):
        wanted = compiled.program(*case)
        assert [different(got, want) for got, want in zip(outputs, wanted, strict=True)] == [0] * len(CASES)


@pytest.mark.parametrize("target", MATRIX)
@pytest.mark.parametrize(("size", "stride", "phases"), [(7, 2, True), (14, 2, False), (16, 2, False), (7, 1, False)])
def test_only_where_the_rows_of_the_output_are_short(target: str, size: int, stride: int, phases: bool) -> None:
    unit = get(target).isa.matrix
    assert unit is not None
    x = Layout((1, 64, size * stride, size * stride), True, 64, (1, 1, 1, 1))
    y = Layout((1, 64, size, size), True, 64)
    shape = ConvShape(x, y, None, (3, 3), (stride, stride), (1, 1), (1, 1), 1)
    assert (Laid.of(shape, unit).phases is not None) == phases
