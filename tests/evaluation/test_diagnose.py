"""diagnose(): every layer beside its float original, and the layer that was broken on purpose is the one named."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from passing import Block, images, network, randn, randomize
from torch import Tensor, nn
from torch.export import Dim

import qcompile
from qcompile.config import QuantConfig
from qcompile.errors import ConfigError, InputError
from qcompile.evaluation.layers import BINS, histogram
from qcompile.evaluation.original import float_half
from qcompile.ir import Program, Property, QParams
from qcompile.passes import Context, Pass, default_pipeline


def chain() -> Any:
    """Convolutions and relus, named by what happens to them in the tests."""
    model: Any = nn.Sequential()
    for name, before, after in (("stem", 3, 16), ("body", 16, 16), ("neck", 16, 16), ("head", 16, 8)):
        model.add_module(name, nn.Conv2d(before, after, 3, padding=1))
        model.add_module(f"{name}_relu", nn.ReLU())
    return randomize(model)


DATA = [randn(2, 3, 12, 12, seed=i) for i in range(16)]


def test_a_healthy_network_breaks_nowhere() -> None:
    model = chain()
    found = qcompile.diagnose(qcompile.quantize(model, calibration=DATA), model, DATA)
    assert found.first is None
    assert "breaks nowhere" in found.summary
    assert [row.name for row in found.in_order] == ["input to int8", "stem", "body", "neck", "head"]
    assert [row.reads for row in found.in_order][1:3] == [("quantize_default",), (found.in_order[1].node,)]
    assert found.samples == 32
    assert list(found.rows) == sorted(found.rows, key=lambda row: row.isolated)
    for row in found.rows:
        assert 25 < row.isolated < 70
        assert row.accumulated <= row.isolated + 1
        assert sum(row.values) == 32 * 12 * 12 * (3 if row.op == "quantize" else 8 if row.name == "head" else 16)
    assert sum(found.in_order[1].weights) == 16 * 3 * 9


def test_accumulated_and_isolated_are_what_their_definitions_say() -> None:
    """Held to a computation by hand, on one layer behind another."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).eval()
    data = [randn(8, 6, seed=i) for i in range(4)]
    quantized = qcompile.quantize(model, calibration=data)
    found = qcompile.diagnose(quantized, model, data)
    middle, last = found.in_order[-2:]
    x = torch.cat(data)
    with torch.no_grad():
        hidden, expected = model[0](x), model(x)

    def decibels(noise: Tensor) -> float:
        return float(10 * torch.log10(expected.double().square().sum() / noise.double().square().sum()))

    actual = torch.cat([quantized(batch) for batch in data])
    assert last.accumulated == pytest.approx(decibels(actual - expected), abs=1e-3)
    node: Any = quantized.program.outputs()[0].args[0]  # before it is dequantized
    middle_scale, last_scale = float(middle.scale or 0), float(last.scale or 0)
    q = torch.round(hidden / middle_scale).add(int(middle.zero_point or 0)).clamp(-128, 127).to(torch.int8)
    tensors = quantized.program.graph_module
    rest = [getattr(tensors, str(a.target)) if isinstance(a, torch.fx.Node) else a for a in node.args[1:]]
    real = (node.target(q, *rest).float() - int(last.zero_point or 0)) * last_scale
    assert last.isolated == pytest.approx(decibels(real - expected), abs=1e-3)
    with torch.no_grad():
        ideal = model[1]((q.float() - int(middle.zero_point or 0)) * middle_scale)
    assert last.inputs == pytest.approx(decibels(ideal - expected), abs=1e-3)


def test_a_range_that_is_far_too_small_is_found_where_it_was_set() -> None:
    model = chain()
    config = qcompile.QuantConfig(overrides={"body_relu": {"observer": "percentile", "percentile": 51.0}})
    quantized = qcompile.quantize(model, calibration=DATA, config=config)
    found = qcompile.diagnose(quantized, model, DATA)
    assert found.first is not None
    assert found.first.name == "body"
    assert found.first.cause == "output"
    assert found.first.own > 0.9
    assert found.rows[0] == found.first
    assert found.first.above > 0.2
    assert "Quality breaks at body" in found.summary
    assert "grid of its output" in found.summary


def test_a_channel_that_takes_the_whole_range_is_found_where_it_is_read() -> None:
    """One channel of body is 1000 times as strong, and neck takes it back: the float network is the same, and of the
    other channels int8 keeps nothing."""
    model = chain()
    with torch.no_grad():
        model.body.weight[3] *= 1000
        model.body.bias[3] *= 1000
        model.neck.weight[:, 3] /= 1000
    found = qcompile.diagnose(qcompile.quantize(model, calibration=DATA), model, DATA)
    assert found.first is not None
    assert found.first.name == "neck"
    assert found.first.cause == "inputs"
    assert found.first.own > 0.5
    assert [found.row(node).name for node in found.first.reads] == ["body"]
    assert found.summary.endswith("the int8 grid of what it reads: body.")


def test_weights_that_int8_cannot_hold_are_found_in_their_layer() -> None:
    """One weight of each channel is 3000 times as large as the others, and reads an input that is nearly zero."""
    model: Any = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    randomize(model)
    with torch.no_grad():
        model[0].weight[5] *= 1e-4
        model[0].bias[5] = 0.0
        model[1].weight[:, 5] += 3000 * model[1].weight.abs().mean()
    data = [randn(16, 8, seed=i) for i in range(4)]
    found = qcompile.diagnose(qcompile.quantize(model, calibration=data), model, data)
    assert found.first is not None
    assert found.first.name == "1"
    assert found.first.cause in ("operator", "inputs")
    assert found.rows[0] == found.first


def test_errors_that_are_averaged_away_are_no_break() -> None:
    """The broken branch adds next to nothing to the output."""

    class Weak(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.strong, self.weak, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(1e-3 * self.act(self.weak(x)) + self.strong(x))

    model = randomize(Weak())
    config = qcompile.QuantConfig(overrides={"act": {"observer": "percentile", "percentile": 51.0}})
    found = qcompile.diagnose(qcompile.quantize(model, calibration=DATA, config=config), model, DATA)
    assert min(row.accumulated for row in found.rows) < 10
    assert found.first is None
    strict = qcompile.diagnose(qcompile.quantize(model, calibration=DATA, config=config), model, DATA, threshold=200.0)
    assert strict.first == strict.in_order[0]


def test_mistakes_of_a_call_are_named() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 1)))
    quantized = qcompile.quantize(model, calibration=DATA)
    for threshold in ("x", float("nan")):
        with pytest.raises(ConfigError, match="threshold is"):
            qcompile.diagnose(quantized, model, DATA, threshold=threshold)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"the quantized network is a Sequential(.|\n)*diagnose\(compiled, model"):
        qcompile.diagnose(model, quantized, DATA)  # type: ignore[arg-type]


def test_a_network_with_float_operators_padding_pools_and_a_residual() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pad, self.conv, self.block = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 4, 3, stride=2), Block(4)
            self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = nn.functional.max_pool2d(self.block(self.conv(self.pad(x))), 2)
            return self.head(self.norm(y.mean((2, 3))))

    model = randomize(Mixed())
    compiled = qcompile.compile(model, calibration=DATA)
    found = qcompile.diagnose(compiled, model, DATA)
    by_name = {row.name: row for row in found.in_order}
    assert by_name["norm"].kind == "float"
    assert by_name["norm"].isolated == math.inf
    assert by_name["norm"].cause is None
    assert math.isfinite(by_name["norm"].accumulated)
    assert by_name["conv"].isolated > 25
    assert by_name["head"].reads  # through the quantization in front of it
    assert any(row.op.startswith("max_pool2d") and row.operator == math.inf for row in found.rows)
    computed = {row.node for row in compiled.coverage if row.kind == "float"}
    assert {row.node for row in found.rows if row.kind == "float"} <= computed


def test_a_preset_and_a_dynamic_batch() -> None:
    model = network()
    config = qcompile.QuantConfig(preset="balanced")
    shapes = ({0: Dim("batch", max=8)},)
    quantized = qcompile.quantize(model, calibration=images(16), config=config, dynamic_shapes=shapes)
    found = qcompile.diagnose(quantized, model, [*images(2), torch.cat(images(5))])
    assert found.samples == 7
    assert found.rows[0].isolated > 15


@dataclass(frozen=True)
class Sharpen(Pass):
    """A float pass that changes values and no names: relu(x) becomes relu(x) at twice the scale."""

    name: ClassVar[str] = "sharpen"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.FLOAT})
    factor: float = 2.0

    def run(self, program: Program, context: Context) -> bool:
        for tensor in (*program.graph_module.parameters(), *program.graph_module.buffers()):
            if tensor.dim() > 1:
                tensor.data.mul_(self.factor)
        return True


def test_a_pipeline_of_ones_own_is_followed() -> None:
    model = chain()
    pipeline = default_pipeline().after("fold_batchnorm", Sharpen())
    assert [step.name for step in float_half(pipeline)] == ["canonicalize", "fold_batchnorm", "sharpen"]
    found = qcompile.diagnose(qcompile.quantize(model, calibration=DATA, pipeline=pipeline), model, DATA)
    assert min(row.accumulated for row in found.rows) > 20


def test_another_model_is_refused() -> None:
    model = chain()
    quantized = qcompile.quantize(model, calibration=DATA)
    longer = nn.Sequential(*model, nn.Conv2d(8, 8, 1), nn.Tanh()).eval()
    with pytest.raises(InputError, match="is not the one that the program was made of") as caught:
        qcompile.diagnose(quantized, longer, DATA)
    assert "aten.tanh" in str(caught.value) or "no such operator" in str(caught.value)
    assert caught.value.remedy


def test_what_has_no_layers_is_refused(tmp_path: Path) -> None:
    model = chain()
    compiled = qcompile.compile(model, calibration=DATA)
    compiled.save(tmp_path / "model.qcm")
    with pytest.raises(InputError, match="machine code"):
        qcompile.diagnose(qcompile.load(tmp_path / "model.qcm"), model, DATA)  # type: ignore[arg-type]
    foreign = replace(qcompile.quantize(model, calibration=DATA), recipe=None)
    with pytest.raises(InputError, match="trained as int8 or quantized elsewhere"):
        qcompile.diagnose(foreign, model, DATA)
    with pytest.raises(InputError, match="no data"):
        qcompile.diagnose(compiled, model, [])


def test_the_histogram_counts_every_value_once() -> None:
    params = QParams(scale=0.5, zero_point=-28)  # from -50 to 77.5
    x = torch.tensor([-50.0, -50.3, 77.5, 77.8, -49.0, 0.0, math.inf, -math.inf])
    counts = histogram(x, params)
    assert len(counts) == BINS + 2
    assert int(counts.sum()) == len(x)
    assert counts[0] == 2
    assert counts[-1] == 2
    assert counts[1] == 2  # -50 and -49 are steps -128 and -126
    assert counts[1 + (28 - 0 + 72) // 4] == 1  # 0 is step -28, the 100th from below


def test_reports(tmp_path: Path) -> None:
    model = chain()
    found = qcompile.diagnose(qcompile.quantize(model, calibration=DATA), model, DATA[:2])
    read: dict[str, Any] = json.loads(found.to_json(), parse_constant=pytest.fail)
    assert [row["node"] for row in read["rows"]] == [row.node for row in found.rows]
    assert read["rows"][-1]["operator"] == "inf"
    assert read["first"] is None
    assert "accumulated" in str(found)
    found.save(tmp_path / "layers.html")
    assert "stem" in (tmp_path / "layers.html").read_text()


def _three() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5)).eval()
    return model, [torch.randn(4, 16) for _ in range(8)]


@pytest.mark.parametrize(
    ("options", "op", "kind"),
    [
        ({"exclude": ("0",)}, "float_linear", "float"),
        ({"overrides": {"2": {"activations": "dynamic"}}}, "linear_dynamic", "integer"),
        ({"overrides": {"2": {"activations": "float", "weight_bits": 2}}}, "linear_weight_only", "weight-only"),
    ],
)
def test_layers_between_floats_are_compared_as_well(options: dict[str, Any], op: str, kind: str) -> None:
    model, data = _three()
    quantized = qcompile.quantize(model, calibration=data, config=QuantConfig(**options))
    found = qcompile.diagnose(quantized, model, data)
    (row,) = [row for row in found.rows if row.op == op]
    assert row.kind == kind
    if kind == "float":
        assert row.isolated > 100
    elif kind == "weight-only":
        assert found.rows[0] is row  # two bits lose most
        assert row.isolated < 20


def test_a_network_of_bfloat16_layers_has_rows() -> None:
    model, data = _three()
    compiled = qcompile.compile(model, example_inputs=data[0], numerics="bfloat16")
    found = qcompile.diagnose(compiled, model, data)
    products = [row for row in found.rows if row.kind == "bfloat16"]
    assert len(products) == 3
    assert all(35 < row.isolated < 70 for row in products)


def test_a_trained_model_has_no_float_layers_to_compare_and_says_so() -> None:
    model, data = _three()
    compiled = qcompile.compile(qcompile.prepare_qat(model, calibration=data))
    text = str(qcompile.evaluate(compiled, model, data, layers=4, blocks=0))
    assert "trained as int8" in text
    with pytest.raises(InputError, match="trained as int8"):
        qcompile.diagnose(compiled, model, data)
