"""Convolutions and linear layers that stay float take in what follows them, and compute what they did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from passing import randn, randomize
from torch import Tensor, nn

import qcompile
from qcompile.capture import capture
from qcompile.errors import ConfigError, QcompileError
from qcompile.ir import Program
from qcompile.manager import PassManager
from qcompile.ops.real import BFLOAT16, FLOAT32, FLOAT_CONV2D, FLOAT_LINEAR, NUMERICS, OPS, is_rounded
from qcompile.passes import Context, float_pipeline
from qcompile.passes.fuse_float import FuseFloat

aten = torch.ops.aten
X = randn(2, 3, 9, 8)


class Block(nn.Module):
    """Two convolutions that meet in a sum, a depthwise one, one of one dimension, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, padding="same")
        self.line = nn.Conv1d(72, 6, 3, stride=2)
        self.head = nn.Sequential(nn.Linear(3, 20), nn.ReLU6(), nn.Linear(20, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x) + self.second(x))
        x = torch.clamp(self.depthwise(x) + x, max=2.0)
        return self.head(self.line(x.flatten(1, 2)))


def fused(model: nn.Module, x: Tensor, numerics: str = FLOAT32) -> Program:
    program = capture(model, x)
    with torch.no_grad():
        PassManager(tuple(float_pipeline(numerics))).run(program, Context())
    return program


def test_what_follows_joins_and_values_stay() -> None:
    model = randomize(Block())
    program = fused(model, X)
    calls = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert [c for c in calls if c in OPS] == [FLOAT_CONV2D] * 4 + [FLOAT_LINEAR] * 2
    assert not {aten.relu.default, aten.add.Tensor, aten.clamp.default, aten.relu6.default} & set(calls)
    (y,) = program(X)
    torch.testing.assert_close(y, model(X))


def test_it_changes_nothing_a_second_time() -> None:
    program = fused(randomize(Block()), X)
    with torch.no_grad():
        (record,) = PassManager((FuseFloat(),)).run(program, Context())
    assert not record.changed


class Declines(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.conv = kind, nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "computed":
            return torch.conv2d(x, x[:, :, :1, :1].transpose(0, 1).repeat(1, 1, 1, 1)[:, :1].repeat(1, 3, 1, 1))
        y = self.conv(x)
        return torch.relu(y) + y if self.kind == "read twice" else y + y


def test_a_weight_that_is_computed_declines_with_a_reason() -> None:
    program = fused(Declines("computed"), X[:1])
    assert not any(n.target in OPS for n in program.graph.nodes)
    assert [reason for rule, _, reason in program.ledger.declined if rule == "fuse_float"] == [
        "its weight is computed at run time"
    ]


@pytest.mark.parametrize("kind", ["read twice", "added to itself"])
def test_what_is_read_elsewhere_stays(kind: str) -> None:
    model = randomize(Declines(kind))
    program = fused(model, X)
    assert any(n.target is aten.add.Tensor for n in program.graph.nodes)
    torch.testing.assert_close(program(X)[0], model(X))


def test_bfloat16_rounds_what_layers_hand_on_but_not_the_answer() -> None:
    program = fused(randomize(Block()), X, BFLOAT16)
    made = [n for n in program.graph.nodes if n.target in OPS]
    assert [is_rounded(n) for n in made] == [True] * 5 + [False]
    (y,) = program(X)
    assert not torch.equal(y, y.to(torch.bfloat16).float())


@pytest.mark.parametrize("numerics", NUMERICS)
def test_a_whole_model_compiles_without_calibration(numerics: str) -> None:
    model = randomize(Block())
    compiled = qcompile.compile(model, example_inputs=X, numerics=numerics)
    bound = 1e-5 if numerics == FLOAT32 else 2.0**-6
    for x in (X, randn(2, 3, 9, 8, seed=5)):
        got, reference, wanted = compiled(x), compiled.reference(x), model(x)
        assert (got - reference).abs().max() <= bound * reference.abs().max()
        assert (got - wanted).norm() <= 4 * bound * wanted.norm()
    kinds = {row.kind for row in compiled.coverage if "conv" in row.op or "linear" in row.op}
    assert kinds == {"float" if numerics == FLOAT32 else BFLOAT16}
    assert not any(row.kind == "integer" for row in compiled.coverage)
    assert compiled.selftest().passed


def test_bfloat16_is_a_number_format_and_not_a_detour() -> None:
    """The products of factors that bfloat16 holds exactly are exact."""
    model = nn.Linear(16, 8).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-9, 9, parameter.shape).float())
    x = torch.randint(-9, 9, (3, 16)).float()
    assert torch.equal(qcompile.compile(model, example_inputs=x, numerics="bfloat16")(x), model(x))


REFUSED: dict[str, tuple[dict[str, Any], type[QcompileError], str]] = {
    "unknown": ({"numerics": "float16"}, ConfigError, "unknown numerics 'float16'"),
    "config": ({"numerics": "bfloat16", "config": qcompile.QuantConfig()}, ConfigError, "config is given"),
    "search": ({"numerics": "bfloat16", "max_accuracy_drop": 0.1}, ConfigError, "max_accuracy_drop is given"),
    "no inputs": ({"numerics": "float32", "example_inputs": None}, QcompileError, "no example inputs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_contradictions_are_refused(name: str) -> None:
    options, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message) as caught:
        qcompile.compile(randomize(Block()), **{"example_inputs": X, **options})
    assert caught.value.remedy
