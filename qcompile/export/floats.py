"""Float operators: what stayed float in the program, as far as ONNX has the same.

A table by name of the ATen operator. Each entry writes one node and returns the tensor with its value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import helper
from torch import fx

from qcompile.export.pooling import adaptive_average, average, maximum, pair
from qcompile.export.writer import Name, Writer, arguments
from qcompile.ir import is_constant, shape_of
from qcompile.ops.unary import clamp_bounds

Write = Callable[[Writer, fx.Node], Name]


def dtype_of(value: Any) -> Any:
    """The element type of a tensor in ONNX."""
    return helper.np_dtype_to_tensor_dtype(np.dtype(str(value.dtype).removeprefix("torch.")))


def _operand(w: Writer, value: Any, node: fx.Node) -> Name:
    """A tensor in the type of the result, or a number as one."""
    result = node.meta["val"].dtype
    if not isinstance(value, fx.Node):
        return w.constant(value, f"{node.name}_number", str(result).removeprefix("torch."))
    name = w.stored(value)
    same = value.meta["val"].dtype is result
    return name if same else w.op("Cast", name, at=node, to=dtype_of(node.meta["val"]))


def _unary(kind: str, **attributes: Any) -> Write:
    return lambda w, node: w.op(kind, w.stored(node.all_input_nodes[0]), at=node, **attributes)


def _binary(kind: str) -> Write:
    def write(w: Writer, node: fx.Node) -> Name:
        a = arguments(node)
        other = a["other"] if "other" in a else a["exponent"]
        left, right = _operand(w, a["self"], node), _operand(w, other, node)
        if a.get("alpha", 1) != 1:
            right = w.op("Mul", right, _operand(w, a["alpha"], node), at=node)
        return w.op(kind, left, right, at=node)

    return write


def _reversed_sub(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    if a["alpha"] != 1:
        raise w.error(node, "it scales its operand (alpha)")
    return w.op("Sub", _operand(w, a["other"], node), _operand(w, a["self"], node), at=node)


def _clamp(w: Writer, node: fx.Node) -> Name:
    bounds = clamp_bounds(node)
    if bounds is None:
        raise w.error(node, "its bounds are computed at run time")
    held = [
        "" if bound is None else w.constant(bound, f"{node.name}_{side}", np.float32)
        for side, bound in zip(("min", "max"), bounds, strict=True)
    ]
    return w.op("Clip", w.stored(arguments(node)["self"]), *held, at=node)


def _times(function: Write) -> Write:
    """x * f(x)"""

    def write(w: Writer, node: fx.Node) -> Name:
        return w.op("Mul", w.stored(node.all_input_nodes[0]), function(w, node), at=node)

    return write


def _mish_factor(w: Writer, node: fx.Node) -> Name:
    return w.op("Tanh", w.op("Softplus", w.stored(node.all_input_nodes[0]), at=node), at=node)


def _gelu(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    x = w.stored(a["self"])
    if a["approximate"] == "tanh":
        cube = w.op("Mul", w.op("Mul", x, x, at=node), w.scaled(x, 0.044715, node), at=node)
        inner = w.scaled(w.op("Add", x, cube, at=node), math.sqrt(2 / math.pi), node)
        inner = w.op("Tanh", inner, at=node)
    else:
        inner = w.op("Erf", w.scaled(x, math.sqrt(0.5), node), at=node)
    half = w.scaled(w.op("Add", inner, _operand(w, 1.0, node), at=node), 0.5, node)
    return w.op("Mul", x, half, at=node)


def _leaky_relu(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    return w.op("LeakyRelu", w.stored(a["self"]), at=node, alpha=a["negative_slope"])


def _prelu(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    rank = len(shape_of(node))
    slope = w.tensor(a["weight"]) if is_constant(a["weight"]) else None
    if slope is None:
        raise w.error(node, "its slope is computed at run time")
    held = w.constant(slope.reshape(-1, *[1] * (rank - 2)) if slope.numel() > 1 else slope, f"{node.name}_slope")
    return w.op("PRelu", w.stored(a["self"]), held, at=node)


def _softmax(kind: str) -> Write:
    return lambda w, node: w.op(
        kind, _operand(w, arguments(node)["self"], node), at=node, axis=arguments(node)["dim"] % len(shape_of(node))
    )


def _conv(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    rank = len(shape_of(node)) - 2
    inputs = [w.stored(a[key]) for key in ("input", "weight", "bias") if a[key] is not None]
    stride, padding, dilation = (list(a[key]) * (rank // len(a[key])) for key in ("stride", "padding", "dilation"))
    geometry = {"strides": stride, "pads": padding * 2, "dilations": dilation, "group": a["groups"]}
    return w.op("Conv", *inputs, at=node, kernel_shape=list(shape_of(a["weight"])[2:]), **geometry)


def _conv_transpose(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    inputs = [w.stored(a[key]) for key in ("input", "weight", "bias") if a[key] is not None]
    stride, padding, dilation, extra = (pair(a[key]) for key in ("stride", "padding", "dilation", "output_padding"))
    geometry: dict[str, Any] = {"strides": stride, "pads": padding * 2, "dilations": dilation, "output_padding": extra}
    kernel = list(shape_of(a["weight"])[2:])
    return w.op("ConvTranspose", *inputs, at=node, kernel_shape=kernel, group=a["groups"], **geometry)


def _linear(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    weight = w.op("Transpose", w.stored(a["weight"]), at=node, perm=[1, 0])
    y = w.op("MatMul", w.stored(a["input"]), weight, at=node)
    return y if a["bias"] is None else w.op("Add", y, w.stored(a["bias"]), at=node)


def _matmul(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    return w.op("MatMul", w.stored(a["self"]), w.stored(a["other"] if "other" in a else a["mat2"]), at=node)


def _addmm(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    inputs = (w.stored(a[key]) for key in ("mat1", "mat2", "self"))
    return w.op("Gemm", *inputs, at=node, alpha=float(a["alpha"]), beta=float(a["beta"]))


def _batch_norm(w: Writer, node: fx.Node) -> Name:
    """The first of its results: the others are empty outside training."""
    a = arguments(node)
    missing = next((key for key in ("weight", "bias", "running_mean", "running_var") if a[key] is None), None)
    if missing:
        raise w.error(node, f"it has no {missing}")
    inputs = (w.stored(a[key]) for key in ("input", "weight", "bias", "running_mean", "running_var"))
    return w.op("BatchNormalization", *inputs, at=node, epsilon=a["eps"])


def _layer_norm(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    shape = [int(size) for size in a["normalized_shape"]]
    scale = w.stored(a["weight"]) if a["weight"] else w.constant(np.ones(shape), f"{node.name}_one", np.float32)
    bias = [] if a["bias"] is None else [w.stored(a["bias"])]
    return w.op("LayerNormalization", w.stored(a["input"]), scale, *bias, at=node, axis=-len(shape), epsilon=a["eps"])


def _reduced(kind: str, dims_are_input: bool = False) -> Write:
    """Opset 17 has the axes of ReduceSum as an input, of the others as an attribute."""

    def write(w: Writer, node: fx.Node) -> Name:
        a = arguments(node)
        rank = len(shape_of(a["self"]))
        dims = [a["dim"]] if isinstance(a["dim"], int) else list(a["dim"] or range(rank))
        axes = sorted(d % rank for d in dims)
        x = _operand(w, a["self"], node)
        if dims_are_input:
            held = w.constant(axes, f"{node.name}_axes", np.int64)
            return w.op(kind, x, held, at=node, keepdims=int(a["keepdim"]))
        return w.op(kind, x, at=node, axes=axes, keepdims=int(a["keepdim"]))

    return write


def _cat(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    parts = [_operand(w, x, node) for x in a["tensors"]]
    return w.op("Concat", *parts, at=node, axis=a["dim"] % len(shape_of(node)))


def _max_pool2d(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    geometry = (a[key] for key in ("kernel_size", "stride", "padding", "dilation", "ceil_mode"))
    return maximum(w, node, w.stored(a["self"]), a["self"], *geometry)


def _avg_pool2d(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    return average(w, node, w.stored(a["self"]), a["self"], *(a[key] for key in names))


def _adaptive_avg_pool2d(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    return adaptive_average(w, node, w.stored(a["self"]), a["self"], a["output_size"])


def _embedding(w: Writer, node: fx.Node) -> Name:
    a = arguments(node)
    return w.op("Gather", w.stored(a["weight"]), w.stored(a["indices"]), at=node, axis=0)


def _cast(w: Writer, node: fx.Node) -> Name:
    return w.op("Cast", w.stored(node.all_input_nodes[0]), at=node, to=dtype_of(node.meta["val"]))


def _upsample_nearest(w: Writer, node: fx.Node) -> Name:
    x = arguments(node)["input"]
    before, after = shape_of(x)[2:], shape_of(node)[2:]
    if not all(isinstance(size, int) for size in (*before, *after)):
        raise w.error(node, "its image size is dynamic")
    scales = [1.0, 1.0, *(big / small for big, small in zip(after, before, strict=True))]
    held = w.constant(scales, f"{node.name}_scales", np.float32)
    how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return w.op("Resize", w.stored(x), "", held, at=node, **how)


FLOATS: dict[str, Write] = {
    **{name: _unary(name.capitalize()) for name in ("relu", "sigmoid", "tanh", "exp", "log", "sqrt", "abs", "neg")},
    **{name: _unary(name.capitalize()) for name in ("erf", "sin", "cos", "atan", "floor", "ceil", "round", "sign")},
    "reciprocal": _unary("Reciprocal"),
    "hardswish": _unary("HardSwish"),
    "hardsigmoid": _unary("HardSigmoid", alpha=1 / 6, beta=0.5),
    "silu": _times(_unary("Sigmoid")),
    "mish": _times(_mish_factor),
    "gelu": _gelu,
    "leaky_relu": _leaky_relu,
    "prelu": _prelu,
    **dict.fromkeys(("relu6", "hardtanh", "clamp", "clamp_min", "clamp_max"), _clamp),
    **{f"{name}.Tensor": _binary(name.capitalize()) for name in ("add", "sub", "mul", "div")},
    **{f"{name}.Scalar": _binary(name.capitalize()) for name in ("add", "sub", "mul", "div")},
    "rsub.Scalar": _reversed_sub,
    "pow.Tensor_Scalar": _binary("Pow"),
    "maximum": _binary("Max"),
    "minimum": _binary("Min"),
    "softmax.int": _softmax("Softmax"),
    "_softmax": _softmax("Softmax"),
    "log_softmax.int": _softmax("LogSoftmax"),
    "conv2d": _conv,
    "conv1d": _conv,
    "conv_transpose2d.input": _conv_transpose,
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm"), _matmul),
    "addmm": _addmm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "layer_norm": _layer_norm,
    "mean.dim": _reduced("ReduceMean"),
    "sum.dim_IntList": _reduced("ReduceSum", dims_are_input=True),
    "amax": _reduced("ReduceMax"),
    "cat": _cat,
    "max_pool2d": _max_pool2d,
    "avg_pool2d": _avg_pool2d,
    "adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "embedding": _embedding,
    "_to_copy": _cast,
    "to.dtype": _cast,
    "upsample_nearest2d.vec": _upsample_nearest,
}  # fmt: skip
"""Name of an ATen operator, without "aten." and ".default" -> what writes it."""


def name_of(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").removesuffix(".default")
