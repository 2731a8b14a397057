"""canonicalize_qdq: whatever form a given quantized graph has, the same values come out, as integers where they can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import passing
import pytest
import torch
from passing import randn
from torch import Tensor, nn

import qcompile
from qcompile import qdq
from qcompile.capture import capture
from qcompile.manager import PassManager
from qcompile.passes import Context
from qcompile.passes.canonicalize_qdq import CanonicalizeQdq

qd = qdq.qd
SIGNED, UNSIGNED = (-128, 127, torch.int8), (0, 255, torch.uint8)
Bounds = tuple[int, int, torch.dtype]


def q(x: Tensor, scale: float = 0.03, zero_point: int = -5, bounds: Bounds = SIGNED) -> Tensor:
    """x as the nearest quantized value."""
    args = (scale, zero_point, *bounds)
    dequantized: Tensor = qd.dequantize_per_tensor.default(qd.quantize_per_tensor.default(x, *args), *args)
    return dequantized


def random_weight(*shape: int, lo: int = -127, hi: int = 127) -> Tensor:
    return torch.randint(lo, hi + 1, shape, generator=torch.Generator().manual_seed(1), dtype=torch.int16)


class Given(nn.Module):
    """`function(model, x)`, with an int8 weight and what belongs to it."""

    weight: Tensor
    scale: Tensor
    zeros: Tensor
    bias: Tensor
    norm: nn.BatchNorm2d

    def __init__(self, function: Callable[[Any, Tensor], Tensor], weight: Tensor, axis: int = 0) -> None:
        super().__init__()
        self.function, self.axis = function, axis
        self.register_buffer("weight", weight)
        channels = weight.shape[axis]
        self.register_buffer("scale", 0.004 + 0.002 * torch.rand(channels, generator=torch.Generator().manual_seed(2)))
        self.register_buffer("zeros", torch.zeros(channels, dtype=torch.int64))
        self.register_buffer("offsets", torch.arange(30, 30 + channels))
        self.register_buffer("bias", randn(weight.shape[0], seed=3))
        self.register_buffer("number", torch.tensor(0.03))
        self.register_buffer("zero", torch.tensor(-5))
        self.norm = nn.BatchNorm2d(weight.shape[0])
        passing.randomize(self.norm)
        with torch.no_grad():
            self.norm.weight[:2] = torch.tensor([-0.7, 0.0])

    def w(self) -> Tensor:
        args = (self.weight, self.scale, self.zeros, self.axis, -128, 127, torch.int8)
        dequantized: Tensor = qd.dequantize_per_channel.default(*args)
        return dequantized

    def conv(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.w(), self.bias, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


KERNEL, MATRIX = random_weight(8, 8, 3, 3).to(torch.int8), random_weight(8, 8).to(torch.int8)
IMAGE, ROW = randn(2, 8, 6, 6), randn(3, 8)
S = 0.4  # a scale for what a convolution gives


def tensors(m: Any, x: Tensor) -> Tensor:
    """Scales and zero points that are tensors."""
    numbers = (m.number, m.zero, *SIGNED)
    x = qd.dequantize_per_tensor.tensor(qd.quantize_per_tensor.tensor(x, *numbers), *numbers)
    return q(m.conv(x), S)


def unsigned_weight(m: Any, x: Tensor) -> Tensor:
    w = qd.dequantize_per_tensor.default((m.weight.to(torch.int16) + 128).to(torch.uint8), 0.005, 128, *UNSIGNED)
    return q(nn.functional.conv2d(q(x), w), S)


def float_weight(m: Any, x: Tensor) -> Tensor:
    """The weight is still float: quantized and dequantized in the graph."""
    args = (m.scale, m.zeros, 0, -127, 127, torch.int8)
    w = qd.dequantize_per_channel.default(qd.quantize_per_channel.default(m.weight * 0.0049, *args), *args)
    return q(nn.functional.conv2d(q(x), w), S)


def offset_weight(m: Any, x: Tensor) -> Tensor:
    """Zero points, in the form that is otherwise this project's own."""
    w = qd.dequantize_per_channel.default(m.weight, m.scale, m.offsets, 0, -127, 127, torch.int8)
    return q(nn.functional.conv2d(q(x), w), S)


def no_zero_points(m: Any, x: Tensor) -> Tensor:
    w = qd.dequantize_per_channel.default(m.weight, m.scale, None, 0, -127, 127, torch.int8)
    return q(nn.functional.conv2d(q(x), w), S)


def matrix_product(m: Any, x: Tensor) -> Tensor:
    return q(q(x) @ m.w(), S)


def two_scales(m: Any, x: Tensor) -> Tensor:
    """One value in two quantizations."""
    y = m.conv(q(x))
    return torch.cat([torch.sigmoid(q(y, S)), torch.sigmoid(q(y, 0.1, 3))], 1)


def summed(m: Any, x: Tensor) -> Tensor:
    return q(torch.relu(m.conv(q(x)) + q(x, 0.07, 11)), S)


# Name: (function, weight, axis, input, scale of the output, the rules that have to fire)
CASES: dict[str, tuple[Callable[[Any, Tensor], Tensor], Tensor, Tensor, float, set[str]]] = {
    "signed": (lambda m, x: q(m.conv(q(x)), S), KERNEL, IMAGE, S, {"weight_form"}),
    "unsigned": (lambda m, x: q(m.conv(q(x, 0.03, 120, UNSIGNED)), S, 131, UNSIGNED), KERNEL, IMAGE, S, {"int8"}),
    "tensors": (tensors, KERNEL, IMAGE, S, {"numbers"}),
    "float weight": (float_weight, KERNEL, IMAGE, S, {"quantized_constant"}),
    "unsigned weight": (unsigned_weight, KERNEL, IMAGE, S, {"weight_form"}),
    "offset weight": (offset_weight, KERNEL // 2, IMAGE, S, {"weight_form"}),
    "no zero points": (no_zero_points, KERNEL, IMAGE, S, {"weight_form"}),
    "matrix product": (matrix_product, MATRIX, ROW, S, {"matmul_to_linear"}),
    "batch norm": (lambda m, x: q(torch.relu(m.norm(m.conv(q(x)))), S), KERNEL, IMAGE, S, {"fold_batchnorm"}),
    "residual": (summed, KERNEL, IMAGE, S, {"weight_form"}),
    "pool": (lambda m, x: q(torch.max_pool2d(m.conv(q(x)), 2), S), KERNEL, IMAGE, S, {"quantize_before_moving"}),
    "pool, relu": (
        lambda m, x: q(torch.relu(torch.max_pool2d(m.conv(q(x)), 2)), S),
        KERNEL,
        IMAGE,
        S,
        {"clamp_first", "quantize_before_moving"},
    ),
    "pooled input": (lambda m, x: q(m.conv(torch.max_pool2d(q(x), 2)), S), KERNEL, IMAGE, S, {"quantize_moved"}),
    "other scale": (
        lambda m, x: q(m.conv(q(torch.max_pool2d(q(x), 2), 0.08, 9)), S),
        KERNEL,
        IMAGE,
        S,
        {"quantize_moved"},
    ),
    "cat": (
        lambda m, x: q(torch.cat([m.conv(q(x)), torch.relu(m.conv(q(x, 0.05)))], 1), S),
        KERNEL,
        IMAGE,
        S,
        {"quantize_before_moving"},
    ),
    "narrow": (
        lambda m, x: q(m.conv(q(x, 0.03, 60, (0, 127, torch.uint8))), S, 0, (-100, 90, torch.int8)),
        KERNEL,
        IMAGE,
        S,
        {"narrow_range"},
    ),
    "gelu": (lambda m, x: q(nn.functional.gelu(m.conv(q(x))), S), KERNEL, IMAGE, S, {"quantize_argument"}),
    "hardswish, pool": (
        lambda m, x: q(torch.max_pool2d(nn.functional.hardswish(m.conv(q(x))), 2), S),
        KERNEL,
        IMAGE,
        S,
        {"quantize_argument", "quantize_before_moving"},
    ),
    "two readers": (
        lambda m, x: (lambda y: torch.cat([q(torch.sigmoid(q(y, S)), 0.004, -128), y], 1))(m.conv(q(x))),
        KERNEL,
        IMAGE,
        S,
        {"quantize_for_all"},
    ),
    "two scales": (two_scales, KERNEL, IMAGE, 0.1, {"quantize_for_all"}),
}


@pytest.mark.parametrize("name", CASES)
def test_each_form_becomes_integer_within_a_step(name: str) -> None:
    function, weight, x, scale, rules = CASES[name]
    model = Given(function, weight, 1 if name == "matrix product" else 0).eval()
    program = capture(model, (x,))
    context = Context()
    PassManager((CanonicalizeQdq(),)).run(program, context)
    assert rules <= {rule for rule, _ in context.rewrites}
    compiled = qcompile.compile(model, example_inputs=(x,))
    expected = model(x)
    actual = compiled(x)
    computed = [row for row in compiled.coverage if row.kind != "shape"]
    stays = {"sigmoid", "cat"} if name.startswith("two ") else set()
    assert {row.op.split(".")[1] for row in computed if row.kind == "float"} <= stays
    assert any(row.kernel.startswith(("conv2d", "linear", "depthwise")) or row.kind == "integer" for row in computed)
    torch.testing.assert_close(actual, compiled.reference(x), rtol=0, atol=compiled.artifact.tolerance)
    assert (expected - actual).abs().max() <= 1.6 * scale


def test_the_range_of_a_max_pool_is_not_forced_upon_the_other_readers_of_its_operand() -> None:
    def pooled(m: Any, x: Tensor) -> Tensor:
        y = m.conv(q(x))
        largest = q(torch.max_pool2d(y, 2), 0.05, -128)  # from 0 on
        return torch.cat([largest.flatten(1), y.flatten(1)], 1)

    model = Given(pooled, KERNEL).eval()
    quantized = qcompile.quantize(model, example_inputs=(IMAGE,))
    assert float(model(IMAGE).min()) < -1
    torch.testing.assert_close(quantized(IMAGE), model(IMAGE), rtol=1e-4, atol=0.051)


def test_a_second_run_changes_nothing() -> None:
    for name in ("pool, relu", "narrow", "gelu", "two readers"):
        function, weight, x, *_ = CASES[name]
        program = capture(Given(function, weight).eval(), (x,))
        PassManager((CanonicalizeQdq(),)).run(program, Context())
        before = passing.operators(program)
        assert not CanonicalizeQdq().run(program, Context())
        assert passing.operators(program) == before


def test_a_weight_of_minus_128_moves_by_less_than_half_a_step_of_the_weight() -> None:
    from qcompile.passes.rules_qdq_form import without_lowest

    weight = random_weight(64, 9, lo=-128)
    weight[::2, 0] = -128
    scale = torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.5
    q8, new = without_lowest(weight, scale)
    assert int(q8.min()) >= -127
    untouched = (weight > -128).all(1)
    assert torch.equal(q8[untouched], weight[untouched].to(torch.int8))
    assert torch.equal(new[untouched], scale[untouched])
    error = (q8 * new[:, None] - weight * scale[:, None]) / scale[:, None]
    assert error.abs().max() <= 1.0
    plain = (weight.clamp(min=-127) - weight).double()
    assert error.square().sum() <= plain.square().sum()


def test_a_bias_that_dwarfs_its_weights_still_fits_int32() -> None:
    """Quantizers give a channel of zeros the smallest scale that they know."""
    model = Given(lambda m, x: q(m.conv(q(x)), 1.0), KERNEL.clone()).eval()
    model.weight[3] = 0
    model.scale[3:5] = 2.0**-30
    model.bias[3:5] = torch.tensor([100.0, -90.0])
    quantized = qcompile.quantize(model, example_inputs=(IMAGE,))
    assert all(row.kind == "integer" for row in quantized.coverage)
    assert (quantized(IMAGE) - model(IMAGE)).abs().max() <= 1.01
    assert (quantized(IMAGE)[:, 3] == 100).all()


REASONS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "scale per input channel": (
        lambda m, x: q(
            nn.functional.conv2d(
                q(x),
                qd.dequantize_per_channel.default(m.weight, m.scale, m.zeros, 1, -128, 127, torch.int8),
            ),
            S,
        ),
        "its weight has a scale per index of dimension 1",
    ),
    "zero point of a weight": (
        lambda m, x: q(nn.functional.conv2d(q(x), qd.dequantize_per_tensor.default(m.weight, 0.01, 70, *SIGNED)), S),
        "its weight has a zero point, and leaves int8 without it",
    ),
    "float weight": (
        lambda m, x: q(nn.functional.conv2d(q(x), m.norm.weight.reshape(8, 1, 1, 1), groups=8), S),
        "its weight is not quantized in the given graph",
    ),
    "float input": (lambda m, x: q(m.conv(x), S), "it is not quantized in the given graph"),
    "float output": (lambda m, x: m.conv(q(x)), "it is not quantized in the given graph"),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_cannot_be_integer_stays_float_and_says_why(name: str) -> None:
    function, reason = REASONS[name]
    model = Given(function, KERNEL).eval()
    quantized = qcompile.quantize(model, example_inputs=(IMAGE,))
    (row,) = (row for row in quantized.coverage if row.kind == "float")
    assert (row.op, row.reason) == ("aten.conv2d.default", reason)
    torch.testing.assert_close(quantized(IMAGE), model(IMAGE), rtol=1e-4, atol=1e-4 if "output" in name else S)


def dynamic(m: Any, x: Tensor) -> Tensor:
    scale, zero_point = qd.choose_qparams.tensor(x, -128, 127, 1e-5, torch.int8)
    numbers = (scale, zero_point, *SIGNED)
    return m.conv(qd.dequantize_per_tensor.tensor(qd.quantize_per_tensor.tensor(x, *numbers), *numbers))


def run_time_scale(m: Any, x: Tensor) -> Tensor:
    numbers = (x.abs().max() / 127, m.zero, *SIGNED)
    return m.conv(qd.dequantize_per_tensor.tensor(qd.quantize_per_tensor.tensor(x, *numbers), *numbers))


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "dynamic": (dynamic, "choose_qparams"),
    "scale at run time": (run_time_scale, "computes a scale at run time"),
    "int16": (lambda m, x: q(x, 0.001, 0, (-32768, 32767, torch.int16)), "torch.int16"),
    "no scale": (lambda m, x: q(x, 0.0, 0), "scale 0.0"),
    "integers out": (lambda m, x: qd.quantize_per_tensor.default(x, 0.1, 0, *SIGNED), "neither quantize nor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_static_int8_is_refused_by_name(name: str) -> None:
    function, text = REFUSED[name]
    error = passing.refusal(Given(function, KERNEL).eval(), calibration=None, example_inputs=(IMAGE,))
    assert isinstance(error, qcompile.errors.QuantizationError)
    assert text in error.what
    assert error.where
