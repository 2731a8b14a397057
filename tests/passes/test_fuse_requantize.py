"""quantize and fuse_requantize: from measurements to an integer graph that follows the float model."""

from __future__ import annotations

import pytest
import torch
from passing import Block, TwoBranches, matches_golden, operators, randn, randomize, run_until, sqnr
from torch import Tensor, nn

from qcompile import ops
from qcompile.config import QuantConfig
from qcompile.ops.row import Example
from qcompile.quantizer import quantize
from qcompile.weights import quantize_weight

EXAMPLES = [
    pytest.param(example, id=f"{row.name}-{i}")
    for row in ops.ROWS
    for i, example in enumerate(row.examples(torch.Generator().manual_seed(0)))
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_row_goes_through_end_to_end(example: Example) -> None:
    """Each row's own float modules: nothing stays float, and the integer graph follows the float one."""
    model = example.module.eval()
    quantized = quantize(model, example_inputs=example.inputs, calibration=[example.inputs])
    assert [r for r in quantized.coverage if r.kind == "float"] == []
    with torch.no_grad():
        expected = model(*example.inputs)
    assert sqnr(expected, quantized(*example.inputs)) > 25


def test_a_residual_block_is_two_convolutions() -> None:
    program = run_until("fuse_requantize", randomize(Block()), (randn(1, 4, 6, 6),))
    assert operators(program) == ["quantize", "conv2d", "conv2d", "dequantize"]
    assert matches_golden("fuse_requantize", program)


def test_the_qdq_graph_follows_the_pt2e_convention() -> None:
    program = run_until("quantize", randomize(Block()), (randn(1, 4, 6, 6),))
    assert matches_golden("quantize", program)


@pytest.mark.parametrize("model", [Block(), TwoBranches()], ids=["block", "branches"])
def test_the_integer_graph_follows_the_qdq_graph(model: nn.Module) -> None:
    """Their only difference is where values are rounded: at most one step."""
    x = randn(2, 4, 6, 6)
    randomize(model)
    (qdq,), (integer,) = (run_until(name, model, (x,))(x) for name in ("quantize", "fuse_requantize"))
    with torch.no_grad():
        step = float(model(x).max() - model(x).min()) / 255
    assert float((qdq - integer).abs().max()) <= 1.01 * step
    assert sqnr(model(x).detach(), integer) > 30


def test_every_operator_is_in_the_ledger_once() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Softmax(1), nn.Linear(64, 5)))
    rows = quantize(model, calibration=[randn(1, 3, 6, 6)]).coverage
    assert [(r.op.split(".")[1], r.kind, r.where) for r in rows] == [
        ("conv2d", "integer", "0"),
        ("relu", "integer", "1"),
        ("reshape", "shape", "2"),
        ("softmax", "float", "3"),
        ("linear", "integer", "4"),
    ]
    assert "no integer operator" in next(r.reason for r in rows if r.kind == "float")


class OnlyAlike(nn.Module):
    """Operators that a rule declines: at the operator itself, and at one of its two results."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.conv(x)
        return y.mean(1), *nn.functional.max_pool2d(y, 2, return_indices=True), y.softmax(1)


def test_an_operator_that_a_rule_declined_has_its_reason_in_the_ledger() -> None:
    rows = quantize(randomize(OnlyAlike()), calibration=[randn(2, 3, 8, 8)]).coverage
    assert {r.reason for r in rows if r.kind == "float"} == {
        "no integer operator for aten.mean.dim: it averages dimensions (1,) of 4, which are not all of space",
        "no integer operator for aten.max_pool2d_with_indices.default: its indices are used",
        "no integer operator for aten.softmax.int",
    }


def test_an_excluded_convolution_stays_float_and_says_so() -> None:
    model, x = randomize(Block()), randn(1, 4, 6, 6)
    quantized = quantize(model, calibration=[x], config=QuantConfig(exclude=("second",)))
    (row,) = (r for r in quantized.coverage if r.kind == "float")
    assert row.op == "aten.conv2d.default"
    assert "excluded by the configuration ('second')" in row.reason
    assert sqnr(model(x).detach(), quantized(x)) > 30


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return (self.linear(x) + mask).softmax(-1)


def test_an_addition_of_minus_infinity_stays_float() -> None:
    model, x = randomize(Masked()), randn(3, 4)
    mask = torch.zeros(3, 4).masked_fill(torch.eye(3, 4) > 0, -3e38)
    quantized = quantize(model, calibration=[(x, mask)])
    reasons = {r.op: r.reason for r in quantized.coverage if r.kind == "float"}
    assert "not finite" in reasons["aten.add.Tensor"]
    assert sqnr(model(x, mask).detach(), quantized(x, mask)) > 25


def test_an_all_zero_channel_and_a_constant_activation_work() -> None:
    conv = nn.Conv2d(3, 4, 3)
    model = randomize(nn.Sequential(conv, nn.ReLU(), nn.Conv2d(4, 4, 1)))
    assert conv.bias is not None
    conv.weight.data[1:] = 0
    conv.bias.data[2:] = torch.tensor([0.0, 5.0])
    x = randn(1, 3, 6, 6)
    assert sqnr(model(x).detach(), quantize(model, calibration=[x])(x)) > 30


def test_all_zero_calibration_gives_a_finite_program() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU()))
    assert torch.isfinite(quantize(model, calibration=[torch.zeros(1, 3, 6, 6)])(randn(1, 3, 6, 6))).all()


def test_a_weight_scale_leaves_room_for_the_bias() -> None:
    weight = quantize_weight(torch.zeros(2, 3), torch.tensor([1000.0, 0.0]), 1e-3, 127)
    assert float(1000.0 / (1e-3 * weight.scale[0])) <= 2**30 * 1.0001
    assert float(weight.scale[1]) > 0


def test_a_dynamic_batch_stays_dynamic() -> None:
    model = randomize(nn.Sequential(Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)))
    shapes = ({0: torch.export.Dim("batch", min=1, max=16)},)
    data = [randn(2, 4, 6, 6, seed=i) for i in range(1, 33)]
    quantized = quantize(model, calibration=data, dynamic_shapes=shapes)
    assert quantized.program.inputs[0].shape[0] == ("batch", 1, 16)
    for batch in (1, 5):
        x = randn(batch, 4, 6, 6)
        assert sqnr(model(x).detach(), quantized(x)) > 20


def test_asymmetric_padding_joins_the_convolution() -> None:
    model, x = nn.Sequential(nn.ZeroPad2d((0, 1, 2, 3)), nn.Conv2d(3, 4, 3, stride=2)), randn(1, 3, 6, 6)
    randomize(model)
    quantized = quantize(model, calibration=[x])
    (conv,) = (n for n in quantized.program.graph.nodes if n.target is torch.ops.qcompile.conv2d.default)
    assert conv.args[9] == [2, 3, 0, 1]
    assert operators(quantized.program) == ["quantize", "conv2d", "dequantize"]
    assert sqnr(model(x).detach(), quantized(x)) > 30
    before = run_until("fuse_requantize", model, (x,))
    assert torch.equal(before(x)[0], quantized(x))
