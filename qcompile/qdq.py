"""quantize and dequantize nodes of a qdq graph, as PyTorch's PT2E convention writes them.

quantize_per_tensor(x, scale, zero_point, qmin, qmax, dtype)      dequantize_per_tensor(q, the same)
dequantize_per_channel(int8 weight, scales, zeros, 0, -most, most, int8)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import fx

from qcompile.arith import QMAX, QMIN
from qcompile.ir import ORIGIN, Program, QParams, constant, copy_meta
from qcompile.ops.row import Weight
from qcompile.rewrite import call

qd = torch.ops.quantized_decomposed
NAMESPACE = "quantized_decomposed"
QUANTIZE, DEQUANTIZE = qd.quantize_per_tensor.default, qd.dequantize_per_tensor.default
QUANTIZE_CHANNELS, WEIGHT = qd.quantize_per_channel.default, qd.dequantize_per_channel.default
MARKS = (QUANTIZE, DEQUANTIZE, WEIGHT)


def is_quantize(node: fx.Node) -> bool:
    return node.target is QUANTIZE


def is_dequantize(node: Any) -> bool:
    """Whether `node` hands out the real values of a quantized activation."""
    return node.target is DEQUANTIZE and is_quantize(node.args[0])


def params(node: fx.Node) -> QParams:
    """The quantization that a quantize or dequantize node applies."""
    scale, zero_point, qmin, qmax = node.args[1:5]
    return QParams(scale, zero_point, qmin, qmax)  # type: ignore[arg-type]


def pair(program: Program, x: fx.Node, p: QParams) -> fx.Node:
    """dequantize(quantize(x)) at the insertion point; returns the dequantize."""
    bounds = (p.scale, p.zero_point, p.qmin, p.qmax, torch.int8)
    quantized = copy_meta(call(program, x, QUANTIZE, x, *bounds), x)
    return call(program, x, DEQUANTIZE, quantized, *bounds)


def is_narrow(p: QParams) -> bool:
    """Whether the range is smaller than int8's."""
    return p.qmin > QMIN or p.qmax < QMAX


@dataclass(frozen=True)
class Lifted:
    """What a dequantize node of a weight held: see `lift_weights`.

    Attributes:
        name: of that node.
        parts: the names of its int8 tensor, scales and zeros.
        most: the largest integer that the weight may hold.
    """

    weight: Weight
    name: str
    parts: tuple[str, ...]
    most: int


def lift_weights(program: Program) -> dict[fx.Node, Lifted]:
    """Put a constant in the place of each dequantized weight, as rows expect to find one.

    The constant's node stands for real values of the weight; what it holds is the int8 tensor.
    """
    weights: dict[fx.Node, Lifted] = {}
    for node in list(program.graph.nodes):
        if node.target is not WEIGHT or node.args[3] != 0:
            continue
        parts = tuple(str(part.target) for part in node.args[:3])
        with program.graph.inserting_before(node):
            stand_in = program.graph.get_attr(parts[0])
        stand_in.meta.update({key: node.meta[key] for key in ("val", ORIGIN) if key in node.meta})
        q, scale = (constant(program.graph_module, n) for n in node.args[:2])
        weights[stand_in] = Lifted(Weight(q, scale), node.name, parts, node.args[5])
        node.replace_all_uses_with(stand_in)
        program.graph.erase_node(node)
    return weights


def lower_weights(program: Program, lifted: dict[fx.Node, Lifted]) -> None:
    """The inverse of `lift_weights`."""
    for stand_in, held in lifted.items():
        if not stand_in.users:
            continue
        with program.graph.inserting_before(stand_in):
            parts = [program.graph.get_attr(name) for name in held.parts]
            new = program.graph.call_function(WEIGHT, (*parts, 0, -held.most, held.most, torch.int8))
        new.meta["val"] = stand_in.meta["val"]
        stand_in.replace_all_uses_with(copy_meta(new, stand_in))
        program.graph.erase_node(stand_in)
