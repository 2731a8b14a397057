"""prepare_qat: gradients, and that what was trained is what is compiled."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from passing import passes_until
from torch import Tensor, nn

import qcompile
from examples.training import few_bits, new_head
from qcompile.errors import (
    CalibrationError,
    CaptureError,
    ConfigError,
    ExportError,
    InputError,
    PipelineError,
    QuantizationError,
)
from qcompile.fakequant import fake_quantize, fake_quantize_bias, fake_quantize_weight
from qcompile.passes import Pipeline, default_pipeline

pytestmark = pytest.mark.filterwarnings("ignore::qcompile.errors.CalibrationWarning")
DYNAMIC = ({0: torch.export.Dim("batch", max=64)},)


class Net(nn.Module):
    """What a forward can hold: folded batch norm, relu6, depthwise, a table, a residual add, cat, both poolings."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.relu6(self.norm(self.conv(x)))
        z = torch.sigmoid(self.depthwise(y)) + y
        z = torch.cat([nn.functional.max_pool2d(z, 2), nn.functional.avg_pool2d(y, 2)], 1)
        return self.head(z.mean((2, 3)))


def randn(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    model(randn(64, 9))  # gives the batch norm statistics
    return model.eval()


def prepare(**options: Any) -> qcompile.QatModel:
    return qcompile.prepare_qat(net(), calibration=[randn(32, 1)], dynamic_shapes=DYNAMIC, **options)


def train(model: nn.Module, steps: int = 10, rate: float = 3e-3) -> None:
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for step in range(steps):
        x = randn(32, 100 + step)
        loss = nn.functional.cross_entropy(model(x), x.flatten(1)[:, :5].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def trained() -> qcompile.QatModel:
    model = prepare()
    train(model)
    return model


def test_the_gradients_are_those_of_lsq() -> None:
    x = torch.tensor([[-3.0, -0.26, 0.1, 0.35, 9.0]], requires_grad=True)
    scale = torch.tensor(0.1, requires_grad=True)
    weights = torch.tensor([[2.0, 3.0, 5.0, 7.0, 11.0]])
    y = fake_quantize(x, scale, torch.tensor(3), -8, 7)  # integers -11 to 4
    assert torch.allclose(y, torch.tensor([[-1.1, -0.3, 0.1, 0.4, 0.4]]))
    (y * weights).sum().backward()
    assert x.grad is not None
    assert scale.grad is not None
    assert x.grad.tolist() == [[0, 3, 5, 7, 0]]
    slopes = [-11, -3 + 2.6, 0, 4 - 3.5, 4]
    expected = sum(w * s for w, s in zip([2, 3, 5, 7, 11], slopes, strict=True)) / math.sqrt(5 * 11)
    assert float(scale.grad) == pytest.approx(expected, rel=1e-5)


def test_the_gradient_of_a_scale_that_millions_of_values_share_is_finite() -> None:
    x = torch.rand(1).expand(1, 64, 512, 512)
    gradients = []
    for count in (512, 8):
        scale = torch.tensor(0.01, requires_grad=True)
        fake_quantize(x[..., :count], scale, torch.tensor(-128, dtype=torch.int32), -128, 127).mean().backward()
        assert scale.grad is not None
        gradients.append(float(scale.grad))
    assert gradients[0] == pytest.approx(gradients[1] / 8, rel=1e-3)  # 1 / sqrt(64) of it


def test_each_channel_of_a_weight_has_its_own_scale_gradient() -> None:
    weight = torch.tensor([[0.26, -0.9], [0.26, 0.74]], requires_grad=True)
    scale = torch.tensor([0.1, 0.5], requires_grad=True)
    y = fake_quantize_weight(weight, scale, 7)
    assert torch.allclose(y, torch.tensor([[0.3, -0.7], [0.5, 0.5]]))
    y.sum().backward()
    assert weight.grad is not None
    assert scale.grad is not None
    assert weight.grad.tolist() == [[1, 0], [1, 1]]
    expected = torch.tensor([(3 - 2.6) - 7, (1 - 0.52) + (1 - 1.48)]) / math.sqrt(2 * 7)
    assert torch.allclose(scale.grad, expected, atol=1e-6)


def test_a_bias_is_rounded_and_its_gradient_is_not() -> None:
    bias = torch.tensor([0.26, -0.9], requires_grad=True)
    y = fake_quantize_bias(bias, torch.tensor(0.5), torch.tensor([0.2, 0.4]))
    assert torch.allclose(y, torch.tensor([0.3, -0.8]))
    y.sum().backward()
    assert bias.grad is not None
    assert bias.grad.tolist() == [1, 1]


@pytest.mark.parametrize("options", [{}, {"config": qcompile.QuantConfig(weight_bits=3, preset="balanced")}])
def test_it_begins_as_the_quantized_model(options: dict[str, Any]) -> None:
    quantized = qcompile.quantize(net(), calibration=[randn(32, 1)], dynamic_shapes=DYNAMIC, **options)
    x = randn(64, 2)
    assert torch.equal(qcompile.quantize(prepare(**options))(x), quantized(x))


def test_the_forward_is_the_integer_result(trained: qcompile.QatModel) -> None:
    """But for ties, which float sums may break otherwise: few outputs differ, by one step."""
    integer = qcompile.quantize(trained)
    step = (integer(randn(64, 3)).unique().diff()).min()
    differing = []
    with torch.no_grad():
        for seed in range(20):
            x = randn(64, 200 + seed)
            off = (trained(x) - integer(x)).abs() / step
            assert off.max() < 1.01
            differing.append((off > 0.5).float().mean())
    assert torch.stack(differing).mean() < 0.01


def test_what_was_trained_is_compiled(trained: qcompile.QatModel) -> None:
    compiled = qcompile.compile(trained, strict=True)
    x = randn(33, 4)
    assert torch.equal(compiled(x), compiled.reference(x))
    assert torch.equal(compiled(x), qcompile.quantize(trained)(x))


def test_training_moves_weights_and_scales(trained: qcompile.QatModel) -> None:
    before = dict(prepare().named_parameters())
    for name, parameter in trained.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    assert {"conv.weight", "conv.bias", "depthwise.weight", "head.weight_log_ratio"} <= set(before)


def test_fixed_scales_stay() -> None:
    model = prepare(scales="fixed")
    train(model, 2)
    assert all(float(p.abs().max()) == 0 for p in model.scales())


def test_frozen_parameters_stay_and_the_scales_of_what_they_compute() -> None:
    model = net()
    model.requires_grad_(False)
    model.get_parameter("head.weight").requires_grad_(True)
    prepared = qcompile.prepare_qat(model, calibration=[randn(32, 1)], dynamic_shapes=DYNAMIC)
    trainable = {name for name, p in prepared.named_parameters() if p.requires_grad}
    assert trainable == {"head.weight", "head.weight_log_ratio", "activations.head.log_ratio"}


def test_the_state_survives_a_round_trip(trained: qcompile.QatModel) -> None:
    other = qcompile.prepare_qat(net(), calibration=[3 * randn(32, 7)], dynamic_shapes=DYNAMIC)
    x = randn(8, 5)
    assert not torch.equal(other(x), trained(x))
    other.load_state_dict(trained.state_dict())
    assert torch.equal(other(x), trained(x))
    assert torch.equal(qcompile.quantize(other)(x), qcompile.quantize(trained)(x))


def test_a_copy_is_trained_alone(trained: qcompile.QatModel) -> None:
    x = randn(8, 5)
    before = trained(x)
    twin = copy.deepcopy(trained)
    assert torch.equal(twin.train()(x), before)
    train(twin, 1)
    assert not torch.equal(twin.eval()(x), before)
    assert torch.equal(trained(x), before)


def test_a_shared_layer_has_one_weight() -> None:
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.ReLU(), layer).eval()
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    prepared = qcompile.prepare_qat(model, calibration=[x])
    trained = sorted(name.rpartition(".")[2] for name, _ in prepared.named_parameters() if "log_ratio" not in name)
    assert trained == ["bias", "weight"]
    assert (prepared(x) - qcompile.quantize(prepared)(x)).abs().max() < 0.02


@pytest.mark.parametrize("preset", ["fast", "balanced"])
def test_training_begins_where_a_preset_ended(preset: str) -> None:
    """Of a shared layer too, whose calls the preset may have given integers of their own."""
    layer = nn.Linear(6, 6)
    torch.manual_seed(0)
    model = nn.Sequential(layer, nn.ReLU(), layer).eval()
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"calibration": [x], "config": qcompile.QuantConfig(preset=preset)}
    prepared, plain = qcompile.prepare_qat(model, **options), qcompile.quantize(model, **options)
    assert torch.equal(qcompile.quantize(prepared)(x), plain(x))


@pytest.mark.parametrize(
    "name", ["conv.weight", "depthwise.bias", "head.weight_log_ratio", "activations.head.log_ratio"]
)
def test_a_diverged_training_is_refused_by_name(name: str) -> None:
    model = prepare()
    model.get_parameter(name).data.fill_(math.nan)
    with pytest.raises(QuantizationError, match="not finite") as caught:
        qcompile.quantize(model)
    assert caught.value.where == name.rpartition(".")[0]


def test_a_scale_that_ran_away_is_refused() -> None:
    model = prepare()
    model.get_parameter("head.weight_log_ratio").data.fill_(-200.0)
    with pytest.raises(QuantizationError, match="the trained 'weight_scale' is 0 to 0") as caught:
        qcompile.compile(model)
    assert caught.value.where == "head"


def test_mistakes_are_named() -> None:
    with pytest.raises(CaptureError, match="BatchNorm2d is in training mode"):
        qcompile.prepare_qat(net().train(), calibration=[randn(4, 1)])
    with pytest.raises(CalibrationError, match="no calibration data"):
        qcompile.prepare_qat(net())
    with pytest.raises(ConfigError, match="unknown scales 'free'"):
        prepare(scales="free")
    with pytest.raises(CaptureError, match="refuses the model"):
        qcompile.prepare_qat(net().double(), calibration=[randn(4, 1)])
    with pytest.raises(PipelineError):
        prepare(pipeline=default_pipeline().without("quantize"))
    with pytest.raises(PipelineError, match="does not end in an integer program"):
        prepare(pipeline=Pipeline(passes_until("quantize")))
    with pytest.raises(ConfigError, match="trained with static activations"):
        prepare(config=qcompile.QuantConfig(activations="dynamic"))
    model = prepare()
    with pytest.raises(ConfigError, match="quantized before it was trained") as caught:
        qcompile.quantize(model, calibration=[randn(4, 1)])
    assert caught.value.where == "calibration"
    with pytest.raises(InputError, match="has shape"):
        model(randn(4, 1)[:, :2])


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_training_recovers_what_quantization_after_it_loses(seed: int) -> None:
    """A depthwise separable network with relu6 and weights of two bits."""
    in_float, after, fine_tuned = few_bits(seed)
    assert in_float > 0.9
    assert after < in_float - 0.3
    assert fine_tuned > (in_float + after) / 2


@pytest.mark.slow
def test_a_new_head_learns_on_an_integer_backbone() -> None:
    _, before, after = new_head(0)
    assert after > before + 0.4


@pytest.mark.parametrize("shapes", [None, ({0: torch.export.Dim("batch", max=8)},)], ids=["static", "dynamic"])
def test_pickling_a_whole_model_says_how_it_is_saved(shapes: Any, tmp_path: Path) -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    data = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    model = qcompile.prepare_qat(layers, calibration=data, dynamic_shapes=shapes)
    with pytest.raises(ExportError, match="saved by its state_dict") as caught:
        torch.save(model, tmp_path / "model.pt")
    assert "load_state_dict" in str(caught.value)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    assert not torch.equal(other(data[0]), model(data[0]))
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(other(data[0]), model(data[0]))
