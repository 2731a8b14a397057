"""The integer operators that compute, each as DequantizeLinear, a float operator, QuantizeLinear.

A weight is an int8 constant behind a DequantizeLinear per output channel, and a bias an int32 constant at scale
s_x * s_w. The program keeps m = s_x * s_w / s_y; s_w is chosen such that this product and quotient, taken
in float32, give m again. An engine that fuses the three nodes then multiplies by the very same number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import TensorProto
from torch import fx

from qcompile.arith import QMIN
from qcompile.export.pooling import adaptive_average, average, maximum
from qcompile.export.writer import Name, Writer, arguments

_ULPS = 16


def weight_scale(m: np.ndarray, x_scale: float, y_scale: float) -> np.ndarray:
    """float32 s_w with float32(float32(x_scale * s_w) / y_scale) == m, where there is such a number near by."""
    x, y = np.float32(x_scale), np.float32(y_scale)
    nearest = (m.astype(np.float64) * np.float64(y) / np.float64(x)).astype(np.float32)
    best, found = nearest, np.zeros(m.shape, bool)
    for ulps in sorted(range(-_ULPS, _ULPS + 1), key=abs):
        tried = (nearest.view(np.int32) + np.int32(ulps)).view(np.float32)
        exact = (tried * x / y == m) & ~found
        best, found = np.where(exact, tried, best), found | exact
    return np.asarray(best, np.float32)


def _weights(w: Writer, node: fx.Node, a: dict[str, Any], transposed: bool = False) -> tuple[Name, Name]:
    """The dequantized weight and bias; `transposed`: output channels last."""
    x_scale = w.qparams(a["x"]).scale
    scale = weight_scale(w.tensor(a["m"]).numpy(), x_scale, w.qparams(node).scale)
    weight = w.tensor(a["weight"])
    axis = 1 if transposed else 0
    held = w.constant(weight.t() if transposed else weight, f"{node.name}_weight")
    scales = w.constant(scale, f"{node.name}_weight_scale")
    zeros = w.constant(np.zeros(len(scale)), f"{node.name}_weight_zero_point", np.int8)
    bias = w.constant(w.tensor(a["bias"]), f"{node.name}_bias")
    bias_scale = w.constant(scale * np.float32(x_scale), f"{node.name}_bias_scale")
    return (
        w.op("DequantizeLinear", held, scales, zeros, at=node, name=f"{node.name}_real_weight", axis=axis),
        w.op("DequantizeLinear", bias, bias_scale, at=node, name=f"{node.name}_real_bias", axis=0),
    )


def _finish(w: Writer, node: fx.Node, a: dict[str, Any], y: Name) -> Name:
    if a["residual"] is not None:
        other = a["residual"]
        factor = a["residual_m"] * w.qparams(node).scale / w.qparams(other).scale
        y = w.op("Add", y, w.scaled(w.real(other), factor, node), at=node)
    return w.quantized(w.clipped(y, a["lo"], a["hi"], node), node)


def _conv(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    one = isinstance(a["stride"], int)  # 1-d
    weight, bias = _weights(w, node, a)
    pads = a["padding"] if one else [a["padding"][i] for i in (0, 2, 1, 3)]  # ONNX: all begins, then all ends
    geometry = {"strides": a["stride"], "dilations": a["dilation"]}
    geometry = {key: [value] if one else list(value) for key, value in geometry.items()}
    kernel = list(w.tensor(a["weight"]).shape[2:])
    x = w.real(a["x"])
    y = w.op("Conv", x, weight, bias, at=node, pads=pads, kernel_shape=kernel, group=a["groups"], **geometry)
    return _finish(w, node, a, y)


def _linear(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    flat = a["x"].meta["val"].dim() == 2
    weight, bias = _weights(w, node, a, transposed=not flat)
    if flat:
        y = w.op("Gemm", w.real(a["x"]), weight, bias, at=node, transB=1)
    else:
        y = w.op("Add", w.op("MatMul", w.real(a["x"]), weight, at=node), bias, at=node)
    return _finish(w, node, a, y)


def _add(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    y_scale = w.qparams(node).scale
    factors = [a[f"{side}_m"] * y_scale / w.qparams(a[side]).scale for side in "ab"]
    first = w.scaled(w.real(a["a"]), factors[0], node)
    kind = "Sub" if factors[1] < 0 else "Add"
    y = w.op(kind, first, w.scaled(w.real(a["b"]), abs(factors[1]), node), at=node)
    return w.quantized(w.clipped(y, a["lo"], a["hi"], node), node)


def _mul(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    factor = a["m"] * w.qparams(node).scale / (w.qparams(a["a"]).scale * w.qparams(a["b"]).scale)
    y = w.scaled(w.op("Mul", w.real(a["a"]), w.real(a["b"]), at=node), factor, node)
    return w.quantized(w.clipped(y, a["lo"], a["hi"], node), node)


def _cat(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    y_scale = w.qparams(node).scale
    parts = [w.scaled(w.real(x), m * y_scale / w.qparams(x).scale, node) for x, m in zip(a["xs"], a["ms"], strict=True)]
    return w.quantized(w.op("Concat", *parts, at=node, axis=a["dim"]), node)


def _quantize(w: Writer, node: fx.Node) -> Name:
    return w.quantized(w.stored(arguments(node)["x"]), node)


def _dequantize(w: Writer, node: fx.Node) -> Name:
    return w.real(arguments(node)["x"])


def _max_pool2d(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    y = maximum(w, node, w.real(a["x"]), a["x"], a["kernel"], a["stride"], a["padding"], a["dilation"], a["ceil_mode"])
    return w.quantized(y, node)


def _avg_pool2d(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    geometry = a["kernel"], a["stride"], a["padding"], a["ceil_mode"]
    y = average(w, node, w.real(a["x"]), a["x"], *geometry, a["count_include_pad"], a["divisor_override"])
    return w.quantized(_rescaled(w, node, a, y), node)


def _adaptive_avg_pool2d(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    y = adaptive_average(w, node, w.real(a["x"]), a["x"], a["output_size"])
    return w.quantized(_rescaled(w, node, a, y), node)


def _rescaled(w: Writer, node: fx.Node, a: dict[str, Any], y: Name) -> Name:
    return w.scaled(y, a["ratio"] * w.qparams(node).scale / w.qparams(a["x"]).scale, node)


def _lookup(w: Writer, node: fx.Node) -> Name:
    """The table itself: exact, whatever the function was."""
    a = arguments(node)
    table = w.tensor(a["table"])
    index = w.op("Cast", w.stored(a["x"]), at=node, to=TensorProto.INT32)
    offset = np.asarray(-QMIN - w.offset)
    if table.dim() == 2:  # one row of the table per channel
        channels = np.arange(len(table)).reshape(-1, *[1] * (a["x"].meta["val"].dim() - 2))
        offset = channels * table.shape[1] + offset
    if offset.any():
        index = w.op("Add", index, w.constant(offset, f"{node.name}_offset", np.int32), at=node)
    held = w.levels(table.flatten().numpy(), f"{node.name}_table")
    return w.op("Gather", held, index, at=node, name=node.name, axis=0)


ROWS: dict[str, Callable[[Writer, fx.Node], Name]] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "conv2d": _conv,
    "conv1d": _conv,
    "linear": _linear,
    "add": _add,
    "mul": _mul,
    "cat": _cat,
    "max_pool2d": _max_pool2d,
    "avg_pool2d": _avg_pool2d,
    "adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "lookup": _lookup,
}
"""Name of a row with an operator of its own -> what writes it."""
