"""The table itself: every row, registered once, and the look-ups derived from it."""

from __future__ import annotations

from typing import Any

from torch import fx

from qcompile.ops import conv
from qcompile.ops.row import Row

ROWS: tuple[Row, ...] = (*conv.ROWS,)

_BY_ATEN: dict[Any, Row] = {}
for _row in ROWS:
    _row.register()
    for _target in _row.aten:
        if _target in _BY_ATEN:
            raise RuntimeError(f"two rows replace {_target}: {_BY_ATEN[_target].name} and {_row.name}")
        _BY_ATEN[_target] = _row


def find(node: fx.Node) -> Row | None:
    """The row that names the ATen operator of `node`, whether or not it can take this node."""
    return _BY_ATEN.get(node.target) if node.op == "call_function" else None


def match(node: fx.Node) -> tuple[Row | None, str]:
    """The row that takes `node`, or None and the reason."""
    row = find(node)
    if row is None:
        return None, f"no integer operator for {node.target}"
    objection = row.decline(node)
    return (None, objection) if objection else (row, "")
