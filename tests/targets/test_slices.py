"""Parts of a batch whose size is not known: counted from its end, in steps, one image of it."""

from __future__ import annotations

import pytest
import torch
from execution import CPUS, TARGETS, different, quick, run_on, skip_unless_runnable
from gpu_machine import compiling
from torch import Tensor, nn

import qcompile


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.conv(x)
        return h[0], h[-1], h[-2], h[2:], h[-5:], h[:-1], h[1:-1], h[::2], h[1::3]


@pytest.mark.parametrize("target", quick(TARGETS))
def test_a_part_of_a_dynamic_batch_is_taken_in_integers(target: str, request: pytest.FixtureRequest) -> None:
    skip_unless_runnable(target)
    with compiling():
        compiled = qcompile.compile(
            Parts().eval(),
            target,
            calibration=[torch.randn(7, 3, 5, 5)],
            dynamic_shapes=({0: torch.export.Dim("batch", min=6, max=32)},),
            strict=True,
        )
    cases = [[torch.randn(size, 3, 5, 5)] for size in (6, 7, 8, 32)]
    for inputs, outputs in zip(cases, run_on(compiled.artifact, cases, request), strict=True):
        wanted = compiled.program(*inputs)
        assert [different(got, want) for got, want in zip(outputs, wanted, strict=True)] == [0] * 9


class Nothing(nn.Module):
    """Layers whose outputs have no elements beside one that has some."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(24, 16), nn.Conv2d(24, 16, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rows = x.flatten(2).transpose(1, 2)
        return self.linear(rows[:, :0]), self.linear(rows), self.conv(x[:0]), self.conv(x)


@pytest.mark.parametrize("target", quick(CPUS))
def test_a_layer_may_have_nothing_to_compute(target: str, request: pytest.FixtureRequest) -> None:
    skip_unless_runnable(target)
    images = torch.randn(2, 24, 5, 7)
    compiled = qcompile.compile(Nothing().eval(), target, calibration=[images])
    (outputs,) = run_on(compiled.artifact, [[images]], request)
    wanted = compiled.program(images)
    assert [different(got, want) for got, want in zip(outputs, wanted, strict=True)] == [0] * 4
