"""The verifier holds the integer graph to what the arithmetic takes for proven, whatever a pass wrote."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from passing import randn, randomize
from torch import Tensor, nn

from qcompile import arith
from qcompile.config import QuantConfig
from qcompile.errors import PassError
from qcompile.ir import Program, Property
from qcompile.passes import Context, Pass, default_pipeline
from qcompile.quantizer import quantize

X = randn(1, 4, 6, 6)


@dataclass(frozen=True)
class EditConstant(Pass):
    """Changes the integer weights or bias of the only layer."""

    argument: int
    change: Callable[[Tensor], Tensor]

    name: ClassVar[str] = "edit"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.INTEGER})

    def run(self, program: Program, context: Context) -> bool:
        (layer,) = (n for n in program.graph.nodes if str(n.target).startswith(("qcompile.conv", "qcompile.linear")))
        value = program.graph_module.get_buffer(str(layer.args[self.argument].target))
        value.copy_(self.change(value))
        return True


def with_constant(argument: int, change: Callable[[Tensor], Tensor], activations: str = "static") -> Program:
    model = randomize(nn.Linear(6, 4) if activations == "dynamic" else nn.Conv2d(4, 4, 3))
    config = QuantConfig(activations=activations)
    behind = "quantize_linear_weights" if activations == "dynamic" else "fuse_requantize"
    pipeline = default_pipeline(config).after(behind, EditConstant(argument, change))
    return quantize(model, calibration=[X], pipeline=pipeline, config=config).program


def extreme(value: Tensor) -> Tensor:
    return torch.where(value == value.max(), -128, value)


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_a_pass_that_writes_a_weight_beyond_the_contract_is_named(activations: str) -> None:
    with pytest.raises(
        PassError, match="'edit' left an illegal graph: weight holds -128, and must be from -127 to 127"
    ):
        with_constant(1, extreme, activations)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_pass_after_which_an_accumulator_could_overflow_is_named(sign: int) -> None:
    """To the last integer."""
    plain = with_constant(2, lambda bias: bias)
    (conv,) = (n for n in plain.graph.nodes if str(n.target).startswith("qcompile.conv"))
    weight = plain.graph_module.get_buffer(str(conv.args[1].target))
    room = arith.INT32_MAX - arith.largest_accumulator(weight[:1], torch.zeros(1), conv.args[4])

    def bias_of(first: int) -> Callable[[Tensor], Tensor]:
        return lambda bias: torch.cat([torch.tensor([sign * first]), bias[1:]])

    with_constant(2, bias_of(room))
    with pytest.raises(PassError, match="'edit' left an illegal graph: an int32 accumulator could reach 2147483648"):
        with_constant(2, bias_of(room + 1))
