"""A model that torchao's PT2E flow quantized compiles as it is: the same scales, the same weights, integer code."""

from __future__ import annotations

import networks
import passing
import pt2e
import pytest
import torch
from passing import network, randn, sqnr
from torch import Tensor, nn

import qcompile
from qcompile.ir import Property


def mlp() -> nn.Module:
    layers = (
        nn.Flatten(),
        nn.Linear(300, 64),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(64, 32),
        nn.GELU(),
        nn.Linear(32, 10),
    )
    return passing.randomize(nn.Sequential(*layers))


def outputs(model: object, batches: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(x) for x in batches])  # type: ignore[operator]


def left_float(model: qcompile.QuantizedModel) -> dict[str, str]:
    """Operator -> reason."""
    return {row.op.split(".")[1]: row.reason for row in model.coverage if row.kind == "float"}


@pytest.mark.parametrize("make", [network, mlp])
def test_a_wholly_quantized_graph_is_wholly_integer_and_gives_what_it_gave(make: object) -> None:
    model, batches = make(), passing.images(16)  # type: ignore[operator]
    given = pt2e.convert(model, pt2e.Everything(), batches)
    compiled = qcompile.compile(given, example_inputs=batches[0], strict=True)
    assert {row.kind for row in compiled.coverage} <= {"integer", "shape"}
    expected, actual = outputs(given, batches), outputs(compiled, batches)
    assert torch.equal(actual, outputs(compiled.reference, batches))
    step = compiled.outputs[0].scale
    assert step is not None
    assert (expected - actual).abs().max() <= 1.01 * step
    assert (expected != actual).float().mean() < 0.1


def test_a_resnet_with_int32_biases_is_nearer_to_the_given_graph_than_that_is_to_float() -> None:
    """Both add up the same integers, so only a tie that float32 decides otherwise can part them."""
    net = networks.REDUCED[0]
    model, batches = net.model(), list(networks.images(4, net.size, seed=4).split(1))
    given = pt2e.convert(model, pt2e.Everything(), batches)
    expected = outputs(given, batches)
    quantized = qcompile.quantize(given, example_inputs=batches[0])
    assert left_float(quantized) == {}
    assert sqnr(expected, outputs(quantized, batches)) > sqnr(expected, outputs(model, batches))


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("make", [network, mlp])
def test_x86_inductors_quantizer(make: object, fold: bool) -> None:
    """uint8 activations; no scale between a layer and its activation, nor behind the last layer."""
    model, batches = make(), passing.images(16)  # type: ignore[operator]
    given = pt2e.convert(model, pt2e.x86(), batches, fold_quantize=fold)
    quantized = qcompile.quantize(given, example_inputs=batches[0])
    assert left_float(quantized) == {"linear": "it is not quantized in the given graph"}
    expected = outputs(given, batches)
    assert sqnr(expected, outputs(quantized, batches)) > sqnr(expected, outputs(model, batches)) - 6


def test_reduced_ranges_stay_reduced() -> None:
    given = pt2e.convert(network(), pt2e.x86(reduce_range=True), passing.images(16))
    batches = [5 * x for x in passing.images(4)]  # beyond the range that calibration saw
    quantized = qcompile.quantize(given, example_inputs=batches[0])
    expected = outputs(given, batches)
    assert sqnr(expected, outputs(quantized, batches)) > 25
    lookups = [n for n in quantized.program.graph.nodes if n.target is torch.ops.qcompile.lookup.default]
    clamps = [n for n in lookups if n.name.startswith("clamp")]
    assert clamps  # of what cannot clamp itself: the input, and the average
    for clamp in clamps:
        table = quantized.program.graph_module.get_buffer(str(clamp.args[1].target))
        assert (int(table.min()), int(table.max())) == (-128, -1)  # uint8 from 0 to 127


def test_arm_inductors_quantizer() -> None:
    """int8 activations and weights per tensor; what is between two islands of int8 stays float."""
    batches = passing.images(16)
    given = pt2e.convert(network(), pt2e.arm(), batches)
    quantized = qcompile.quantize(given, example_inputs=batches[0])
    reasons = left_float(quantized)
    assert set(reasons) == {"conv2d", "hardswish", "adaptive_avg_pool2d", "linear"}
    assert set(reasons.values()) == {"it is not quantized in the given graph"}
    assert sqnr(outputs(given, batches), outputs(quantized, batches)) > 45


def test_quantization_aware_training() -> None:
    batches = passing.images(2, batch=4)
    given = pt2e.train(network(), pt2e.x86(is_qat=True), batches)
    quantized = qcompile.quantize(given, example_inputs=batches[0])
    assert left_float(quantized) == {"linear": "it is not quantized in the given graph"}
    assert sqnr(outputs(given, batches), outputs(quantized, batches)) > 30


def test_integer_arithmetic_spelled_out_is_refused() -> None:
    given = pt2e.convert(network(), pt2e.Everything(), passing.images(2), use_reference_representation=True)
    error = passing.refusal(given, calibration=None, example_inputs=passing.images(1)[0])
    assert "another form" in error.what
    assert "use_reference_representation" in str(error.remedy)


def test_an_exported_program_and_a_dynamic_batch() -> None:
    batches = passing.images(4, batch=2)
    dynamic = ({0: torch.export.Dim("batch", min=1, max=8)},)
    given = pt2e.convert(network(), pt2e.Everything(), batches, dynamic_shapes=dynamic)
    exported = torch.export.export(given, (batches[0],), dynamic_shapes=dynamic)
    compiled = qcompile.compile(exported, strict=True)
    for size in (1, 5, 8):
        x = randn(size, 3, 10, 10, seed=size)
        assert torch.equal(compiled(x), compiled.reference(x))
        assert (compiled(x) - outputs(given, [x])).abs().max() <= 1.01 * (compiled.outputs[0].scale or 0)


def test_the_ledger_knows_the_modules_of_the_float_model() -> None:
    given = pt2e.convert(network(), pt2e.Everything(), passing.images(4))
    quantized = qcompile.quantize(given, example_inputs=passing.images(1)[0])
    places = {row.op: row.where for row in quantized.coverage}
    assert places["aten.linear.default"] == "9"
    assert any(row.where == "3.first.0" for row in quantized.coverage)


def test_layers_can_be_kept_float() -> None:
    given = pt2e.convert(network(), pt2e.Everything(), passing.images(4))
    config = qcompile.QuantConfig(exclude=("9",))
    quantized = qcompile.quantize(given, example_inputs=passing.images(1)[0], config=config)
    assert left_float(quantized) == {"linear": "excluded by the configuration ('9')"}


def test_the_passes_are_named_and_say_what_is_missing() -> None:
    given = pt2e.convert(mlp(), pt2e.Everything(), passing.images(4))
    quantized = qcompile.quantize(given, example_inputs=passing.images(1)[0])
    assert [record.name for record in quantized.passes] == [
        "canonicalize_qdq",
        "fuse_requantize",
        "fold_padding",
        "fuse_float",
    ]
    assert Property.INTEGER in quantized.program.properties
    error = passing.refusal(
        given, calibration=None, example_inputs=passing.images(1)[0], pipeline=qcompile.passes.default_pipeline()
    )
    assert "'canonicalize' requires FLOAT" in str(error)
    assert "GIVEN_QDQ" in str(error)


def test_what_has_no_effect_on_a_quantized_model_is_refused() -> None:
    given = pt2e.convert(mlp(), pt2e.Everything(), passing.images(4))
    (x,) = passing.images(1)
    assert "already quantized" in str(passing.refusal(given, calibration=[x]))
    for config in (qcompile.QuantConfig(preset="best"), qcompile.QuantConfig(overrides={"*": {"observer": "mse"}})):
        error = passing.refusal(given, calibration=None, example_inputs=x, config=config)
        assert "already quantized" in str(error)
        assert error.where == "config"
    assert "example_inputs" in str(passing.refusal(given, calibration=None))


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", [pt2e.Everything, pt2e.x86])
def test_mobilenetv2_of_transformers(quantizer: object) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install 'qcompile[bench]'")

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = transformers.MobileNetV2Config(image_size=96, depth_multiplier=0.35)
            self.net = transformers.MobileNetV2ForImageClassification(config)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.net(x).logits
            return logits

    torch.manual_seed(0)
    model = networks.settle(Logits(), networks.images(8, 96, seed=3))
    batches = list(networks.images(16, 96, seed=4).split(1))
    given = pt2e.convert(model, quantizer(), batches)  # type: ignore[operator]
    compiled = qcompile.compile(given, example_inputs=batches[0], strict=quantizer is pt2e.Everything)
    expected, actual = outputs(given, batches), outputs(compiled, batches)
    tolerance = compiled.artifact.tolerance  # 0 where nothing stayed float
    torch.testing.assert_close(actual, outputs(compiled.reference, batches), rtol=tolerance, atol=tolerance)
    print(sqnr(expected, outputs(compiled, batches)), sqnr(expected, outputs(model, batches)))
    assert sqnr(expected, outputs(compiled, batches)) > sqnr(expected, outputs(model, batches))
    assert sum(row.kind == "float" for row in compiled.coverage) <= 1
