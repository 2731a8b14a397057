"""A network trained here, on real labels: what integers cost in accuracy."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from examples import digits
from qcompile.config import QuantConfig

Trained = tuple[digits.Digits, nn.Module, float]


@pytest.fixture(
    scope="module",
    params=[0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))],
    ids="seed{}".format,
)
def trained(request: pytest.FixtureRequest) -> Trained:
    data = digits.load(request.param)
    model = digits.train(digits.network(request.param), data.images, data.labels)
    accuracy = digits.accuracy(model, data.held_out_images, data.held_out_labels)
    assert accuracy > 0.97
    return data, model, accuracy


@pytest.mark.parametrize(
    ("config", "points"),
    [
        (QuantConfig(), 0.3),
        (QuantConfig(preset="best"), 0.3),
        (QuantConfig(preset="best", weight_bits=4), 1.0),
    ],
    ids=["int8", "int8 best", "int4 weights best"],
)
def test_integers_keep_the_accuracy_on_digits(trained: Trained, config: QuantConfig, points: float) -> None:
    data, model, accuracy = trained
    compiled = digits.compile(model, data.images, config)
    assert torch.equal(compiled(data.held_out_images[:50]), compiled.reference(data.held_out_images[:50]))
    assert digits.accuracy(compiled, data.held_out_images, data.held_out_labels) >= accuracy - points / 100
