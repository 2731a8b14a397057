"""What stays float in a program is float in ONNX, operator by operator; what has no counterpart is refused by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import passing
import pytest
import torch
from onnx_session import Session
from passing import randn
from torch import Tensor, nn
from torch.nn import functional as F

import qcompile
from qcompile.errors import ExportError
from qcompile.export import to_onnx
from qcompile.export.floats import FLOATS, name_of
from qcompile.export.products import PRODUCTS

aten = torch.ops.aten
IMAGE, ROWS = randn(2, 4, 7, 6), randn(2, 5, 8)
WEIGHT, MATRIX, VECTOR = randn(6, 4, 3, 3, seed=1), randn(8, 5, seed=2), randn(8, seed=3)
TABLE, KERNEL = randn(9, 4, seed=4), randn(3, 5, 3, seed=8)
MEAN, VARIANCE, GAMMA = randn(4, seed=5), randn(4, seed=6).abs() + 0.1, randn(4, seed=7)


class Apply(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.weight, self.matrix, self.vector = WEIGHT, MATRIX, VECTOR

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


SAME_NAME = (
    "relu", "sigmoid", "tanh", "exp", "abs", "neg", "erf", "sin", "cos", "atan", "floor", "ceil", "round", "sign",
    "hardswish", "hardsigmoid", "silu", "mish", "gelu", "leaky_relu", "relu6", "hardtanh",
)  # fmt: skip
CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    **{name: (getattr(aten, name).default, (2 * IMAGE,)) for name in SAME_NAME},
    "log": (torch.log, (IMAGE.abs() + 0.1,)),
    "sqrt": (torch.sqrt, (IMAGE.abs(),)),
    "reciprocal": (torch.reciprocal, (IMAGE.abs() + 0.1,)),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), (2 * IMAGE,)),
    "prelu": (lambda x: F.prelu(x, GAMMA), (IMAGE,)),
    "clamp": (lambda x: x.clamp(-0.3, 0.8), (IMAGE,)),
    "clamp_min": (lambda x: x.clamp_min(-0.3), (IMAGE,)),
    "clamp_max": (lambda x: x.clamp_max(0.3), (IMAGE,)),
    "add.Tensor": (lambda x, y: torch.add(x, y, alpha=3), (IMAGE, IMAGE[:1])),
    "sub.Tensor": (lambda x, y: x - y, (IMAGE, IMAGE.flip(0))),
    "mul.Tensor": (lambda x: x * 1.7, (IMAGE,)),
    "div.Tensor": (lambda x, y: x / y, (IMAGE, IMAGE.flip(0).abs() + 1)),
    "add.Scalar": (lambda x: aten.add.Scalar(x, 2), (IMAGE,)),
    "sub.Scalar": (lambda x: aten.sub.Scalar(x, 2), (IMAGE,)),
    "mul.Scalar": (lambda x: aten.mul.Scalar(x, 2.5), (IMAGE,)),
    "div.Scalar": (lambda x: aten.div.Scalar(x, 3), (IMAGE,)),
    "rsub.Scalar": (lambda x: torch.rsub(x, 3), (IMAGE,)),
    "pow.Tensor_Scalar": (lambda x: x**3, (IMAGE,)),
    "maximum": (torch.maximum, (IMAGE, IMAGE.flip(0))),
    "minimum": (torch.minimum, (IMAGE, IMAGE.flip(0))),
    "softmax.int": (lambda x: x.softmax(-1), (ROWS,)),
    "_softmax": (lambda x: aten._softmax.default(x, 1, False), (ROWS,)),
    "log_softmax.int": (lambda x: x.log_softmax(1), (ROWS,)),
    "conv2d": (lambda x, w: F.conv2d(x, w, VECTOR[:6], (2, 1), (1, 2), 1, 2), (IMAGE, WEIGHT[:, :2])),
    "float_conv2d": (lambda x: F.conv2d(x, WEIGHT[:, :2], VECTOR[:6], (2, 1), (1, 2), 1, 2), (IMAGE,)),
    "float_conv2d absorbs": (lambda x: (F.conv2d(x, WEIGHT[:4], None, 1, "same") + x).clamp(-0.4, 0.9), (IMAGE,)),
    "float_conv2d relu": (lambda x: F.conv2d(x, WEIGHT, None, 1, (0, 2), (2, 1)).relu(), (IMAGE,)),
    "conv_transpose2d.input": (
        lambda x: F.conv_transpose2d(x, WEIGHT[:4], None, (2, 3), (1, 0), (1, 2), 2),
        (IMAGE,),
    ),
    "conv1d": (lambda x, w: F.conv1d(x, w, None, 2, 1), (ROWS, KERNEL)),
    "float_conv1d": (lambda x: F.conv1d(x, KERNEL, None, 2, 1), (ROWS,)),
    "linear": (lambda x, w: F.linear(x, w, VECTOR[:5]), (ROWS, MATRIX.t().contiguous())),
    "float_linear": (lambda x: F.linear(x, MATRIX.t(), VECTOR[:5]), (ROWS,)),
    "float_linear absorbs": (lambda x, y: (F.linear(x, MATRIX.t()) + y).clamp(max=1.5), (ROWS, ROWS[..., :5].clone())),
    "matmul": (lambda x, y: x @ y, (ROWS, ROWS.mT)),
    "mm": (torch.mm, (MATRIX, MATRIX.t())),
    "bmm": (torch.bmm, (ROWS, ROWS.mT)),
    "addmm": (lambda x, y, z: torch.addmm(x, y, z, beta=2), (VECTOR, MATRIX, randn(5, 8))),
    "batch_norm": (lambda x: F.batch_norm(x, MEAN, VARIANCE, GAMMA, GAMMA), (IMAGE[..., None],)),
    "layer_norm": (lambda x: F.layer_norm(x, (8,), VECTOR, VECTOR), (ROWS,)),
    "layer_norm plain": (lambda x: F.layer_norm(x, (5, 8)), (ROWS,)),
    "mean.dim": (lambda x: x.mean((1, 3), keepdim=True), (IMAGE,)),
    "sum.dim_IntList": (lambda x: x.sum((1, -1)), (IMAGE,)),
    "amax": (lambda x: x.amax(1), (IMAGE,)),
    "cat": (lambda x, y: torch.cat([x, y, x], -1), (IMAGE, IMAGE.flip(0))),
    "max_pool2d": (lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True), (IMAGE,)),
    "max_pool2d, more padding than kernel": (lambda x: F.max_pool2d(x, (2, 1), (3, 1), (1, 0), (2, 1), True), (IMAGE,)),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 3, 2, 1, True, True), (IMAGE,)),
    "avg_pool2d inside": (lambda x: F.avg_pool2d(x, (3, 2), (2, 1), 1, True, False), (IMAGE,)),
    "avg_pool2d divisor": (lambda x: F.avg_pool2d(x, 3, 2, 1, True, True, 5), (IMAGE,)),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (3, 4)), (IMAGE,)),
    "embedding": (lambda i: F.embedding(i, TABLE), (torch.tensor([[0, 3], [8, 1]]),)),
    "_to_copy": (lambda i: aten._to_copy.default(i, dtype=torch.float32) + 0.5, (torch.tensor([[0, 3], [8, 1]]),)),
    "to.dtype": (lambda i: i.to(torch.float32) * 0.5, (torch.tensor([[0, 3], [8, 1]]),)),
    "upsample_nearest2d.vec": (lambda x: F.interpolate(x, scale_factor=2), (IMAGE,)),
    "moves": (lambda x: x.reshape(2, -1)[:, 3:50:2].unsqueeze(1).expand(2, 3, -1).transpose(1, 2), (IMAGE,)),
    "pad": (lambda x: F.pad(x, (1, 0, 2, 1), value=0.7), (IMAGE,)),
    "integers and floats": (lambda x, i: x * i, (IMAGE, torch.arange(6))),
}


def all_float(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> qcompile.QuantizedModel:
    config = qcompile.QuantConfig(exclude=(lambda node: True,))
    return qcompile.quantize(Apply(function).eval(), calibration=[inputs], config=config)


@functools.cache
def case(name: str) -> qcompile.QuantizedModel:
    return all_float(*CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_a_float_operator_is_the_same_in_onnx(name: str) -> None:
    function, inputs = CASES[name]
    model = case(name)
    assert not any(row.kind == "integer" for row in model.coverage)
    (actual,) = Session(model, fused=False)(*inputs)
    torch.testing.assert_close(actual, function(*inputs), rtol=1e-4, atol=1e-5)


def test_every_float_operator_of_the_table_is_tested() -> None:
    written = set()
    for name in CASES:
        written |= {
            name_of(node).removeprefix("qcompile.")
            for node in case(name).program.graph.nodes
            if node.op == "call_function"
        }
    # torch.export takes these apart, or canonicalize gives them another name, before they come here.
    assert set(PRODUCTS) <= written
    assert set(FLOATS) - written <= {"add.Scalar", "sub.Scalar", "mul.Scalar", "div.Scalar", "to.dtype", "mm"}


@pytest.mark.parametrize(
    ("function", "inputs", "text"),
    [
        (lambda x: torch.cumsum(x, 1), (ROWS,), "aten.cumsum.default has no counterpart"),
        (lambda x: torch.div(x, 2, rounding_mode="floor"), (ROWS,), "aten.div.Tensor_mode has no counterpart"),
        (lambda x: F.pad(x, (1, 1), mode="reflect"), (ROWS,), "pad"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(function: Any, inputs: Any, text: str) -> None:
    with pytest.raises(ExportError) as caught:
        to_onnx(all_float(function, inputs))
    assert text in caught.value.what
    assert caught.value.where
    assert caught.value.remedy


def test_a_float_island_between_integers() -> None:
    class Island(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).softmax(-1))

    model = passing.randomize(Island())
    quantized = qcompile.quantize(model, calibration=[ROWS])
    assert [row.op for row in quantized.coverage if row.kind == "float"] == ["aten.softmax.int"]
    torch.testing.assert_close(Session(quantized)(ROWS)[0], quantized(ROWS), rtol=0, atol=0.05)
