"""compile() with options: a dynamic batch, how to quantize, and what stays float."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from passing import images, network, randn, randomize, sqnr
from torch import Tensor, nn
from torch.export import Dim

import qcompile
from qcompile.config import OBSERVERS
from qcompile.errors import ConfigError, InputError, StrictError
from qcompile.runtime import Model

X = randn(1, 3, 10, 10)


def floats(model: Model) -> dict[str, str]:
    """Operator -> reason, of what stayed float."""
    return {row.op.split(".")[1]: row.reason for row in model.coverage if row.kind == "float"}


# --- dynamic batch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", [1, 2], ids="example of {}".format)
def test_one_artifact_takes_every_batch_within_its_bounds(example: int, tmp_path: Path) -> None:
    shapes = ({0: Dim("batch", min=1, max=6)},)
    model = qcompile.compile(network(), calibration=images(4, example), dynamic_shapes=shapes)
    assert model.inputs[0].shape[0] == model.outputs[0].shape[0] == ("batch", 1, 6)
    model.save(tmp_path / "model.qcm")
    loaded = qcompile.load(tmp_path / "model.qcm")
    x = randn(6, 3, 10, 10)
    for batch in (6, 1, 3):
        assert torch.equal(model(x[:batch]), model.reference(x[:batch]))
        assert torch.equal(loaded(x[:batch]), model(x)[:batch])
    for batch in (0, 7):
        for call in (model, model.reference, loaded):
            with pytest.raises(InputError, match=r"dimension 0 \(batch\) is out of bounds"):
                call(randn(batch, 3, 10, 10))


def test_a_batch_without_a_bound_has_the_name_of_its_dim() -> None:
    shapes = {"input": {0: Dim("images")}}
    model = qcompile.compile(network(), calibration=images(2, 2), dynamic_shapes=shapes)
    (spec,) = model.inputs
    assert spec.shape == (("images", 1, 2**31 - 1), 3, 10, 10)
    x = randn(9, 3, 10, 10)
    assert torch.equal(model(x), model.reference(x))


def test_an_automatic_dimension_takes_a_single_image_too() -> None:
    model = qcompile.compile(network(), calibration=images(2), dynamic_shapes=({0: Dim.AUTO},))
    for batch in (1, 5):
        x = randn(batch, 3, 10, 10)
        assert torch.equal(model(x), model.reference(x))


# --- configuration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("observer", OBSERVERS)
def test_every_observer_gives_an_exact_and_useful_model(observer: str) -> None:
    model, data = network(), images()
    result = qcompile.compile(model, calibration=data, config=qcompile.QuantConfig(observer=observer))
    assert torch.equal(result(X), result.reference(X))
    assert sqnr(model(X).detach(), result(X)) > 15


def test_an_excluded_layer_stays_float_for_the_pattern() -> None:
    model = network()
    result = qcompile.compile(model, calibration=images(), config=qcompile.QuantConfig(exclude=("3.*", "9")))
    left = [(row.where, row.reason) for row in result.coverage if row.kind == "float" and "conv2d" in row.op]
    assert left == [(f"3.{name}.0", "excluded by the configuration ('3.*')") for name in ("first", "second")]
    assert floats(result)["linear"] == "excluded by the configuration ('9')"
    assert not result.artifact.exact
    assert result.selftest().passed
    assert sqnr(result.reference(X), result(X)) > 60


def test_an_exclude_pattern_that_matches_nothing_names_near_ones() -> None:
    with pytest.raises(ConfigError, match=r"'3\.frist' matches no module(.|\n)*did you mean 3\.first"):
        qcompile.compile(network(), calibration=images(), config=qcompile.QuantConfig(exclude=("3.frist",)))


# --- float operators ----------------------------------------------------------------------------------------


class Attention(nn.Module):
    """One head of attention over 12 features, a residual, a layer norm, and a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.norm, self.feed = nn.LayerNorm(12), nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = torch.softmax(q @ k.transpose(-2, -1) / 12**0.5, -1)
        x = self.norm(x + self.out(weights @ v))
        return x + self.feed(x)


def test_a_transformer_block_runs_its_attention_in_float() -> None:
    model, x = randomize(Attention()), randn(2, 7, 12)
    result = qcompile.compile(model, calibration=[randn(2, 7, 12, seed=i) for i in range(1, 9)])
    assert {"softmax", "layer_norm"} <= set(floats(result)) <= {"softmax", "layer_norm", "matmul", "bmm", "div"}
    assert "no integer operator for aten.softmax" in floats(result)["softmax"]
    assert sum(row.kind == "integer" and "linear" in row.op for row in result.coverage) == 4
    assert result.selftest().passed
    assert sqnr(result.reference(x), result(x)) > 60
    assert sqnr(model(x).detach(), result(x)) > 20


def test_strict_names_every_operator_that_would_stay_float() -> None:
    with pytest.raises(StrictError, match="3 operators would stay float") as caught:
        qcompile.compile(
            nn.Sequential(nn.Linear(6, 6), nn.Softmax(1), nn.Linear(6, 6), nn.LayerNorm(6), nn.GroupNorm(2, 6)).eval(),
            calibration=[randn(4, 6)],
            strict=True,
        )
    for place in ("1 (aten.softmax.int)", "3 (aten.layer_norm.default)", "4 (aten.group_norm.default)"):
        assert f"{place}: no integer operator" in str(caught.value.where)
    assert "strict=False" in str(caught.value.remedy)


class Compares(nn.Module):
    """Outputs of several types, next to a float operator."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x.softmax(1)
        return y, y.argmax(1), y > 0.2


def test_outputs_that_are_no_floats_pass_the_selftest() -> None:
    result = qcompile.compile(Compares(), calibration=[randn(4, 6)])
    assert [spec.dtype for spec in result.outputs] == ["float32", "int64", "bool"]
    assert result.selftest().passed
    x = randn(4, 6, seed=9)
    assert torch.equal(result(x)[1], x.argmax(1))


def test_an_operator_with_several_results_stays_float() -> None:
    """Taking one of several results is no batch norm."""
    quantized = qcompile.quantize(Maximum(), calibration=[randn(4, 6)])
    assert [row.op for row in quantized.coverage if row.kind == "float"] == ["aten.max.dim"]
    x = randn(4, 6, seed=1)
    assert torch.equal(quantized(x)[1], x.max(1).indices)


class Maximum(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = x.max(1)
        return values, indices


def test_a_value_that_calibration_never_saw_stays_float() -> None:
    class Rest(nn.Module):
        """All rows, and those after the fourth."""

        def __init__(self) -> None:
            super().__init__()
            self.every, self.later = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.every(x), self.later(x[4:])

    result = qcompile.quantize(Rest().eval(), calibration=[randn(4, 4)])
    reasons = {row.where: row.reason for row in result.coverage if row.op.startswith("aten.linear")}
    assert reasons["every"] == ""
    assert "never occurred" in reasons["later"]


def test_an_average_that_int32_cannot_sum_stays_float() -> None:
    model = nn.AvgPool2d(3000, divisor_override=9_000_000).eval()
    x = torch.rand(1, 1, 3000, 3000, generator=torch.Generator().manual_seed(0))
    compiled = qcompile.compile(model, calibration=[x])
    assert "could leave int32" in floats(compiled)["avg_pool2d"]
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("target", ["native", "arm64-neon"])
def test_a_number_of_threads_that_is_none_is_refused_before_anything_runs(target: str) -> None:
    with pytest.raises(ConfigError, match="threads is '2'"):
        qcompile.compile(network(), target, calibration=images(1), threads="2")  # type: ignore[arg-type]
