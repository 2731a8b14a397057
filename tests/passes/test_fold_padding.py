"""Padding joins the convolution behind it, be the two integer or float, and values stay what they were."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from passing import randn, randomize
from torch import Tensor, nn
from torch.nn.functional import pad

import qcompile
from qcompile.compiler import compile_program
from qcompile.ops.real import FLOAT_CONV2D
from qcompile.passes.fold_padding import FOLD
from qcompile.targets import get

PAD = torch.ops.aten.constant_pad_nd.default
CALIBRATION = [randn(4, 3, 11, 13, seed=s) for s in range(5)]
X = CALIBRATION[3]


class Padded(nn.Module):
    """Two convolutions that pad their sides by different amounts; `value` is what the second one pads with."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.value = value
        self.first, self.second = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 6, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(pad(x, (0, 1, 0, 2))))
        return self.second(pad(x, (2, 0, 1, 0), value=self.value))


def quantized(left: str, value: float = 0.0, **options: Any) -> qcompile.QuantizedModel:
    """With the operators whose module path or name contains `left` in float."""

    def object_to(row: Any, node: Any) -> str | None:
        return "for this test" if left and left in (*node.name.split("."), node.name) else None

    model = randomize(Padded(value))
    return qcompile.quantize(model, calibration=CALIBRATION, objection=object_to, **options)


def targets_of(model: qcompile.QuantizedModel) -> list[Any]:
    return [node.target for node in model.program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("left", ["", "conv2d", "conv2d_1", "constant_pad_nd_default", "constant_pad_nd_default_1"])
def test_padding_joins_the_convolution_whichever_is_float(left: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folded = quantized(left)
    assert PAD not in targets_of(folded)
    assert (FLOAT_CONV2D in targets_of(folded)) == left.startswith("conv")
    for module in ("fold_padding", "fuse_float"):
        monkeypatch.setattr(f"qcompile.passes.{module}.FOLD", replace(FOLD, check=lambda program, node: ""))
    apart = quantized(left)
    assert targets_of(apart).count(PAD) == 2
    if left.startswith("conv"):
        torch.testing.assert_close(folded(X), apart(X))
    else:
        assert torch.equal(folded(X), apart(X))
    compiled = compile_program(folded, get("native"), threads=1)
    got, want = compiled(X), folded(X)
    assert (got - want).abs().max() <= compiled.artifact.tolerance * want.abs().max()


@pytest.mark.parametrize("left", ["", "conv2d_1", "constant_pad_nd_default_1"])
def test_padding_by_something_else_stays(left: str) -> None:
    assert targets_of(quantized(left, value=0.75)).count(PAD) == 1


@pytest.mark.parametrize("numerics", ["float32", "bfloat16"])
def test_padding_joins_convolutions_of_a_model_without_quantization(numerics: str) -> None:
    model = randomize(Padded())
    compiled = qcompile.compile(model, example_inputs=X, numerics=numerics, threads=1)
    assert [n.target for n in compiled.program.graph.nodes if n.op == "call_function"] == [FLOAT_CONV2D] * 2
    assert (compiled(X) - model(X)).abs().max() <= (1e-3 if numerics == "float32" else 0.05) * model(X).abs().max()
