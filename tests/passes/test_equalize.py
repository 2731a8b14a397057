"""equalize: the same values from channels of like strength, wherever a factor can pass; elsewhere it says why not."""

from __future__ import annotations

import pytest
import torch
from networks import images
from passing import matches_golden, randn, randomize, run_until, same_values, sqnr
from torch import Tensor, nn
from uneven import SIZE, separable, uneven

import qcompile
from qcompile.channels import LAYERS, Link, bias_of, columns, link, rows, weight_of
from qcompile.config import QuantConfig
from qcompile.ir import Program
from qcompile.passes import Context, default_pipeline
from qcompile.passes.equalize import Equalize, strength

PIPELINE = default_pipeline().after("fold_batchnorm", Equalize())
RELU = nn.ReLU()


def equalized(model: nn.Module, *inputs: Tensor) -> tuple[Program, bool]:
    """The float graph behind the pass, and whether it changed anything."""
    program = run_until("fold_batchnorm", randomize(model), inputs)
    return program, Equalize().run(program, Context())


def spread(program: Program) -> float:
    """How far apart the two sides of a channel are at most, over all links: the ratio of their strengths."""
    links = [found for node in program.graph.nodes if isinstance(found := _link(node), Link)]
    sides = [
        (
            strength(weight_of(program, each.maker), bias_of(program, each.maker)),
            torch.cat([columns(r, weight_of(program, r)) for r in each.readers], 1).abs().amax(1),
        )
        for each in links
    ]
    ratios = [(one / other).log().abs().max().exp() for one, other in sides]
    return float(torch.stack(ratios).max())


def _link(node: torch.fx.Node) -> Link | str:
    return link(node) if node.target in LAYERS else ""


IMAGE = (2, 3, 9, 9)
FIRES = {
    "conv relu conv": ((nn.Conv2d(3, 8, 3), RELU, nn.Conv2d(8, 4, 3, padding=1)), IMAGE),
    "no activation": ((nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 4, 1)), IMAGE),
    "leaky relu": ((nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.3), nn.Conv2d(8, 4, 1)), IMAGE),
    "prelu": ((nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.Conv2d(8, 4, 1)), IMAGE),
    "one slope": ((nn.Linear(6, 8), nn.PReLU(), nn.Linear(8, 4)), (2, 5, 6)),
    "depthwise": ((nn.Conv2d(3, 8, 1), RELU, nn.Conv2d(8, 8, 3, groups=8), RELU, nn.Conv2d(8, 4, 1)), IMAGE),
    "multiplier": ((nn.Conv2d(3, 8, 1), RELU, nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 4, 1)), IMAGE),
    "grouped": ((nn.Conv2d(4, 12, 1, groups=2), RELU, nn.Conv2d(12, 6, 3, groups=3)), (2, 4, 9, 9)),
    "conv1d": ((nn.Conv1d(3, 8, 3), RELU, nn.Conv1d(8, 4, 3, groups=2)), (2, 3, 9)),
    "linear": ((nn.Linear(6, 8), RELU, nn.Linear(8, 4)), (2, 6)),
    "linear over a sequence": ((nn.Linear(6, 8), RELU, nn.Linear(8, 4)), (2, 5, 6)),
    "pooled": ((nn.Conv2d(3, 8, 2), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Conv2d(8, 4, 1)), IMAGE),
    "head": ((nn.Conv2d(3, 8, 3), RELU, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)), IMAGE),
}


@pytest.mark.parametrize("case", FIRES)
def test_both_sides_of_every_channel_become_alike_and_the_values_stay(case: str) -> None:
    layers, shape = FIRES[case]
    model = nn.Sequential(*layers)
    before = spread(run_until("fold_batchnorm", randomize(model), (randn(*shape),)))
    program, changed = equalized(model, randn(*shape))
    assert changed
    assert before > 1.5
    assert spread(program) < 1.002
    assert same_values(program, model, (randn(*shape, seed=1),))
    assert not Equalize().run(program, Context())


class TwoReaders(nn.Module):
    """A relu that two convolutions read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        return self.a(y) + self.b(y)


def test_several_layers_may_read_the_channels() -> None:
    model = TwoReaders()
    program, changed = equalized(model, randn(1, 3, 7, 7))
    assert changed
    assert spread(program) < 1.002
    assert same_values(program, model, (randn(1, 3, 7, 7, seed=1),))
    assert matches_golden("equalize", program)


class SharedWeight(nn.Module):
    """One convolution used twice: each use may come to need other weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.twice(torch.relu(self.first(x)))
        return self.twice(torch.sigmoid(y))


def test_a_weight_that_two_layers_share_is_kept_for_the_other() -> None:
    model = SharedWeight()
    program, changed = equalized(model, randn(1, 3, 5, 5))
    assert changed
    assert same_values(program, model, (randn(1, 3, 5, 5, seed=1),))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        return self.second(y) + y


class WeightOfInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.linear(self.layer(x), weight)


class AcrossChannels(nn.Module):
    """A linear layer over the width of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 5, 1), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x))


X = (randn(1, 3, 7, 7),)
DECLINES = {
    "relu6": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 4, 1)), X, "clamps to 0.0 and 6.0"),
    "sigmoid": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 4, 1)), X, "f(s x) = s f(x)"),
    "residual": (Residual(), (randn(1, 4, 5, 5),), "aten.add.Tensor"),
    "output": (nn.Conv2d(3, 4, 1), X, "output of the model"),
    "space in the features": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(100, 2)), X, "moves the"),
    "computed weights": (WeightOfInput(), (randn(2, 4), randn(3, 6)), "at run time"),
    "no batch": (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)), (randn(3, 5, 5),), "no batch dimension"),
    "another dimension": (AcrossChannels(), X, "another dimension"),
}


@pytest.mark.parametrize("case", DECLINES)
def test_declines_with_a_reason_and_changes_nothing(case: str) -> None:
    model, inputs, reason = DECLINES[case]
    program, changed = equalized(model, *inputs)
    assert not changed
    said = [why for rule, _, why in program.ledger.declined if rule == "equalize"]
    assert any(reason in why for why in said), said
    assert same_values(program, model, inputs, 0.0)


def test_a_dead_channel_keeps_its_strength() -> None:
    """Without weights on one side there is nothing to be alike to."""
    first, second = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)
    model = randomize(nn.Sequential(first, nn.ReLU(), second))
    first.weight.data[2] = first.bias.data[2] = 0  # type: ignore[union-attr]
    second.weight.data[:, 4] = 0
    program = run_until("fold_batchnorm", model, X)
    assert Equalize().run(program, Context())
    makes, reads = (node for node in program.graph.nodes if "conv2d" in str(node.target))
    assert torch.equal(rows(weight_of(program, makes))[4], rows(first.weight.detach().double())[4])
    assert torch.equal(columns(reads, weight_of(program, reads))[2], second.weight.detach().double()[:, 2, 0, 0])
    assert same_values(program, model, (randn(1, 3, 7, 7, seed=2),))


def test_a_channel_of_nothing_but_a_bias_is_not_made_the_strongest() -> None:
    """As a batch norm leaves it whose weight has gone to zero."""
    first = nn.Conv2d(3, 6, 1)
    model = randomize(nn.Sequential(first, nn.ReLU(), nn.Conv2d(6, 4, 1)))
    first.weight.data[1] *= 1e-6
    first.bias.data[1] = 0.5  # type: ignore[union-attr]
    program = run_until("fold_batchnorm", model, X)
    assert Equalize().run(program, Context())
    maker = next(node for node in program.graph.nodes if "conv2d" in str(node.target))
    bias = bias_of(program, maker)
    assert bias[1] < 3 * rows(weight_of(program, maker)).abs().max()
    assert same_values(program, model, (randn(1, 3, 7, 7, seed=3),))


def test_a_rewrite_limit_counts_links() -> None:
    model = randomize(nn.Sequential(*FIRES["depthwise"][0]))
    program = run_until("fold_batchnorm", model, (randn(2, 3, 9, 9),))
    limited = Context(rewrite_limit=1)
    assert Equalize().run(program, limited)
    assert limited.rewrites == [("equalize", "conv2d")]
    assert same_values(program, model, (randn(2, 3, 9, 9, seed=1),))


def test_uneven_channels_are_won_back() -> None:
    """A network whose channels differ by factors up to 256 is as good as before they did, and exact."""
    x, data = images(16, SIZE, seed=5), list(images(32, SIZE, seed=4).split(1))
    even = separable()
    want = even(x).detach()
    spoilt = uneven(separable())
    torch.testing.assert_close(spoilt(x), want, rtol=1e-3, atol=1e-4)

    def quality(model: nn.Module, pipeline: qcompile.passes.Pipeline) -> float:
        quantized = qcompile.quantize(model, calibration=data, config=QuantConfig(observer="mse"), pipeline=pipeline)
        return sqnr(want, torch.cat([quantized(image) for image in x.split(1)]))

    before, lost, back = (
        quality(even, default_pipeline()),
        quality(spoilt, default_pipeline()),
        quality(spoilt, PIPELINE),
    )
    assert lost < before - 8
    assert back > before - 1


def test_an_equalized_model_is_exact() -> None:
    compiled = qcompile.compile(
        uneven(separable()), calibration=list(images(16, SIZE, seed=4).split(1)), pipeline=PIPELINE
    )
    assert "equalize" in [step.name for step in compiled.artifact.passes]
    for image in images(4, SIZE, seed=6).split(1):
        assert torch.equal(compiled(image), compiled.reference(image))


def test_a_weight_in_another_memory_order_is_read_as_it_is() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3)))
    last: nn.Conv2d = model[2]  # type: ignore[index]
    last.weight.data = last.weight.data.contiguous(memory_format=torch.channels_last)
    program = run_until("fold_batchnorm", model, (randn(1, 4, 7, 7),))
    assert Equalize().run(program, Context())
    assert spread(program) < 1.002
    assert same_values(program, model, (randn(1, 4, 7, 7, seed=1),))
