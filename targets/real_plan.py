"""Which layout every real activation gets that a float convolution or linear layer reads or computes.

Convolutions work channels-last, linear layers on rows. What is rounded to bfloat16 is stored in 16 bits. All other
real tensors are float32 in logical order. Here too a consumer that finds another layout has the value copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcompile.ops.real import BFLOAT16, FLOAT_CONV2D, OPS, is_rounded, numerics_of
from qcompile.targets.cpu.real import BF16
from qcompile.targets.layout import Dim, Layout, align, innermost

DEQUANTIZE = torch.ops.qcompile.dequantize.default
Halo = tuple[int, int, int, int]


@dataclass(frozen=True)
class PlannedReal:
    """The layout of one value, with zeros in its halo and beyond its channels, and how it is stored."""

    layout: Layout
    dtype: str


def padding_of(conv: fx.Node) -> Halo:
    """(top, bottom, left, right) of a float convolution."""
    pads: Any = conv.args[4]
    return tuple(pads)


def plan_real(graph: fx.Graph, shapes: dict[fx.Node, tuple[Dim, ...]], lanes: int) -> dict[fx.Node, PlannedReal]:
    """The planned layout of every such activation, its channels allocated in multiples of `lanes`."""
    planned = {}
    for node in graph.nodes:
        readers = [user for user in node.users if user.target in OPS]
        if node.target in OPS or (node.target is DEQUANTIZE and readers):
            convs = [user for user in readers if user.target is FLOAT_CONV2D and user.args[0] is node]
            last = node.target is FLOAT_CONV2D or bool(convs)
            pads = [padding_of(conv) for conv in convs] or [(0, 0, 0, 0)]
            halo: Any = tuple(max(pad[i] for pad in pads) for i in range(4))
            pitch = align(innermost(shapes[node], last), lanes)
            planned[node] = PlannedReal(Layout(shapes[node], last, pitch, halo), _stored(node, readers))
    return planned


def _stored(node: fx.Node, readers: list[fx.Node]) -> str:
    if node.target in OPS:
        return BF16 if is_rounded(node) else "float32"
    factor = all(n in readers and n.args[0] is node and numerics_of(n) == BFLOAT16 for n in node.users)
    return BF16 if factor else "float32"
