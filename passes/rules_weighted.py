"""Rules: convolutions and matrix products with constant weights, in the forms `conv2d`, `conv1d`, `linear`.

pad(x, p, "constant", v)                  ->  constant_pad_nd(x, p, v)
conv(x, w, padding="same" or "valid")     ->  conv with numbers (and a constant_pad_nd where asymmetric)
convolution(x, w, ...)                    ->  conv2d, conv1d
conv(constant_pad_nd(x, p, 0), w)         ->  conv(x, w, padding + p)       p symmetric and spatial
matmul(x, W), mm(x, W)                    ->  linear(x, W^T)                W constant, 2-d
addmm(b, x, W), matmul(x, W) + b          ->  linear(x, W^T, b)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qcompile.ir import Program, add_constant, constant, is_constant, origin, shape_of
from qcompile.rewrite import Rule, call
from qcompile.sites import only_user

aten = torch.ops.aten
_CONVS = (aten.conv2d.default, aten.conv1d.default)


def argument(node: fx.Node, index: int, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else default


def per_dim(value: Any, rank: int) -> list[int]:
    """A number, or a list of one, stands for every dimension."""
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


# --- convolution ----------------------------------------------------------------------------------


def _always(program: Program, node: fx.Node) -> str | None:
    return None


def _numeric_padding(program: Program, node: fx.Node) -> fx.Node:
    x, weight, bias = node.args[0], node.args[1], argument(node, 2, None)
    rank = 2 if node.target is aten.conv2d.padding else 1
    stride, dilation = (per_dim(argument(node, i, 1), rank) for i in (3, 5))
    before, after = [0] * rank, [0] * rank
    if argument(node, 4, "valid") == "same":
        kernel = shape_of(weight)[2:]  # type: ignore[arg-type]
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        before = [t // 2 for t in total]
        after = [t - b for t, b in zip(total, before, strict=True)]
    if before != after:  # torch puts the odd one behind
        amounts = [a for pair in zip(reversed(before), reversed(after), strict=True) for a in pair]
        x, before = call(program, node, aten.constant_pad_nd.default, x, amounts, 0.0), [0] * rank
    conv = aten.conv2d.default if rank == 2 else aten.conv1d.default
    return call(program, node, conv, x, weight, bias, stride, before, dilation, argument(node, 6, 1))


def _check_convolution(program: Program, node: fx.Node) -> str | None:
    rank = len(shape_of(node)) - 2
    if node.args[6]:
        return "it is transposed"
    return None if rank in (1, 2) else f"it is {rank}-dimensional"


def _plain_convolution(program: Program, node: fx.Node) -> fx.Node:
    x, weight, bias, stride, padding, dilation, _, _, groups = node.args
    rank = len(shape_of(node)) - 2
    conv = aten.conv2d.default if rank == 2 else aten.conv1d.default
    geometry = (per_dim(v, rank) for v in (stride, padding, dilation))
    return call(program, node, conv, x, weight, bias, *geometry, groups)


def _check_constant_pad(program: Program, node: fx.Node) -> str | None:
    mode = argument(node, 2, "constant")
    return None if mode == "constant" else f"its padding mode is {mode!r}"


def _constant_pad(program: Program, node: fx.Node) -> fx.Node:
    value = argument(node, 3, None)
    amounts = node.args[1]
    return call(program, node, aten.constant_pad_nd.default, node.args[0], amounts, 0.0 if value is None else value)


def _check_pad(program: Program, node: fx.Node) -> str | None:
    pad: Any = node.args[0]
    if pad.target is not aten.constant_pad_nd.default:
        return ""
    amounts, rank = list(pad.args[1]), len(shape_of(node)) - 2
    if argument(pad, 2, 0) != 0:
        return "the padding is not zero"
    if len(amounts) > 2 * rank or not all(isinstance(a, int) and a >= 0 for a in amounts):
        return "the padding reaches beyond the image's dimensions, or crops"
    return None if amounts[::2] == amounts[1::2] else "the padding is asymmetric"


def _merge_pad(program: Program, node: fx.Node) -> fx.Node:
    pad: Any = node.args[0]
    rank = len(shape_of(node)) - 2
    extra = list(reversed(pad.args[1][::2]))
    extra = [0] * (rank - len(extra)) + extra
    padding = [p + e for p, e in zip(per_dim(argument(node, 4, 0), rank), extra, strict=True)]
    stride, dilation = (per_dim(argument(node, i, 1), rank) for i in (3, 5))
    rest = (stride, padding, dilation, argument(node, 6, 1))
    return call(program, node, node.target, pad.args[0], node.args[1], argument(node, 2, None), *rest)


# --- matrix products ------------------------------------------------------------------------------


def _check_matmul(program: Program, node: fx.Node) -> str | None:
    x, weight = node.args[:2]
    if not isinstance(weight, fx.Node) or not is_constant(weight):
        return ""
    if len(shape_of(weight)) != 2:
        return "its constant operand is not a matrix"
    return "both operands are constant" if is_constant(x) else None  # type: ignore[arg-type]


def _transposed(program: Program, weight: fx.Node) -> fx.Node:
    value = constant(program.graph_module, weight).t()
    return add_constant(program.graph_module, f"{weight.target}_t", value, origin(weight))


def _matmul_to_linear(program: Program, node: fx.Node) -> fx.Node:
    weight = _transposed(program, node.args[1])  # type: ignore[arg-type]
    return call(program, node, aten.linear.default, node.args[0], weight, None)


def _check_addmm(program: Program, node: fx.Node) -> str | None:
    bias, x, weight = node.args[:3]
    if not is_constant(bias) or not is_constant(weight) or is_constant(x):  # type: ignore[arg-type]
        return "its bias or its second matrix is computed at run time"
    if len(shape_of(bias)) != 1 or shape_of(bias)[0] != shape_of(node)[1]:  # type: ignore[arg-type]
        return "its bias is not one value per column"
    return None if all(v == 1 for v in node.kwargs.values()) else "it scales its operands"


def _addmm_to_linear(program: Program, node: fx.Node) -> fx.Node:
    bias, x, weight = node.args[:3]
    return call(program, node, aten.linear.default, x, _transposed(program, weight), bias)  # type: ignore[arg-type]


def _bias_and_linear(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(constant vector, linear) that `node` adds, in either order."""
    for bias, linear in (node.args[:2], tuple(reversed(node.args[:2]))):
        if not (isinstance(bias, fx.Node) and isinstance(linear, fx.Node) and is_constant(bias)):
            continue
        if linear.target is aten.linear.default:
            return bias, linear
    return None


def _check_add_bias(program: Program, node: fx.Node) -> str | None:
    found = _bias_and_linear(node)
    if found is None:
        return ""
    bias, linear = found
    if argument(linear, 2, None) is not None or only_user(linear) is not node or node.kwargs.get("alpha", 1) != 1:
        return "the linear has a bias or other users, or the sum is scaled"
    same = shape_of(bias) == shape_of(linear.args[1])[:1]  # type: ignore[arg-type]
    return None if same else "the constant is not one value per output feature"


def _add_bias(program: Program, node: fx.Node) -> fx.Node:
    found = _bias_and_linear(node)
    assert found is not None
    bias, linear = found
    return call(program, linear, aten.linear.default, *linear.args[:2], bias)


RULES = (
    Rule("constant_pad", (aten.pad.default,), _check_constant_pad, _constant_pad),
    Rule("numeric_padding", (aten.conv2d.padding, aten.conv1d.padding), _always, _numeric_padding),
    Rule("plain_convolution", (aten.convolution.default,), _check_convolution, _plain_convolution),
    Rule("merge_padding", _CONVS, _check_pad, _merge_pad),
    Rule("matmul_to_linear", (aten.matmul.default, aten.mm.default), _check_matmul, _matmul_to_linear),
    Rule("addmm_to_linear", (aten.addmm.default,), _check_addmm, _addmm_to_linear),
    Rule("add_to_bias", (aten.add.Tensor,), _check_add_bias, _add_bias),
)
