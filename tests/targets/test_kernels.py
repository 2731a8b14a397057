"""Every row of the op table on every target: the kernel gives the bits of the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from execution import TARGETS, mismatches, operator, program_of, quick

from qcompile import ops
from qcompile.ops import Act, Row, Sample
from qcompile.ops.linear import LINEAR
from qcompile.targets import get
from qcompile.targets.base import InstructionSet
from qcompile.targets.emitters import emitters_for
from qcompile.targets.nvidia import Gpu


def _with_kernels(targets: list[Any]) -> list[Any]:
    """Every row on every target that has a kernel for it. On GPUs only products differ by what they have."""

    def again(row: Row, isa: InstructionSet) -> bool:
        return isinstance(isa, Gpu) and not isa.tensor_cores and row.name not in ("conv1d", "conv2d", "linear")

    return [
        pytest.param(
            row, name, marks=[*marks, *[pytest.mark.slow] * again(row, get(name).isa)], id=f"{row.name}-{name}"
        )
        for name, marks in ((target.values[0], target.marks) for target in targets)
        for row in ops.ROWS
        if operator(row) in emitters_for(get(name))
    ]


@pytest.mark.parametrize(("row", "target"), _with_kernels(quick(TARGETS)))
def test_a_kernel_gives_the_bits_of_its_reference(row: Row, target: str, request: pytest.FixtureRequest) -> None:
    samples = list(row.samples(torch.Generator().manual_seed(2026)))
    program, inputs = program_of([(operator(row), sample) for sample in samples])
    assert mismatches(program, inputs, [sample.label for sample in samples], target, request) == []


@pytest.mark.parametrize("target", quick(TARGETS))
def test_the_largest_products_are_exact(target: str, request: pytest.FixtureRequest) -> None:
    """Every way that four neighbouring weights and activations can be as large as they get, with either sign."""
    weights, x = (
        torch.cartesian_prod(*[torch.tensor(ends, dtype=torch.int8)] * 4) for ends in ((-127, 127), (-128, 127))
    )
    zeros, m = torch.zeros(len(weights), dtype=torch.int32), torch.full((len(weights),), 1 / 1024)
    sample = Sample((Act(x), weights, zeros, m, -128, 0, -128, 127), label="extremes")
    program, inputs = program_of([(operator(LINEAR), sample)])
    assert mismatches(program, inputs, [sample.label], target, request) == []
