"""What cannot be asked of a GPU is refused with a reason; what can be done with its models without one, can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gpu_machine
import pytest
import torch
from passing import images, network, randn
from torch import nn
from typer.testing import CliRunner

import qcompile
from qcompile import device
from qcompile.cli import app
from qcompile.compiled import CompiledModel
from qcompile.errors import BuildError, ConfigError, DeviceError, StrictError

TARGET = "cuda-sm_80"
pytestmark = pytest.mark.skipif(bool(gpu_machine.unavailable()), reason=gpu_machine.unavailable())


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_gpu", lambda: "has no NVIDIA GPU")


@pytest.fixture(scope="module")
def compiled() -> CompiledModel:
    with gpu_machine.compiling(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "_gpu", lambda: "has no NVIDIA GPU")
        return qcompile.compile(network(), TARGET, calibration=images(4), strict=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"threads": 2}, "threads is 2, and cuda-sm_80 is a GPU"),
        ({"numerics": "bfloat16"}, "numerics is 'bfloat16', and cuda-sm_80 has kernels for int8 alone"),
        ({"max_accuracy_drop": 0.01}, "max_accuracy_drop is 0.01, and cuda-sm_80 has kernels for int8 alone"),
    ],
)
def test_what_has_no_meaning_on_a_gpu_is_refused_before_any_work(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        qcompile.compile(nn.Sequential(), TARGET, **given)  # which could not even be captured


class Softmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(x)
        return torch.softmax(y, 1)


def test_an_operator_that_stays_float_is_named_with_line_and_remedy() -> None:
    with gpu_machine.compiling(), pytest.raises(BuildError) as caught:
        qcompile.compile(Softmax().eval(), TARGET, calibration=images(4))
    said = str(caught.value)
    assert "aten.softmax.int stays float, and cuda-sm_80 has kernels for integers alone: no integer operator" in said
    assert "torch.softmax(y, 1)" in said
    assert "keep it outside of the compiled model" in said


class View(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.conv(x), x[:, :2]


def test_an_output_that_is_a_part_of_an_input_is_named_with_the_reason() -> None:
    with gpu_machine.compiling(), pytest.raises(BuildError, match="it moves floats") as caught:
        qcompile.compile(View().eval(), TARGET, calibration=images(4), strict=True)
    assert "x[:, :2]" in str(caught.value)


def test_a_layer_that_was_excluded_is_named_with_the_reason() -> None:
    config = qcompile.QuantConfig(exclude=(nn.Conv2d,))
    with gpu_machine.compiling(), pytest.raises(BuildError, match=r"stays float.*excluded by the configuration"):
        qcompile.compile(network(), TARGET, calibration=images(4), config=config)


def test_strict_does_not_offer_what_the_gpu_cannot_do() -> None:
    with gpu_machine.compiling(), pytest.raises(StrictError, match="keep them outside") as caught:
        qcompile.compile(Softmax().eval(), TARGET, calibration=images(4), strict=True)
    assert "strict=False" not in str(caught.value)


def test_without_a_gpu_its_model_is_saved_inspected_and_compared_but_not_run(
    compiled: CompiledModel, tmp_path: Path
) -> None:
    x = randn(1, 3, 10, 10)
    assert compiled.target == TARGET
    assert compiled.reference(x).shape == compiled.reference(x.numpy()).shape
    path = tmp_path / "model.qcm"
    compiled.save(path)
    data = images(2)
    for use in (
        lambda: compiled(x),
        compiled.selftest,
        compiled.benchmark,
        lambda: compiled.profile(x),
        lambda: qcompile.evaluate(compiled, network(), data),
        lambda: qcompile.load(path),
    ):
        with pytest.raises(DeviceError, match=TARGET):
            use()
    qcompile.diagnose(compiled, network(), data)
    qcompile.export_onnx(compiled, tmp_path / "model.onnx")
    shown = CliRunner().invoke(app, ["inspect", str(path)]).output
    assert TARGET in shown
    assert "has no NVIDIA GPU" in shown


@pytest.mark.parametrize(
    ("found", "marked"), [((8, 6), "cuda-sm_80"), ((6, 1), "cuda-sm_61"), ("has no NVIDIA GPU", "")]
)
def test_the_list_of_targets_says_which_one_cuda_is(found: Any, marked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_gpu", lambda: found)
    shown = CliRunner().invoke(app, ["targets"]).output.splitlines()
    assert [row.split()[1] for row in shown if "runs: cuda" in row] == ([marked] if marked else [])
