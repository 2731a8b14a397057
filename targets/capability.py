"""What a target can take as integer: the rows of the op table for which it has an emitter, on shapes
that its kernels understand. Everything else stays float, with the reason in the ledger."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from qcompile.ir import shape_of
from qcompile.ops import Row
from qcompile.targets.base import Target
from qcompile.targets.emitters import emitters_for

q, aten = torch.ops.qcompile, torch.ops.aten
_WHOLE_IMAGE = frozenset({"avg_pool2d", "adaptive_avg_pool2d"})


def _dynamic(sizes: tuple[Any, ...]) -> bool:
    return not all(isinstance(size, int) for size in sizes)


def objection(target: Target) -> Callable[[Row, fx.Node], str | None]:
    """Why `target` cannot take an ATen node as a row, or None when it can."""

    def object_to(row: Row, node: fx.Node) -> str | None:
        op = row.reference if row.schema is None else row.op
        if op not in emitters_for(target):
            return f"{target.name} has no kernel for {row.name}"
        (x, *_) = row.operands(node)
        shape = shape_of(x)
        channels = 1 if len(shape) > 2 and row.name.startswith(("conv", "max_pool", "avg_pool", "adaptive")) else -1
        if shape and _dynamic(shape[channels:][:1]):
            return "its number of channels is dynamic"
        if row.name in _WHOLE_IMAGE and _dynamic(shape[2:]):
            return "its image size is dynamic"
        if row.schema is None and _dynamic(shape_of(node)[-1:]):
            return "its last dimension becomes dynamic"
        dim: Any = node.args[1] if len(node.args) > 1 else 0
        if row.name == "cat" and _dynamic(tuple(shape_of(o)[dim] for o in row.operands(node))):
            return "it concatenates along a dynamic dimension"
        return None

    return object_to
