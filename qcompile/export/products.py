"""Convolutions and linear layers that stayed float, with the residual add and the clamp that they absorbed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import fx

from qcompile.export.writer import Name, Writer, arguments
from qcompile.ops.real import FLOAT32


def _finish(w: Writer, node: fx.Node, a: dict[str, Any], y: Name) -> Name:
    if a["numerics"] != FLOAT32:
        raise w.error(node, f"it computes in {a['numerics']}", "compile with numerics='float32' to export it")
    if a["residual"] is not None:
        y = w.op("Add", y, w.stored(a["residual"]), at=node)
    bounds = [a["lo"], a["hi"]]
    if all(map(math.isinf, bounds)):
        return y
    held = [
        "" if math.isinf(bound) else w.constant(bound, f"{node.name}_{side}", np.float32)
        for side, bound in zip(("lo", "hi"), bounds, strict=True)
    ]
    return w.op("Clip", y, *held, at=node)


def _conv(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    top, bottom, left, right = a["padding"]
    inputs = [w.stored(a[key]) for key in ("x", "weight", "bias")]
    geometry = {"strides": list(a["stride"]), "dilations": list(a["dilation"]), "group": a["groups"]}
    kernel = list(w.tensor(a["weight"]).shape[2:])
    y = w.op("Conv", *inputs, at=node, pads=[top, left, bottom, right], kernel_shape=kernel, **geometry)
    return _finish(w, node, a, y)


def _linear(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    weight = w.constant(np.ascontiguousarray(w.tensor(a["weight"]).numpy().T), f"{node.name}_weight")
    y = w.op("Add", w.op("MatMul", w.stored(a["x"]), weight, at=node), w.stored(a["bias"]), at=node)
    return _finish(w, node, a, y)


PRODUCTS = {"float_conv2d": _conv, "float_linear": _linear}
"""Name of the operator, without "qcompile." -> what writes it."""
