"""capture(): what cannot be compiled faithfully is refused, with the module's path, the user's line and a remedy."""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from passing import X, randn, refusal
from torch import Tensor, nn
from torch.nn import functional

import qcompile
from qcompile.errors import CaptureError, QcompileError


def names_line(error: QcompileError, code: str) -> bool:
    """Whether the error's source is the line of this file that holds `code`."""
    lines = linecache.getlines(__file__)
    (number,) = (i for i, line in enumerate(lines, 1) if line.strip() == code)
    source = str(error.source)
    return Path(__file__).name in source and str(number) in source and source.endswith(code)


class Inside(nn.Module):
    """`layer` two levels deep: at the path "body.0"."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


# --- models that cannot be captured ------------------------------------------------------------------


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + 1
        return x


class Loops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.abs().sum())):
            x = x / 2
        return x


class Conditional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))


class Draws(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class DropsAlways(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x, 0.25, training=True)


class Normalizes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm(x, None, None, training=True)


class Counts(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Overwrites(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(3)
        return x + 1


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("own trouble")


class UsesNumpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.from_numpy(x.detach().numpy())


LINES = {
    "branches on data": (Branches, "control flow on data(.|\n)*data-dependent", "if x.sum() > 0:"),
    "loops on data": (Loops, "control flow on data", "for _ in range(int(x.abs().sum())):"),
    "torch.cond": (
        Conditional,
        "control flow on data: (.*)cond",
        "return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))",
    ),
    "draws": (Draws, "randn_like draws random numbers", "return x + torch.randn_like(x)"),
    "drops": (DropsAlways, "dropout in training mode", "return functional.dropout(x, 0.25, training=True)"),
    "normalizes": (
        Normalizes,
        "batch norm without running statistics",
        "return functional.batch_norm(x, None, None, training=True)",
    ),
    "changes a buffer": (Counts, "changes its buffer '(.*)calls'", "self.calls += 1"),
    "changes its input": (Overwrites, "changes its input 'x'", "x.mul_(3)"),
    "raises": (Raises, "refuses the model(.|\n)*KeyError: 'own trouble'", 'raise KeyError("own trouble")'),
    "uses numpy": (UsesNumpy, "refuses the model(.|\n)*numpy", "return x + torch.from_numpy(x.detach().numpy())"),
}


@pytest.mark.parametrize("case", LINES)
def test_a_model_that_cannot_be_captured_is_refused_at_its_line(case: str) -> None:
    make, message, code = LINES[case]
    error = refusal(Inside(make()).eval())
    assert isinstance(error, CaptureError)
    assert re.search(message, error.what)
    assert names_line(error, code)
    if case == "changes its input":
        assert error.remedy == "change a copy: x = x + 1, not x += 1"


MODULES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "training batch norm": (lambda: nn.BatchNorm1d(4), "BatchNorm1d is in training mode"),
    "training dropout": (lambda: nn.Dropout(0.5), "Dropout is in training mode"),
    "training rrelu": (lambda: nn.RReLU(), "rrelu in training mode"),
    "NaN in a weight": (lambda: spoiled(nn.Linear(4, 3), "weight", torch.nan), "'weight' holds NaN or infinity"),
    "infinity in a bias": (lambda: spoiled(nn.Linear(4, 3), "bias", torch.inf), "'bias' holds NaN or infinity"),
    "NaN in a statistic": (
        lambda: spoiled(nn.BatchNorm1d(4).eval(), "running_var", torch.nan),
        "'running_var' holds NaN or infinity",
    ),
    "a negative variance": (
        lambda: spoiled(nn.BatchNorm1d(4).eval(), "running_var", -0.5),
        "the running variance of the batch norm is -0.5",
    ),
    "half precision": (lambda: Widened(torch.float16), "'weight' is torch.float16"),
    "double precision": (lambda: Widened(torch.float64), "'weight' is torch.float64"),
}


def spoiled(layer: nn.Module, name: str, value: float) -> nn.Module:
    """`layer` with one element of a tensor replaced."""
    tensor = getattr(layer, name).data
    tensor.view(-1)[tensor.numel() // 2] = value
    return layer


class Widened(nn.Module):
    """A weight that is not float32, in an otherwise float32 model."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(4, 4).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.float()


@pytest.mark.parametrize("case", MODULES)
def test_a_layer_that_cannot_be_compiled_is_named_by_its_path(case: str) -> None:
    make, message = MODULES[case]
    error = refusal(Inside(make()))
    assert isinstance(error, CaptureError)
    assert message in error.what
    assert error.where == "body.0"


def test_a_variance_that_eps_makes_positive_is_captured() -> None:
    quantized = qcompile.quantize(spoiled(nn.BatchNorm1d(4).eval(), "running_var", -1e-6), calibration=[X])
    assert torch.isfinite(quantized(X)).all()


@pytest.mark.parametrize(
    ("layer", "message"),
    [(nn.BatchNorm1d(4), "batch norm in training mode"), (nn.Dropout(), "dropout in training mode")],
)
def test_an_exported_program_may_be_in_training_mode_too(layer: nn.Module, message: str) -> None:
    error = refusal(torch.export.export(Inside(layer).train(), (X,)))
    assert message in error.what
    assert error.where == "body.0"
    assert "model.eval() before exporting" in str(error.remedy)


class Returns(nn.Module):
    def __init__(self, value: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Any:
        return self.value(x)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda x: None, "returns nothing"),
        (lambda x: (x * 2, 3), "returns a int"),
        (lambda x: {"y": x * 2, "name": "x"}, "returns a str"),
    ],
)
def test_a_model_returns_tensors(value: Callable[[Tensor], Any], message: str) -> None:
    assert message in refusal(Returns(value)).what


@pytest.mark.parametrize("model", [None, nn.ReLU, torch.relu, "model.pt"])
def test_what_is_no_model_is_refused_by_its_type(model: Any) -> None:
    error = refusal(model)
    assert isinstance(error, CaptureError)
    assert error.what == f"the model is a {type(model).__name__}"


def test_torchscript_is_refused() -> None:
    for model in (torch.jit.trace(nn.ReLU(), X), torch.jit.script(nn.ReLU())):
        assert "TorchScript" in refusal(model).what


def test_dynamic_shapes_that_do_not_fit_pass_on_what_torch_says() -> None:
    error = refusal(nn.Linear(4, 3).eval(), dynamic_shapes=({1: torch.export.Dim("features")},))
    assert "the dynamic shapes do not fit the model" in error.what
    assert "features = 4" in error.what


BATCH = torch.export.Dim("batch", max=8)


@pytest.mark.parametrize("axis", [2, 5, -1, "0"], ids=repr)
def test_a_dynamic_axis_that_an_input_has_not_is_named_with_the_input(axis: Any) -> None:
    for shapes in (({axis: BATCH},), {"input": {axis: BATCH}}):
        error = refusal(nn.Linear(4, 3).eval(), dynamic_shapes=shapes)
        assert isinstance(error, CaptureError)
        assert error.what == f"dynamic_shapes names the axis {axis!r} of the input 'input' of shape (2, 4)"
        assert error.remedy == "name its axes by the numbers 0 to 1"


def test_a_dynamic_axis_of_a_nested_input_is_named_too() -> None:
    class Sum(nn.Module):
        def forward(self, pair: dict[str, list[Tensor]]) -> Tensor:
            return pair["of"][0] + pair["of"][1]

    nested = {"pair": {"of": [{0: BATCH}, {3: BATCH}]}}
    error = refusal(Sum(), [({"of": [X, X]},)], dynamic_shapes=nested)
    assert "the axis 3 of the input 'pair.of.1'" in error.what


def test_dynamic_shapes_of_no_known_form_are_refused() -> None:
    assert refusal(nn.Linear(4, 3).eval(), dynamic_shapes=3).what == "dynamic_shapes is a int"


def test_bounds_that_no_size_meets_are_about_the_dynamic_shapes() -> None:
    error = refusal(nn.Linear(4, 3).eval(), dynamic_shapes=({0: torch.export.Dim("batch", max=1)},))
    assert "the dynamic shapes do not fit the model" in error.what


def test_weights_without_values_are_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    with pytest.raises(CaptureError, match=r"no values(.|\n)*0\.weight(.|\n)*load the weights"):
        qcompile.quantize(model, calibration=[torch.randn(1, 3, 8, 8)])
