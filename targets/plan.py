"""Which layout every int8 activation gets, decided over the whole integer graph.

Convolutions and pools work channels-last, linear layers on rows; elementwise operators follow the
values they touch. A convolution's padding becomes a halo that the producer of its input writes. A
network input of up to four channels that only feeds convolutions is stored with four bytes a pixel, or
with as many as it has channels where that saves multiplications and the kernels take it.
The choice is about speed only: a consumer that finds another layout has the value copied.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from qcompile.ir import is_tensor
from qcompile.targets.layout import NO_HALO, Dim, Layout, align, joins_taps

q = torch.ops.qcompile

CHANNELS_LAST = frozenset(
    {
        q.conv2d.default,
        q.conv1d.default,
        q.max_pool2d.default,
        q.avg_pool2d.default,
        q.adaptive_avg_pool2d.default,
    }
)
ELEMENTWISE = frozenset({q.add.default, q.mul.default, q.lookup.default, q.cat.default})
PITCH = 16  # channels are allocated in multiples of this: whole vectors on every processor
Halo = tuple[int, int, int, int]


@dataclass(frozen=True)
class Planned:
    """The layout of one value, and the int8 value that its halo holds."""

    layout: Layout
    fill: int = 0


@dataclass
class _Groups:
    """Union-find over the nodes that elementwise operators tie together."""

    parent: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def find(self, node: fx.Node) -> fx.Node:
        self.parent.setdefault(node, node)
        while self.parent[node] is not node:
            self.parent[node] = self.parent[self.parent[node]]
            node = self.parent[node]
        return node

    def join(self, a: fx.Node, b: fx.Node) -> None:
        self.parent[self.find(a)] = self.find(b)


def is_int8(node: fx.Node) -> bool:
    return is_tensor(node) and node.meta["val"].dtype is torch.int8


def rank(node: fx.Node) -> int:
    return int(node.meta["val"].dim())


def padding_of(conv: fx.Node) -> Halo:
    """(top, bottom, left, right) of an integer convolution."""
    pads: Any = conv.args[9]
    return tuple(pads) if conv.target is q.conv2d.default else (0, 0, *pads)


def takes_tight(conv: fx.Node) -> bool:
    """Whether a convolution can read pixels that have no bytes between them."""
    a: Any = conv.args
    dilation = a[10][1] if conv.target is q.conv2d.default else a[10]
    return joins_taps(*_row(conv), dilation, a[11])


def _row(conv: fx.Node) -> tuple[int, int]:
    """(columns of its kernel, channels of its input)."""
    a: Any = conv.args
    return int(a[1].meta["val"].shape[-1]), int(a[0].meta["val"].shape[1])


def _saves_groups(conv: fx.Node) -> bool:
    """Whether joined taps are fewer groups of four channels."""
    columns, channels = _row(conv)
    return takes_tight(conv) and align(columns * channels, 4) < columns * align(channels, 4)


def _convolutions(node: fx.Node) -> list[fx.Node]:
    """The convolutions that read `node` as their input (not as a residual)."""
    convs = (q.conv2d.default, q.conv1d.default)
    return [u for u in node.users if u.target in convs and u.args[0] is node]


def _zero_point(node: fx.Node) -> int | None:
    """The zero point that the operator of `node` states for its output, if it does."""
    positions: dict[Any, int] = {
        q.quantize.default: 2,
        q.conv2d.default: 5,
        q.conv1d.default: 5,
        q.linear.default: 5,
        q.add.default: 6,
        q.mul.default: 5,
        q.cat.default: 4,
        q.avg_pool2d.default: 9,
        q.adaptive_avg_pool2d.default: 4,
    }
    position = positions.get(node.target)
    return None if position is None else int(node.args[position])  # type: ignore[arg-type]


def _channels_last(nodes: list[fx.Node]) -> set[fx.Node]:
    """The nodes whose values are stored channels-last."""
    groups = _Groups()
    votes: set[fx.Node] = set()
    for node in nodes:
        if node.target in ELEMENTWISE:
            for operand in node.all_input_nodes:
                if is_int8(operand) and operand.op != "get_attr" and rank(operand) == rank(node):
                    groups.join(operand, node)
    for node in nodes:
        per_channel = node.target is q.lookup.default and rank(node.args[1]) == 2  # type: ignore[arg-type]
        if node.target in CHANNELS_LAST or per_channel or any(u.target in CHANNELS_LAST for u in node.users):
            votes.add(groups.find(node))
    return {n for n in nodes if 3 <= rank(n) <= 4 and n.target is not q.linear.default and groups.find(n) in votes}


def plan(graph: fx.Graph, shapes: dict[fx.Node, tuple[Dim, ...]], whole_words: bool) -> dict[fx.Node, Planned]:
    """The planned layout of every int8 activation; `shapes` are logical shapes with TVM dimensions.

    `whole_words`: every pixel takes a multiple of four bytes.
    """
    nodes = [n for n in graph.nodes if is_int8(n) and n.op != "get_attr"]
    last = _channels_last(nodes)
    planned = {}
    for node in nodes:
        shape = shapes[node]
        if node not in last:
            pitch = align(shape[-1], PITCH) if shape and isinstance(shape[-1], int) else 1
            planned[node] = Planned(Layout(shape, False, pitch))
            continue
        convs = _convolutions(node)
        pads = [padding_of(u) for u in convs if padding_of(u) != NO_HALO]
        fills = {int(u.args[4]) for u in convs if padding_of(u) != NO_HALO}  # type: ignore[arg-type]
        own = _zero_point(node)
        agree = len(fills) == 1 and own in (None, *fills)
        halo = tuple(max(p[i] for p in pads) for i in range(4)) if agree else NO_HALO
        only_convs = len(convs) == len(node.users) and all(
            u.target is q.conv2d.default and u.args[11] == 1 and "residual" not in u.kwargs for u in convs
        )
        few = int(shape[1]) <= 4 and len(shape) == 4 and only_convs
        pitch = align(int(shape[1]), PITCH)
        if few and node.target is q.quantize.default:
            pitch = int(shape[1]) if all(map(_saves_groups, convs)) and not whole_words else 4
        layout = Layout(shape, True, pitch, halo)  # type: ignore[arg-type]
        planned[node] = Planned(layout, fills.pop() if agree else 0)
    return planned
