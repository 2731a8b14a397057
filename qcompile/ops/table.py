"""The table itself: every row, registered once, and the look-ups derived from it."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import fx

from qcompile.ops import cat, conv, convert, elementwise, linear, linear_float, pool, shape, unary
from qcompile.ops.row import Row

ROWS: tuple[Row, ...] = (
    *convert.ROWS,
    *conv.ROWS,
    *linear.ROWS,
    *linear_float.ROWS,
    *elementwise.ROWS,
    *cat.ROWS,
    *pool.ROWS,
    *unary.ROWS,
    *shape.ROWS,
)

_BY_NAME: dict[str, Row] = {}
# Two rows may name one ATen operator when they take different operands of it: the sum of two
# activations is `add`, an activation plus a constant is `lookup`.
_BY_ATEN: dict[Any, list[Row]] = defaultdict(list)
for _row in ROWS:
    if _row.name in _BY_NAME:
        raise RuntimeError(f"two rows are named {_row.name}")
    _row.register()
    _BY_NAME[_row.name] = _row
    for _target in _row.aten:
        _BY_ATEN[_target].append(_row)


def names() -> tuple[str, ...]:
    """The names of all rows, in the order of the table."""
    return tuple(_BY_NAME)


def row(name: str) -> Row:
    """The row called `name`. Raises KeyError."""
    return _BY_NAME[name]


def integer_rows() -> tuple[Row, ...]:
    """The rows with an operator of their own, ``torch.ops.qcompile.<name>``."""
    return tuple(r for r in ROWS if r.schema is not None)


def shape_rows() -> tuple[Row, ...]:
    """The rows that keep their ATen operator and only move int8 values."""
    return tuple(r for r in ROWS if r.schema is None)


def find(node: fx.Node) -> Row | None:
    """The row that takes `node`, or else the first that names its ATen operator."""
    rows = _BY_ATEN.get(node.target, []) if node.op == "call_function" else []
    return next((r for r in rows if _objection(r, node) is None), rows[0] if rows else None)


def match(node: fx.Node) -> tuple[Row | None, str]:
    """The row that takes `node`, or None and the reason."""
    row = find(node)
    if row is None:
        return None, f"no integer operator for {node.target}"
    objection = _objection(row, node)
    return (None, objection) if objection else (row, "")


def _objection(row: Row, node: fx.Node) -> str | None:
    """What holds for every row, then the row's own objection."""
    operands = row.operands(node)
    if not operands:
        return "it has no activation operand"
    for operand in operands:
        value = operand.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dtype is not torch.float32:
            return f"its operand {operand.name} is not a float32 tensor"
    return row.decline(node)
