"""Sites: the groups of ATen nodes that one integer operator computes.

A group is a root (the operator that a row takes), then the residual add and the clamp that the row
absorbs. `plan` decides the groups on the float graph; `read` finds them again in an observed or qdq
graph, where a quantized tensor's observer or quantize/dequantize pair marks every boundary. Nothing
but those marks is needed, so a graph quantized elsewhere reads just as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile import ops
from qcompile.ir import QParams, is_constant, is_tensor, shape_of, where
from qcompile.ops.row import Row
from qcompile.ops.unary import clamp_bounds

aten = torch.ops.aten
COVERS = "covers"  # node.meta key of an integer operator: the names of the ATen nodes that it computes
STAYS_FLOAT = "stays_float"  # node.meta key: why a node that a row could take is not quantized
HOLDS = "holds"  # node.meta key of an int8 node of an integer graph: its `Held`


@dataclass(frozen=True)
class Held:
    """The real value that an int8 node stands for.

    Attributes:
        node: the name of the node of the float graph that computes it.
        qparams: how it is quantized.
    """

    node: str
    qparams: QParams


@dataclass(frozen=True)
class Group:
    """One integer operator to be.

    Attributes:
        root: the ATen node that `row` takes.
        operands: the quantized operands of the root.
        add: the residual add that joins the epilogue, and `residual`, its other operand.
        clamp: the clamp that becomes lo and hi.
    """

    root: fx.Node
    row: Row
    operands: tuple[fx.Node, ...]
    add: fx.Node | None = None
    residual: fx.Node | None = None
    clamp: fx.Node | None = None

    @property
    def tail(self) -> fx.Node:
        """The node whose value the integer operator computes."""
        return self.clamp or self.add or self.root

    @property
    def members(self) -> tuple[fx.Node, ...]:
        return tuple(n for n in (self.root, self.add, self.clamp) if n is not None)

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """Every quantized tensor the operator reads."""
        return self.operands if self.residual is None else (*self.operands, self.residual)


def is_shape(row: Row | None) -> bool:
    return row is not None and row.schema is None


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def other_operand(add: fx.Node, operand: fx.Node) -> fx.Node | None:
    """The other operand of a plain sum of two equal shapes; None for any other node."""
    if add.target is not aten.add.Tensor or add.kwargs.get("alpha", 1) != 1:
        return None
    others = [arg for arg in add.args if arg is not operand]
    other = others[0] if len(others) == 1 else None
    if not isinstance(other, fx.Node) or is_constant(other) or not is_tensor(other):
        return None
    same = [str(s) for s in shape_of(other)] == [str(s) for s in shape_of(operand)]
    return other if same else None


Refusal = Callable[[Row, fx.Node], str | None]


def plan(graph: fx.Graph, refusal: Refusal) -> dict[fx.Node, Group]:
    """Root -> group, in graph order, for a float graph. `refusal` is why a node must stay float.

    A node that a row takes but that stays float gets the reason in ``meta[STAYS_FLOAT]``.
    """
    rows = _taken(graph, refusal)
    absorbed: set[fx.Node] = set()
    groups: dict[fx.Node, Group] = {}
    # Last first: where both operands of an add could absorb it, the later one does.
    for node in reversed(list(rows)):
        if node in absorbed:
            continue
        group = Group(node, rows[node], rows[node].operands(node))
        user = only_user(node)
        if group.row.absorbs_residual and user in rows and user not in absorbed:
            residual = other_operand(user, node)
            if residual is not None:
                group = Group(node, group.row, group.operands, user, residual)
        groups[node] = group
        absorbed.update(group.members[1:])
    ordered = {node: groups[node] for node in rows if node in groups and node not in absorbed}
    return _absorb_clamps(ordered, rows)


def _absorb_clamps(groups: dict[fx.Node, Group], rows: dict[fx.Node, Row]) -> dict[fx.Node, Group]:
    clamped: set[fx.Node] = set()
    result: dict[fx.Node, Group] = {}
    for root, group in groups.items():
        if root in clamped:
            continue
        user = only_user(group.tail)
        if group.row.absorbs_clamp and user is not None and user in rows and clamp_bounds(user) is not None:
            group = Group(root, group.row, group.operands, group.add, group.residual, user)
            clamped.add(user)
        result[root] = group
    return result


def _taken(graph: fx.Graph, refusal: Refusal) -> dict[fx.Node, Row]:
    """The nodes that rows take, without those that would only be islands between float operators."""
    rows: dict[fx.Node, Row] = {}
    for node in graph.nodes:
        row, reason = ops.match(node)
        if row is None:
            continue
        reason = refusal(row, node) or ""
        if reason:
            node.meta[STAYS_FLOAT] = reason
        else:
            rows[node] = row
    for node in _islands(rows):
        node.meta[STAYS_FLOAT] = "it stands between operators that stay float"
        del rows[node]
    return rows


def _islands(rows: dict[fx.Node, Row]) -> list[fx.Node]:
    """The nodes whose quantization would only add a quantize before and a dequantize behind them.

    Take the connected pieces of the taken nodes that have no weights. A piece is worth quantizing
    when it touches a node with weights; or, if it computes something, the model's inputs or outputs.
    """
    light = {n for n, row in rows.items() if row.weight_arg is None}
    lonely: list[fx.Node] = []
    seen: set[fx.Node] = set()
    for start in light:
        if start in seen:
            continue
        piece, todo, touched = [start], [start], set[fx.Node]()
        seen.add(start)
        while todo:
            node = todo.pop()
            for near in (*rows[node].operands(node), *node.users):
                if near not in light:
                    touched.add(near)
                elif near not in seen:
                    seen.add(near)
                    piece.append(near)
                    todo.append(near)
        computes = not all(is_shape(rows[n]) for n in piece)
        if not any(n in rows or (computes and n.op in ("placeholder", "output")) for n in touched):
            lonely += piece
    return lonely


def read(graph: fx.Graph, enters: Callable[[Any], bool], leaves: Callable[[fx.Node], bool]) -> Iterator[Group]:
    """The groups of a graph with marked boundaries, in order.

    Args:
        enters: whether a node hands out a quantized tensor (an observer, a dequantize).
        leaves: whether a node takes a tensor to be quantized (an observer, a quantize).
    """
    for node in graph.nodes:
        row, _ = ops.match(node)
        if row is None or STAYS_FLOAT in node.meta:
            continue
        operands = row.operands(node)
        if not operands or not all(enters(n) for n in operands):
            continue
        group = _follow(Group(node, row, operands), enters, leaves)
        if group is not None:
            yield group


def _follow(group: Group, enters: Callable[[Any], bool], leaves: Callable[[fx.Node], bool]) -> Group | None:
    """Walk from the root to the boundary behind it; None when there is none."""
    user = only_user(group.tail)
    if user is None or leaves(user):
        return group if user is not None else None
    if STAYS_FLOAT in user.meta:
        return None
    if group.row.absorbs_residual and group.add is None:
        other = other_operand(user, group.tail)
        if other is not None and enters(other):
            return _follow(Group(group.root, group.row, group.operands, user, other), enters, leaves)
    if group.row.absorbs_clamp and group.clamp is None and clamp_bounds(user) is not None:
        clamped = Group(group.root, group.row, group.operands, group.add, group.residual, user)
        return _follow(clamped, enters, leaves)
    return None


def is_computed(node: fx.Node) -> bool:
    """Whether `node` is an operator of the model: a call, but no access to one of several results."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") != "getitem"


def computes_no_reals(node: fx.Node) -> bool:
    """Whether `node` has to do with sizes, indices or masks only."""
    reals = [n for n in (node, *node.all_input_nodes) if _holds_reals(n.meta.get("val"))]
    return not reals or (not is_tensor(node) and not isinstance(node.meta.get("val"), (tuple, list)))


def _holds_reals(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_holds_reals(v) for v in value)
    return isinstance(value, Tensor) and value.is_floating_point()


def place(node: fx.Node) -> str:
    """How an error names a node: its module path, or its own name (an input's as the model has it)."""
    return where(node) or (str(node.target) if node.op == "placeholder" else node.name)
