"""Operators that only move values, on int8 and on float tensors alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from qcompile.export.writer import Name, Writer, arguments
from qcompile.ir import shape_of

_END = np.iinfo(np.int64).max


def _reshape(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    sizes = list(a.get("size") or a.get("shape") or ())
    dynamic = [i for i, size in enumerate(sizes) if not isinstance(size, int)]
    if len(dynamic) == 1 and -1 not in sizes:
        sizes[dynamic[0]] = -1
    return w.op("Reshape", w.stored(a["self"]), w.sizes(sizes, node), at=node, name=node.name)


def _transposed(order: Callable[[int, dict[str, Any]], list[int]]) -> Callable[[Writer, fx.Node], Name]:
    def write(w: Writer, node: fx.Node) -> Name:
        a = arguments(node)
        rank = len(shape_of(a["self"]))
        return w.op("Transpose", w.stored(a["self"]), at=node, name=node.name, perm=order(rank, a))

    return write


def _swap(rank: int, a: dict[str, Any]) -> list[int]:
    order = list(range(rank))
    first, second = a["dim0"] % rank, a["dim1"] % rank
    order[first], order[second] = order[second], order[first]
    return order


def _squeeze(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    shape = shape_of(a["self"])
    dims = a.get("dim", list(range(len(shape))))
    dims = [dims] if isinstance(dims, int) else dims
    axes = sorted({d % len(shape) for d in dims if shape[d] == 1})
    if not axes:
        return w.op("Identity", w.stored(a["self"]), at=node, name=node.name)
    held = w.constant(axes, f"{node.name}_axes", np.int64)
    return w.op("Squeeze", w.stored(a["self"]), held, at=node, name=node.name)


def _unsqueeze(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    held = w.constant([a["dim"] % len(shape_of(node))], f"{node.name}_axes", np.int64)
    return w.op("Unsqueeze", w.stored(a["self"]), held, at=node, name=node.name)


def _slice(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    start, end = (default if a[key] is None else a[key] for key, default in (("start", 0), ("end", _END)))
    axis, step = (w.constant([a[key]], f"{node.name}_{key}", np.int64) for key in ("dim", "step"))
    bounds = w.size(start, node), w.size(end, node)
    return w.op("Slice", w.stored(a["self"]), *bounds, axis, step, at=node, name=node.name)


def _select(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    axis = a["dim"] % len(shape_of(a["self"]))
    if not isinstance(a["index"], int):
        raise w.error(node, "it selects an index that is known at run time only")
    index = w.constant(a["index"], f"{node.name}_index", np.int64)
    return w.op("Gather", w.stored(a["self"]), index, at=node, name=node.name, axis=axis)


def _expand(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    sizes = [1 if isinstance(size, int) and size == -1 else size for size in a["size"]]  # 1: as it is
    return w.op("Expand", w.stored(a["self"]), w.sizes(sizes, node), at=node, name=node.name)


def _identity(w: Writer, node: fx.Node) -> Name:
    return w.op("Identity", w.stored(arguments(node)["self"]), at=node, name=node.name)


def _pad(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    if a.get("mode", "constant") != "constant":
        raise w.error(node, f"its padding mode is {a['mode']!r}")
    x, amounts = a["self"], list(a["pad"])
    missing = [0] * (len(shape_of(x)) - len(amounts) // 2)
    pads = [*missing, *reversed(amounts[::2]), *missing, *reversed(amounts[1::2])]  # torch: the last dimension first
    value, name = a["value"] or 0, f"{node.name}_value"
    fill = w.levels(value, name) if x.meta["val"].dtype is torch.int8 else w.constant(value, name, np.float32)
    return w.op("Pad", w.stored(x), w.sizes(pads, node), fill, at=node, name=node.name)


MOVES: dict[str, Callable[[Writer, fx.Node], Name]] = {
    "reshape": _reshape,
    "permute": _transposed(lambda rank, a: [d % rank for d in a["dims"]]),
    "transpose.int": _transposed(_swap),
    "t": _transposed(lambda rank, a: list(reversed(range(rank)))),
    "squeeze": _squeeze,
    "squeeze.dim": _squeeze,
    "squeeze.dims": _squeeze,
    "unsqueeze": _unsqueeze,
    "slice.Tensor": _slice,
    "select.int": _select,
    "expand": _expand,
    "clone": _identity,
    "constant_pad_nd": _pad,
}
"""Name of a shape row -> what writes any of its ATen operators."""
