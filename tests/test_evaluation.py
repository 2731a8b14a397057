"""evaluate(): quality from the outputs, storage from the weights and the artifact."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.errors import InputError
from qcompile.evaluation import interleave


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(1, 3, 8, 8, generator=g) for _ in range(12)]


@pytest.fixture(scope="module")
def compiled(model: nn.Module, images: list[Tensor]) -> qcompile.CompiledModel:
    return qcompile.compile(model, calibration=images)


def test_evaluation_measures_what_it_says(
    compiled: qcompile.CompiledModel, model: nn.Module, images: list[Tensor]
) -> None:
    found = qcompile.evaluate(compiled, model, images, blocks=1)
    with torch.no_grad():
        expected, actual = (torch.cat([f(x) for x in images]) for f in (model, compiled))
    noise = (expected - actual).double().square().sum()
    assert found.samples == 12
    assert found.sqnr == pytest.approx(10 * math.log10(expected.double().square().sum() / noise), abs=1e-3)
    assert found.agreement == float((expected.argmax(1) == actual.argmax(1)).double().mean())
    assert found.float_bytes == 4 * (8 * 27 + 8 + 5 * 288 + 5)
    assert found.int8_bytes == len(compiled.artifact.to_bytes())
    assert found.speedup == pytest.approx(found.float_ms / found.int8_ms)  # type: ignore[operator]
    assert found.float_accuracy is None


def test_labels_give_accuracy(compiled: qcompile.CompiledModel, model: nn.Module, images: list[Tensor]) -> None:
    with torch.no_grad():
        labelled = [(x, model(x).argmax(1)) for x in images]
    labelled[0] = (labelled[0][0], (labelled[0][1] + 1) % 5)  # one label that the float model gets wrong
    found = qcompile.evaluate(compiled, model, labelled, labels=True, blocks=0)
    assert found.float_accuracy == 11 / 12
    assert found.int8_accuracy is not None
    assert found.float_ms is found.int8_ms is found.speedup is None


def test_no_data_is_an_error(compiled: qcompile.CompiledModel, model: nn.Module) -> None:
    with pytest.raises(InputError, match="no data"):
        qcompile.evaluate(compiled, model, [])


def test_interleaving_takes_turns() -> None:
    order: list[str] = []
    assert len(interleave((lambda: order.append("a"), lambda: order.append("b")), blocks=2)) == 2
    assert "".join(order) == "aaaaabbbbb" * 3
