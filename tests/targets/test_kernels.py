"""Every row of the op table on every target: the kernel gives the bits of the reference."""

from __future__ import annotations

import pytest
import torch
from execution import TARGETS, mismatches, operator, program_of

from qcompile import ops
from qcompile.ops import Row


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("row", ops.ROWS, ids=lambda row: row.name)
def test_a_kernel_gives_the_bits_of_its_reference(row: Row, target: str, request: pytest.FixtureRequest) -> None:
    samples = list(row.samples(torch.Generator().manual_seed(2026)))
    program, inputs = program_of([(operator(row), sample) for sample in samples])
    assert mismatches(program, inputs, [sample.label for sample in samples], target, request) == []
