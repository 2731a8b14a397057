"""Whole models as ONNX: the form of the file, what ONNX Runtime makes of it, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import networks
import numpy as np
import onnx
import passing
import pytest
import torch
from onnx import numpy_helper
from onnx_session import Session
from passing import network, randn, sqnr
from torch import Tensor, nn
from typer.testing import CliRunner

import qcompile
from examples import photographs
from examples.efficientnet_lite0 import load_model
from qcompile.cli import app
from qcompile.errors import ExportError
from qcompile.export import to_onnx
from qcompile.export.writer import Activations


@pytest.fixture(scope="module")
def quantized() -> qcompile.QuantizedModel:
    return qcompile.quantize(network(), calibration=passing.images(16))


def test_the_same_answers_as_the_reference(quantized: qcompile.QuantizedModel) -> None:
    batches = [randn(1, 3, 10, 10, seed=100 + i) for i in range(32)]
    expected = torch.cat([quantized(x) for x in batches])
    for fused in (True, False):
        actual = Session(quantized, fused=fused).first(batches)
        assert (expected.argmax(1) == actual.argmax(1)).float().mean() >= 0.95
        assert sqnr(expected, actual) > 35


def test_the_file_is_standard_qdq(quantized: qcompile.QuantizedModel, tmp_path: Path) -> None:
    qcompile.export_onnx(quantized, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version >= 13
    assert model.producer_name == "qcompile"
    held = {c.name: numpy_helper.to_array(c) for c in model.graph.initializer}
    made_by = {name: node for node in model.graph.node for name in node.output}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 4
    for conv in convolutions:
        x, weight, bias = (made_by[name] for name in conv.input)
        assert [n.op_type for n in (x, weight, bias)] == ["DequantizeLinear"] * 3
        q, scale, zero = (held[name] for name in weight.input)
        assert q.dtype == np.int8
        assert scale.shape == (len(q),)
        assert not zero.any()
        assert -127 <= q.min() < 0 < q.max() <= 127
        q_bias, bias_scale = (held[name] for name in bias.input)
        assert q_bias.dtype == np.int32
        x_scale = held[x.input[1]]
        np.testing.assert_allclose(bias_scale, x_scale * scale, rtol=1e-6)
    allowed = {"QuantizeLinear", "DequantizeLinear", "Conv", "Gemm", "Add", "MaxPool", "GlobalAveragePool", "Reshape"}
    assert {node.op_type for node in model.graph.node} <= {*allowed, "Identity", "Cast", "Gather", "Relu", "Clip"}


def test_a_compiled_model_and_nested_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 3)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
            return {"both": (torch.relu(self.a(x)), self.b(y)), "input": x}

    model = passing.randomize(Two())
    inputs = randn(2, 8), randn(2, 8, seed=1)
    compiled = qcompile.compile(model, calibration=[inputs])
    session = Session(compiled)
    assert [o.name for o in session.session.get_outputs()] == ["output0", "output1", "output2"]
    flat = session(*inputs)
    nested = compiled(*inputs)
    for expected, actual in zip((*nested["both"], nested["input"]), flat, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0.03)


def test_a_dynamic_batch_stays_dynamic() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.conv(x))
            y = y.reshape(y.shape[0] * 2, 4, -1).mean(2)
            y = y.reshape(x.shape[0], 8)
            return self.last(torch.cat([y[:1].expand(x.shape[0], 8), y], 0)[x.shape[0] :])

    model = passing.randomize(Net())
    x = randn(4, 3, 6, 6)
    batch = torch.export.Dim("batch", min=1, max=16)
    quantized = qcompile.quantize(model, calibration=[x], dynamic_shapes=({0: batch},))
    session = Session(quantized)
    assert session.session.get_inputs()[0].shape == ["batch", 3, 6, 6]
    for size in (1, 5, 16):
        x = randn(size, 3, 6, 6, seed=size)
        torch.testing.assert_close(session(x)[0], quantized(x), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    "net",
    [
        pytest.param(net, id=str(net), marks=[] if net.name == "mobilenetv2" else pytest.mark.slow)
        for net in networks.REDUCED
    ],
)
def test_well_known_networks_predict_the_same(net: networks.Network) -> None:
    """A residual sum is float in ONNX Runtime, and a tie may be rounded otherwise; later layers make more of it.
    Never is the difference more than what quantization itself costs."""
    model = net.model()
    quantized = qcompile.quantize(model, calibration=net.calibration())
    batches = list(networks.images(6, net.size, seed=9).split(1))
    expected = torch.cat([quantized(x) for x in batches])
    with torch.no_grad():
        original = torch.cat([model(x) for x in batches])
    actual = Session(quantized).first(batches)
    assert sqnr(expected, actual) > max(15.0, sqnr(original, expected))
    assert (expected.argmax(1) == actual.argmax(1)).float().mean() >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["int8", "uint8"])
def test_efficientnet_on_photographs(activations: Activations) -> None:
    """Other labels only where the reference itself all but tied them."""
    config = qcompile.QuantConfig(preset="fast")
    quantized = qcompile.quantize(load_model(), calibration=photographs.crops(64, seed=1), config=config)
    batches = photographs.crops(60, seed=2)
    expected = torch.cat([quantized(x) for x in batches])
    actual = Session(quantized, activations=activations).first(batches)
    step = quantized.program.outputs()[0].args[1]
    assert isinstance(step, float)
    steps = ((expected - actual) / step).round().abs()
    shares = [round(float((steps == n).float().mean()), 4) for n in range(4)]
    labels = actual.argmax(1)
    margins = (expected.amax(1) - expected.gather(1, labels[:, None])[:, 0]) / step
    agreement = (expected.argmax(1) == labels).float().mean()
    print(f"{activations}: {agreement:.3f} agree, {sqnr(expected, actual):.1f} dB, off by 0, 1, 2, 3 steps: {shares}")
    assert margins.max() <= 2.5
    assert agreement >= 0.9
    assert (steps <= 1).float().mean() > 0.95


def test_the_command_line_writes_it_too(tmp_path: Path) -> None:
    x = randn(16, 3, 10, 10)
    torch.export.save(torch.export.export(network(), (x[:1],)), tmp_path / "model.pt2")
    np.savez(tmp_path / "data.npz", x=x.numpy())
    arguments = ["export", "model.pt2", "--calibration", "data.npz", "-o", "model.onnx"]
    arguments = [str(tmp_path / a) if "." in a else a for a in arguments]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "12 integer, 0 float" in result.output
    onnx.checker.check_model(onnx.load(tmp_path / "model.onnx"), full_check=True)


def refusal(model: Any, path: Path) -> ExportError:
    with pytest.raises(ExportError) as caught:
        qcompile.export_onnx(model, path)
    assert caught.value.remedy
    assert not path.exists()
    return caught.value


def test_what_cannot_be_exported_says_so(quantized: qcompile.QuantizedModel, tmp_path: Path) -> None:
    assert "called .onnx" in refusal(quantized, tmp_path / "model.qcm").what
    missing = refusal(quantized, tmp_path / "nowhere" / "model.onnx")
    assert "No such file" in missing.what
    assert missing.where == str(tmp_path / "nowhere" / "model.onnx")
    with pytest.raises(ExportError, match="activations is 'int4'"):
        to_onnx(quantized, activations="int4")  # type: ignore[arg-type]
    assert "no integer program" in refusal(network(), tmp_path / "model.onnx").what
    qcompile.compile(network(), calibration=passing.images(2)).save(tmp_path / "model.qcm")
    assert ".qcm" in str(refusal(qcompile.load(tmp_path / "model.qcm"), tmp_path / "model.onnx").remedy)


def test_a_failed_export_leaves_the_old_file(quantized: qcompile.QuantizedModel, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    qcompile.export_onnx(quantized, path)
    before = path.read_bytes()
    with pytest.raises(ExportError):
        qcompile.export_onnx(nn.Identity(), path)  # type: ignore[arg-type]
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_a_missing_package_is_named(
    quantized: qcompile.QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    error = refusal(quantized, tmp_path / "model.onnx")
    assert "onnx is missing" in error.what
    assert error.remedy == "pip install 'qcompile[onnx]'"


def test_an_int8_node_of_a_pass_without_its_scale_is_named() -> None:
    model = qcompile.quantize(network(), calibration=passing.images(2))
    node = next(n for n in model.program.graph.nodes if n.target is torch.ops.qcompile.conv2d.default)
    del node.meta[qcompile.ir.QPARAMS]
    with pytest.raises(ExportError, match=f"the scale of {node.name} is not known"):
        to_onnx(model)
