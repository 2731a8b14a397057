"""Tables of unary functions: what is in them, and what the row declines."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from qcompile.ir import QParams
from qcompile.ops.unary import table

aten = torch.ops.aten
X = QParams(0.05, 11)
Y = QParams(0.02, -40)


def called(target: Any, shape: tuple[int, ...], *args: Any, **kwargs: Any) -> fx.Node:
    """`target` of an input of `shape` (where `...` stands for it) and constants."""
    owner = fx.GraphModule(torch.nn.Module(), fx.Graph())
    x = owner.graph.placeholder("x")
    x.meta["val"] = torch.empty(shape)

    def node(argument: Any) -> Any:
        if argument is ...:
            return x
        if not isinstance(argument, Tensor):
            return argument
        owner.register_buffer("constant", argument)
        constant = owner.graph.get_attr("constant")
        constant.meta["val"] = argument
        return constant

    return owner.graph.call_function(target, tuple(map(node, args)), kwargs)


def expected(function: Callable[[float], float], x: QParams = X, y: QParams = Y) -> list[int]:
    reals = [(i - 128 - x.zero_point) * x.scale for i in range(256)]
    return [max(-128, min(127, round(function(r) / y.scale) + y.zero_point)) for r in reals]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


FORMULAS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], Callable[[float], float]]] = {
    "sigmoid": (aten.sigmoid.default, (), {}, sigmoid),
    "tanh": (aten.tanh.default, (), {}, math.tanh),
    "silu": (aten.silu.default, (), {}, lambda x: x * sigmoid(x)),
    "gelu": (aten.gelu.default, (), {}, lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2)))),
    "gelu by tanh": (
        aten.gelu.default,
        (),
        {"approximate": "tanh"},
        lambda x: x * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    ),
    "hardswish": (aten.hardswish.default, (), {}, lambda x: x * min(max(x + 3, 0), 6) / 6),
    "hardsigmoid": (aten.hardsigmoid.default, (), {}, lambda x: min(max(x + 3, 0), 6) / 6),
    "elu": (aten.elu.default, (0.7,), {}, lambda x: x if x > 0 else 0.7 * math.expm1(x)),
    "leaky_relu": (aten.leaky_relu.default, (0.2,), {}, lambda x: x if x > 0 else 0.2 * x),
    "mish": (aten.mish.default, (), {}, lambda x: x * math.tanh(math.log1p(math.exp(x)))),
    "softplus": (
        aten.softplus.default,
        (2.0, 20.0),
        {},
        lambda x: x if 2 * x > 20 else math.log1p(math.exp(2 * x)) / 2,
    ),
    "relu": (aten.relu.default, (), {}, lambda x: max(x, 0.0)),
    "clamp": (aten.clamp.default, (-0.5, 0.73), {}, lambda x: min(max(x, -0.5), 0.73)),
    "rsub": (aten.rsub.Scalar, (1.5,), {}, lambda x: 1.5 - x),
    "square": (aten.pow.Tensor_Scalar, (2,), {}, lambda x: x * x),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_table_holds_the_rounded_function(name: str) -> None:
    target, args, kwargs, function = FORMULAS[name]
    entries = table(called(target, (2, 3), ..., *args, **kwargs), X, Y)
    assert entries.shape == (256,)
    # Where the function lands on a tie, the two formulas may round apart by their own float64 error.
    differing = [i for i, (a, b) in enumerate(zip(entries.tolist(), expected(function), strict=True)) if a != b]
    for i in differing:
        real = function((i - 128 - X.zero_point) * X.scale) / Y.scale
        assert abs(abs(real - math.floor(real)) - 0.5) < 1e-9, i


def test_a_value_without_a_real_result_becomes_the_zero_point() -> None:
    entries = table(called(aten.log.default, (4,), ...), X, Y).tolist()
    zero = 128 + X.zero_point
    assert set(entries[:zero]) == {Y.zero_point}
    assert entries[zero] == -128  # log 0 is minus infinity, which saturates
    assert entries[zero + 20] == Y.zero_point  # log 1


def test_a_table_keeps_to_its_clamp() -> None:
    entries = table(called(aten.neg.default, (4,), ...), X, Y, lo=-60, hi=3)
    assert (int(entries.min()), int(entries.max())) == (-60, 3)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 5), (2, 3, 4, 5)])
def test_prelu_has_a_table_per_channel(shape: tuple[int, ...]) -> None:
    slopes = torch.tensor([0.5, -0.25, 2.0])
    entries = table(called(aten.prelu.default, shape, ..., slopes), X, Y)
    assert entries.shape == (3, 256)
    for c, slope in enumerate(slopes.tolist()):
        assert entries[c].tolist() == expected(lambda x, slope=slope: x if x > 0 else slope * x)  # type: ignore[misc]


@pytest.mark.parametrize(("shape", "constant"), [((2, 3), (3,)), ((2, 3, 4, 5), (3, 1, 1)), ((1, 3, 4), (1, 3, 1))])
def test_a_constant_along_the_channels_has_a_table_per_channel(
    shape: tuple[int, ...], constant: tuple[int, ...]
) -> None:
    values = torch.tensor([0.375, -1.0, 0.0])
    entries = table(called(aten.sub.Tensor, shape, values.reshape(constant), ..., alpha=2), X, Y)
    assert [row.tolist() for row in entries] == [
        expected(lambda x, v=v: v - 2 * x)  # type: ignore[misc]
        for v in values.tolist()
    ]


def test_a_single_constant_has_one_table() -> None:
    entries = table(called(aten.div.Tensor, (2, 3, 4), ..., torch.tensor([[4.0]])), X, Y)
    assert entries.tolist() == expected(lambda x: x / 4)
