"""The operators that mark what is quantized in a qdq graph: PyTorch's own, as its PT2E tools write them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import fx

from qcompile.ir import ORIGIN, Program, QParams, constant
from qcompile.ops.row import Weight

_qd = torch.ops.quantized_decomposed
QUANTIZE, DEQUANTIZE = _qd.quantize_per_tensor.default, _qd.dequantize_per_tensor.default
WEIGHT = _qd.dequantize_per_channel.default
MARKS = (QUANTIZE, DEQUANTIZE, WEIGHT)


def is_quantize(node: fx.Node) -> bool:
    return node.target is QUANTIZE


def is_dequantize(node: fx.Node) -> bool:
    """Whether it hands out what a quantize node took."""
    return node.target is DEQUANTIZE and is_quantize(node.args[0])  # type: ignore[arg-type]


def params(node: fx.Node) -> QParams:
    """The quantization that a quantize or dequantize node applies."""
    scale, zero_point, qmin, qmax = node.args[1:5]
    return QParams(scale, zero_point, qmin, qmax)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Lifted:
    """What a dequantize node of a weight held: see `lift_weights`.

    Attributes:
        name: of that node.
        most: the largest integer that the weight may hold.
    """

    weight: Weight
    name: str
    most: int


def lift_weights(program: Program) -> dict[fx.Node, Lifted]:
    """Put a constant in the place of each dequantized weight, as rows expect to find one.

    The constant's node stands for real values of the weight; what it holds is the int8 tensor.
    """
    weights: dict[fx.Node, Lifted] = {}
    for node in list(program.graph.nodes):
        if node.target is not WEIGHT or node.args[3] != 0:
            continue
        q, scale, most = node.args[0], node.args[1], node.args[5]
        with program.graph.inserting_before(node):
            stand_in = program.graph.get_attr(str(q.target))
        stand_in.meta.update({key: node.meta[key] for key in ("val", ORIGIN) if key in node.meta})
        values = (constant(program.graph_module, n) for n in (q, scale))
        weights[stand_in] = Lifted(Weight(*values), node.name, most)
        node.replace_all_uses_with(stand_in)
        program.graph.erase_node(node)
    return weights
