"""The emitters of linear layers between float tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from qcompile.targets.cpu.linear_dynamic import linear_dynamic, quantize_rows, quantized_rows
from qcompile.targets.cpu.linear_weight_only import linear_weight_only
from qcompile.targets.layout import Dim, product
from qcompile.targets.lowering import Lowering, Value
from qcompile.targets.real_lower import real_tensor

q = torch.ops.qcompile


def _matrix(low: Lowering, node: fx.Node) -> tuple[Dim, int]:
    """The shape of the float input of a linear layer, as one matrix."""
    shape = low.shape(node.args[0])  # type: ignore[arg-type]
    return product(shape[:-1]), int(shape[-1])


def _dense(low: Lowering, node: fx.Node) -> Value:
    """Its input in logical order; a float convolution may have left it channels-last."""
    return low.real(real_tensor(low, node.args[0]), "float32")  # type: ignore[arg-type]


def _linear_dynamic(low: Lowering, node: fx.Node) -> None:
    constants = node.args[1:]
    isa, shape = low.target.isa, _matrix(low, node)
    layout = quantized_rows(*shape)
    rows = low.call(node, quantize_rows(shape, layout, isa, low.symbol_args), [_dense(low, node)], layout, isa.storage)
    weight, scale, bias = (low.tensor(c) for c in constants)  # type: ignore[arg-type]
    low.define_real(node, linear_dynamic(layout, weight, scale, bias, isa, low.symbol_args), [rows])


def _linear_weight_only(low: Lowering, node: fx.Node) -> None:
    *constants, group_size = node.args[1:]
    weight, scale, bias = (low.tensor(c) for c in constants)  # type: ignore[arg-type]
    shape, isa = _matrix(low, node), low.target.isa
    kernel = linear_weight_only(shape, weight, scale, bias, int(group_size), isa, low.symbol_args)  # type: ignore[arg-type]
    low.define_real(node, kernel, [_dense(low, node)])


FLOAT_LINEAR: dict[Any, Callable[[Lowering, fx.Node], None]] = {
    q.linear_dynamic.default: _linear_dynamic,
    q.linear_weight_only.default: _linear_weight_only,
}
