"""Linear layers between floats on every target: a dynamic number of rows, and every length of group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from execution import CPUS, artifact_of, different, operator, program_of, quick, run_on, skip_unless_runnable
from torch import Tensor

from qcompile.ops import Act, Sample
from qcompile.ops.linear_float import LINEAR_DYNAMIC, LINEAR_WEIGHT_ONLY
from qcompile.ops.row import random_int8
from qcompile.targets import get
from qcompile.targets.cpu.linear_weight_only import NIBBLES, pack, tile_of

BATCH = (1, 15)


def calls(g: torch.Generator, rows: int) -> list[tuple[Any, Sample]]:
    """Odd numbers of features; groups that end within, at and beyond the row; bytes and nibbles."""
    made = []

    def size(most: int) -> int:
        return int(torch.randint(1, most, (1,), generator=g))

    for most, group_size in ((127, 8), (127, 1000), (7, 8), (7, 24), (7, 1000)):
        features, outputs = size(90), size(150)
        weight = random_int8(g, outputs, features, lo=-most, hi=most)
        scale = torch.rand(outputs, -(-features // group_size), generator=g)
        x, bias = torch.randn(rows, features, generator=g), torch.randn(outputs, generator=g)
        made.append(
            (LINEAR_WEIGHT_ONLY, Sample((Act(x), weight, scale, bias, group_size), label=f"groups {group_size}"))
        )
        made.append((LINEAR_DYNAMIC, Sample((Act(x), weight, scale[:, 0].clone(), bias), label="dynamic")))
    return [(operator(row), sample) for row, sample in made]


@pytest.mark.parametrize("target", quick(CPUS))
def test_any_number_of_rows_gives_the_bits_of_the_reference(target: str, request: pytest.FixtureRequest) -> None:
    skip_unless_runnable(target)
    g = torch.Generator().manual_seed(17)
    program, inputs = program_of(calls(g, BATCH[1]), BATCH)
    cases: list[list[Tensor]] = [[torch.randn(n, x.shape[1], generator=g) for x in inputs] for n in (1, 5, 6, 13, 15)]
    for case, outputs in zip(cases, run_on(artifact_of(program, get(target)), cases, request), strict=True):
        for got, want in zip(outputs, program(*case), strict=True):
            assert different(got, want) == 0


def test_nibbles_hold_two_weights_a_byte_wherever_all_fit() -> None:
    g = torch.Generator().manual_seed(3)
    for most, bits in ((7, 4), (8, 8), (127, 8)):
        weight = random_int8(g, 64, 128, lo=-most, hi=most)
        weight[0, 0] = most
        assert pack(weight.numpy(), vectors=2).data.nbytes == 64 * 128 * bits // 8
    ends = torch.tensor([[-7, 7, 0, -1, 1, -6, 6, 3]], dtype=torch.int8)
    (word,) = pack(ends.numpy(), vectors=1).data[0, 0, :1].view("uint32").tolist()
    assert [((word >> 4 * i) % 16 + 8) % 16 - 8 for i in range(NIBBLES)] == ends[0].tolist()


@pytest.mark.parametrize("target", quick(CPUS))
def test_the_tile_fits_the_registers(target: str) -> None:
    isa = get(target).isa
    for rows in (1, 2, 5, 128):
        for outputs in (1, 16, 40, 768, 4096):
            tall, vectors = tile_of(rows, outputs, isa)
            assert 1 <= tall <= rows
            assert -(-outputs // 16) % vectors == 0
            assert (tall + 1) * vectors * 16 < isa.registers * isa.lanes
