"""Pooling in float, for int8 and float nodes alike, with PyTorch's meaning of padding, rounding up and counting."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from qcompile.export.writer import Name, Writer
from qcompile.ir import shape_of
from qcompile.ops.pool import adaptive_windows

Pair = Any  # two numbers, or one for both


def pair(value: Pair) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value) * (2 // len(value))


def _ends(
    w: Writer, node: fx.Node, x: fx.Node, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> list[int]:
    """How much to pad at the far sides so that rounding down gives as many windows as PyTorch has, rounding up."""
    ends = []
    for axis in (0, 1):
        size, count = shape_of(x)[2 + axis], shape_of(node)[2 + axis]
        if not (isinstance(size, int) and isinstance(count, int)):
            raise w.error(node, "its image size is dynamic and it rounds up (ceil_mode)")
        reach = (count - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1
        ends.append(max(padding[axis], reach - size - padding[axis]))
    return ends


def maximum(
    w: Writer,
    node: fx.Node,
    real: Name,
    x: fx.Node,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
) -> Name:
    kernel, stride, padding, dilation = (pair(v) for v in (kernel, stride or kernel, padding, dilation))
    ends = _ends(w, node, x, kernel, stride, padding, dilation) if ceil_mode else padding
    pads = [*padding, *ends]
    if any(pad >= size for pad, size in zip(pads, kernel * 2, strict=True)):
        # ONNX Runtime does not take them, where a dilation makes room for more padding than the kernel is long.
        real, pads = _padded(w, node, real, padding, ends, float(np.finfo(np.float32).min)), [0, 0, 0, 0]
    return w.op("MaxPool", real, at=node, kernel_shape=kernel, strides=stride, dilations=dilation, pads=pads)


def average(
    w: Writer,
    node: fx.Node,
    real: Name,
    x: fx.Node,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Name:
    kernel, stride, padding = (pair(v) for v in (kernel, stride or kernel, padding))
    ends = _ends(w, node, x, kernel, stride, padding, [1, 1]) if ceil_mode else padding
    begins = padding
    if divisor is not None or count_include_pad:
        # What counts becomes part of the image: all of it with a divisor, else what lies within the padding.
        inside = ends if divisor is not None else padding
        real = _padded(w, node, real, begins, inside)
        begins, ends = [0, 0], [end - done for end, done in zip(ends, inside, strict=True)]
    y = w.op("AveragePool", real, at=node, kernel_shape=kernel, strides=stride, pads=[*begins, *ends])
    return y if divisor is None else w.scaled(y, kernel[0] * kernel[1] / divisor, node)


def _padded(w: Writer, node: fx.Node, real: Name, begins: list[int], ends: list[int], value: float = 0.0) -> Name:
    if not any((*begins, *ends)):
        return real
    amounts = w.constant([0, 0, *begins, 0, 0, *ends], f"{node.name}_pads", np.int64)
    return w.op("Pad", real, amounts, w.constant(value, f"{node.name}_pad", np.float32), at=node)


def adaptive_average(w: Writer, node: fx.Node, real: Name, x: fx.Node, output_size: Pair) -> Name:
    output = pair(output_size)
    if output == [1, 1]:
        return w.op("GlobalAveragePool", real, at=node)
    sizes = shape_of(x)[2:]
    if not all(isinstance(size, int) for size in sizes):
        raise w.error(node, "its image size is dynamic")
    if all(size % count == 0 for size, count in zip(sizes, output, strict=True)):
        window = [size // count for size, count in zip(sizes, output, strict=True)]
        return w.op("AveragePool", real, at=node, kernel_shape=window, strides=window)
    # Windows of several sizes: a matrix that averages rows, and one that averages columns.
    rows, columns = (_averaging(size, count) for size, count in zip(sizes, output, strict=True))
    across = w.op("MatMul", real, w.constant(columns.T, f"{node.name}_columns", np.float32), at=node)
    return w.op("MatMul", w.constant(rows, f"{node.name}_rows", np.float32), across, at=node)


def _averaging(size: int, count: int) -> np.ndarray:
    matrix = np.zeros((count, size))
    for i, (begin, end) in enumerate(adaptive_windows(size, count)):
        matrix[i, begin:end] = 1 / (end - begin)
    return matrix
