"""A large batch is computed in parts: with the same bits, and only where every operator looks at samples one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from execution import CPUS, different, quick, run_on, skip_unless_runnable
from torch import Tensor, nn

import qcompile
from qcompile.targets import get, parts
from qcompile.targets.emitters import emitters_for
from qcompile.targets.lower import lower

BATCH, SIZE = 6, 2


class Network(nn.Module):
    """Two inputs and two outputs, one of them with channels that no vector fills."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(4, 16, 3, padding=1)
        self.down, self.head = nn.Conv2d(16, 5, 3, stride=2), nn.Linear(5 * 7 * 7, 11)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = self.down(torch.relu(self.one(x) + self.two(y)))
        return z, self.head(z.flatten(1))


def inputs(batch: int = BATCH) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, 16, 16), torch.randn(batch, 4, 16, 16)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caches hold two samples of the network."""
    monkeypatch.setattr(parts, "BYTES", SIZE * 16 * 16 * (3 * 16 + 4))


def size_of_part(model: nn.Module, *example: Tensor) -> int | None:
    """How many samples the kernels of the compiled model are made for; None where they are made for all."""
    program = qcompile.quantize(model.eval(), calibration=[example]).program
    return parts.part_of(program, {n: tuple(n.meta["val"].shape) for n in program.graph.nodes if "val" in n.meta})


@pytest.mark.parametrize("target", quick(CPUS))
def test_a_batch_in_parts_has_the_bits_of_the_whole(target: str, small: None, request: pytest.FixtureRequest) -> None:
    skip_unless_runnable(target)
    compiled = qcompile.compile(Network().eval(), target, calibration=[inputs()], strict=True)
    module = lower(compiled.program, get(target), emitters_for(get(target))).module
    assert int(module[parts.PART].params[0].ty.shape[0]) == SIZE
    cases = [list(inputs()) for _ in range(2)]
    for case, outputs in zip(cases, run_on(compiled.artifact, cases, request), strict=True):
        wanted = compiled.program(*case)
        assert [different(got, want) for got, want in zip(outputs, wanted, strict=True)] == [0, 0]


def test_a_profile_counts_every_part(small: None) -> None:
    compiled = qcompile.compile(Network().eval(), calibration=[inputs()])
    found = compiled.profile(*inputs(), seconds=0.05)
    assert sum(row.macs for row in found.rows) == BATCH * (256 * 16 * 9 * (3 + 4) + 49 * 5 * 16 * 9 + 5 * 49 * 11)
    assert [row.kernel for row in found.rows].count("join") == 1
    assert {row.op for row in found.rows} >= {"quantize", "conv2d", "linear", "dequantize", "copy"}


def test_a_batch_that_fits_the_caches_is_computed_at_once() -> None:
    assert size_of_part(Network(), *inputs()) is None


def test_a_part_divides_the_batch(small: None) -> None:
    assert [size_of_part(Network(), *inputs(batch)) for batch in (1, 2, 3, 8, 9)] == [None, None, 1, 2, 1]


class Calls(nn.Module):
    """A convolution, and what is done to its result."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 16, 3, padding=1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda z: z[1:],
        lambda z: z.transpose(0, 1).contiguous() * 1.0,
        lambda z: z.reshape(BATCH // 2, 2, 16, 256),
        lambda z: z + torch.ones(BATCH, 1, 1, 1),
        lambda z: torch.fft.fft(z, dim=0).abs(),
        lambda z: z.cumsum(0),
    ],
)
def test_samples_that_meet_are_computed_at_once(small: None, function: Callable[[Tensor], Tensor]) -> None:
    assert size_of_part(Calls(torch.relu), inputs()[0]) == BATCH // 2
    assert size_of_part(Calls(function), inputs()[0]) is None


def test_a_part_begins_where_vectors_can_be_loaded(small: None) -> None:
    uneven = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU())
    assert size_of_part(uneven, torch.randn(BATCH, 3, 15, 15)) is None  # 2700 bytes a sample
    assert size_of_part(uneven, torch.randn(64, 3, 15, 15)) == 16
