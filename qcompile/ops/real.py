"""Convolutions and matrix products that stay real numbers: in float32, or of factors rounded to bfloat16.

    acc = bias[c] + sum_k r(x[n, k]) * r(weight[c, k])        float32, in any order
    out = s(clamp(acc + residual, lo, hi))

r rounds to bfloat16 (to nearest, ties to even) where the numerics are "bfloat16", and s does where the result is
`rounded`, so that it can be stored in 16 bits; else they do nothing. Sums of floats depend on their order, so these
are no rows of the op table: targets are held to them within a tolerance, not bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qcompile.ops.conv import conv2d_fake
from qcompile.ops.row import LIBRARY

FLOAT32, BFLOAT16 = "float32", "bfloat16"
NUMERICS = (FLOAT32, BFLOAT16)

_EPILOGUE = "float lo, float hi, str numerics, bool rounded, Tensor? residual=None) -> Tensor"


def rounded(x: Tensor, numerics: str = BFLOAT16) -> Tensor:
    """float32 -> the nearest values that `numerics` has, as float32."""
    return x.to(torch.bfloat16).to(torch.float32) if numerics == BFLOAT16 else x


def _finish(acc: Tensor, lo: float, hi: float, round_it: bool, residual: Tensor | None) -> Tensor:
    result = (acc if residual is None else acc + residual).clamp(lo, hi)
    return rounded(result) if round_it else result


def float_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    lo: float,
    hi: float,
    numerics: str,
    round_it: bool,
    residual: Tensor | None = None,
) -> Tensor:
    """Reference. x (N, C, H, W), weight (O, C/groups, KH, KW), bias (O,), residual as the result: float32.

    `padding` is (top, bottom, left, right).
    """
    top, bottom, left, right = padding
    x, weight = (rounded(factor, numerics) for factor in (x, weight))
    x = nn.functional.pad(x, (left, right, top, bottom))
    acc = nn.functional.conv2d(x, weight, bias, stride, 0, dilation, groups)
    return _finish(acc, lo, hi, round_it, residual)


def _conv2d_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    lo: float,
    hi: float,
    numerics: str,
    round_it: bool,
    residual: Tensor | None = None,
) -> Tensor:
    return conv2d_fake(x, weight, bias, bias, 0, 0, 0, 0, stride, padding, dilation, groups)


def float_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    lo: float,
    hi: float,
    numerics: str,
    round_it: bool,
    residual: Tensor | None = None,
) -> Tensor:
    """Reference. x (..., K), weight (N, K), bias (N,), residual as the result: float32 -> (..., N)."""
    x, weight = (rounded(factor, numerics) for factor in (x, weight))
    return _finish(nn.functional.linear(x, weight, bias), lo, hi, round_it, residual)


def _linear_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    lo: float,
    hi: float,
    numerics: str,
    round_it: bool,
    residual: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _register(name: str, schema: str, reference: Any, fake: Any) -> Any:
    LIBRARY.define(f"{name}({schema}, {_EPILOGUE}")
    LIBRARY.impl(name, reference, "CPU")
    torch.library.register_fake(f"qcompile::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.qcompile, name).default


FLOAT_CONV2D = _register(
    "float_conv2d",
    "Tensor x, Tensor weight, Tensor bias, int[] stride, int[] padding, int[] dilation, int groups",
    float_conv2d,
    _conv2d_fake,
)
FLOAT_LINEAR = _register("float_linear", "Tensor x, Tensor weight, Tensor bias", float_linear, _linear_fake)
OPS = (FLOAT_CONV2D, FLOAT_LINEAR)
EPILOGUE = {FLOAT_CONV2D: 7, FLOAT_LINEAR: 3}  # where (lo, hi, numerics, rounded) begin among the arguments


def numerics_of(node: Any) -> str:
    """Of a node that calls one of `OPS`."""
    return str(node.args[EPILOGUE[node.target] + 2])


def is_rounded(node: Any) -> bool:
    """Whether the values of a node that calls one of `OPS` are those of bfloat16."""
    return bool(node.args[EPILOGUE[node.target] + 3])
