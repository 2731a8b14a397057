"""Bad data and bad options end in an error that says what to do; the user's model stays as it was, whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from passing import X, randn, randomize, refusal, sqnr
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import qcompile
from qcompile.errors import CalibrationError, CaptureError, ConfigError, PassError, QcompileError
from qcompile.ir import Program, Property
from qcompile.passes import Context, Pass, default_pipeline

# --- example inputs, calibration, configuration -------------------------------------------------------


class Stream(IterableDataset[Tensor]):
    """Has no length."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(randn(8, 4))


def failing() -> Iterator[Tensor]:
    yield X
    raise OSError("the disk is gone")


DATA: dict[str, tuple[Any, str, str | None]] = {
    "none": (None, "no calibration data", None),
    "empty": ([], "the calibration data is empty", None),
    "a read generator": (iter(()), "the calibration data is empty", None),
    "a tensor": (X, "the calibration data is one Tensor", None),
    "an array": (X.numpy(), "the calibration data is one ndarray", None),
    "a dict": ({"input": X}, "the calibration data is one dict", None),
    "a number": (3, "the calibration data is a int, which is not iterable", None),
    "raises": (failing(), "the calibration data raised OSError: the disk is gone", "calibration batch 1"),
    "float64": ([X.double()], "the example input 0 is torch.float64", None),
    "float64, by name": ([{"input": X.double()}], "the example input 'input' is torch.float64", None),
    "no input": ([None], "no example inputs", None),
    "another shape later": ([X, randn(2, 5)], "'input' has shape (2, 5)", "calibration batch 1"),
    "NaN at once": ([X / 0 * 0], "'input' holds NaN or infinity", "calibration batch 0"),
}


@pytest.mark.parametrize("case", DATA)
def test_bad_calibration_data_is_refused(case: str) -> None:
    data, message, where = DATA[case]
    error = refusal(nn.Linear(4, 3).eval(), data)
    assert isinstance(error, CalibrationError)
    assert message in error.what
    assert error.where == where


def test_an_exported_program_needs_calibration_all_the_same() -> None:
    exported = torch.export.export(nn.Linear(4, 3).eval(), (X,))
    assert "no calibration data" in refusal(exported, None).what
    assert "is empty" in refusal(exported, []).what


def test_data_without_a_length_is_as_good_as_any() -> None:
    told: list[tuple[str, int, int | None]] = []
    qcompile.quantize(
        nn.Linear(4, 3).eval(),
        calibration=DataLoader(Stream(), batch_size=2),
        progress=lambda *args: told.append(args),
    )
    assert told == [("calibrate", i, None) for i in (1, 2, 3, 4)]


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def test_a_missing_example_input_is_named() -> None:
    error = refusal(Two(), [X])
    assert isinstance(error, CaptureError)
    assert "'y'" in error.what
    assert error.source is None  # no line of the user's is to blame


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"observer": "histogram"}, "unknown observer 'histogram'"),
        ({"percentile": 12.0}, "percentile is 12.0"),
        ({"averaging": 0.0}, "averaging is 0.0"),
        ({"exclude": "head"}, "exclude is 'head'"),
        ({"exclude": ("",)}, "exclude is"),
    ],
)
def test_a_configuration_is_checked_when_it_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        qcompile.QuantConfig(**options)
    assert caught.value.remedy


def test_a_configuration_is_a_quant_config() -> None:
    assert isinstance(refusal(nn.ReLU(), config={"observer": "minmax"}), ConfigError)


# --- what must work -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 0.5], ids=["all zero", "constant"])
def test_a_channel_of_one_value_compiles(value: float) -> None:
    """In the weights, and in the activations behind them."""
    conv = nn.Conv2d(3, 4, 3)
    model = randomize(nn.Sequential(conv, nn.ReLU(), nn.Conv2d(4, 4, 1)))
    assert conv.bias is not None
    conv.weight.data[1], conv.weight.data[2], conv.bias.data[2] = value, 0, value
    x = randn(1, 3, 6, 6)
    compiled = qcompile.compile(model, calibration=[x], strict=True)
    assert torch.equal(compiled(x), compiled.reference(x))
    assert sqnr(model(x).detach(), compiled(x)) > 30


# --- the model is the user's ---------------------------------------------------------------------------


def state(model: nn.Module) -> dict[str, Any]:
    """Everything of `model` that compiling could change."""
    return {
        "tensors": {k: v.clone() for k, v in model.state_dict().items()},
        "same objects": [id(p) for p in model.parameters()],
        "gradients": [p.requires_grad for p in model.parameters()],
        "training": {name: module.training for name, module in model.named_modules()},
        "members": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    torch.testing.assert_close(after.pop("tensors"), before.pop("tensors"), rtol=0, atol=0, equal_nan=True)
    assert after == before


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 3))
    randomize(model)
    model[0].weight.requires_grad_(False)
    return model


def test_a_compiled_model_is_not_modified() -> None:
    model = network()
    before = state(model)
    qcompile.compile(model, calibration=[X])
    assert_same(before, state(model))


def test_the_program_does_not_follow_the_model() -> None:
    model = network()
    quantized = qcompile.quantize(model, calibration=[X])
    expected = quantized(X)
    for parameter in model.parameters():
        parameter.data.fill_(7)
    assert torch.equal(quantized(X), expected)


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x


FAILS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "in training": (lambda: network().train(), {}),
    "one layer in training": (lambda: _train_one(network()), {}),
    "NaN": (lambda: _with_nan(network()), {}),
    "control flow": (lambda: nn.Sequential(network(), Branches()).eval(), {}),
    "calibration": (network, {"calibration": [X, X / 0]}),
    "strict": (lambda: nn.Sequential(network(), nn.Softmax(1)).eval(), {"strict": True}),
}


@pytest.mark.parametrize("case", FAILS)
def test_a_model_that_fails_to_compile_is_not_modified(case: str) -> None:
    make, options = FAILS[case]
    model = make()
    before = state(model)
    with pytest.raises(QcompileError):
        qcompile.compile(model, **{"calibration": [X], **options})
    assert_same(before, state(model))


def _train_one(model: nn.Sequential) -> nn.Module:
    model[3].train()
    return model


def _with_nan(model: nn.Sequential) -> nn.Module:
    with torch.no_grad():
        next(model[4].parameters())[1] = torch.nan
    return model


def test_an_empty_batch_is_refused() -> None:
    shapes = ({0: torch.export.Dim.AUTO},)
    with pytest.raises(CalibrationError, match=r"'input' (is empty|has shape \(0, 4\))(.|\n)*calibration batch 1"):
        qcompile.quantize(network(), calibration=[randn(2, 4), torch.randn(0, 4)], dynamic_shapes=shapes)
    with pytest.raises(CalibrationError, match=r"'input' is empty(.|\n)*calibration batch 0"):
        qcompile.quantize(network(), calibration=[torch.randn(0, 4)])


def test_a_pass_that_puts_nan_into_a_weight_is_found_out() -> None:
    @dataclass(frozen=True)
    class Spoil(Pass):
        name: ClassVar[str] = "spoil"
        requires: ClassVar[frozenset[Property]] = frozenset({Property.FLOAT})
        establishes: ClassVar[frozenset[Property]] = frozenset()

        def run(self, program: Program, context: Context) -> bool:
            for value in program.graph_module.state_dict().values():
                value.fill_(float("nan")) if value.is_floating_point() else None
            return True

    pipeline = default_pipeline().after("canonicalize", Spoil())
    with pytest.raises(PassError, match=r"'spoil' left an illegal graph: the constant \w+ holds NaN"):
        qcompile.quantize(network(), calibration=[randn(2, 4)], pipeline=pipeline)
