"""The emitters of float convolutions and linear layers, and of the conversions between them and all else."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from qcompile.ops.real import EPILOGUE, FLOAT_CONV2D, FLOAT_LINEAR, numerics_of
from qcompile.targets.cpu.depthwise import is_depthwise
from qcompile.targets.cpu.float_conv import Real, conv
from qcompile.targets.cpu.float_depthwise import depthwise
from qcompile.targets.cpu.products import products
from qcompile.targets.cpu.real import BF16, bfloat16_bits
from qcompile.targets.filters import ConvShape
from qcompile.targets.layout import NO_HALO
from qcompile.targets.lowering import Lowering
from qcompile.targets.real_lower import define_real, use_real
from qcompile.targets.real_plan import padding_of

_PITCH = 4  # channels: an ungrouped convolution reads whole words, and no more than it needs


def _float_conv2d(low: Lowering, node: fx.Node) -> None:
    stride, _, dilation, groups = node.args[3:7]
    _emit(low, node, True, padding_of(node), tuple(stride), tuple(dilation), int(groups))  # type: ignore[arg-type]


def _float_linear(low: Lowering, node: fx.Node) -> None:
    _emit(low, node, False, NO_HALO, (1, 1), (1, 1), 1)


def _emit(
    low: Lowering,
    node: fx.Node,
    channels_last: bool,
    halo: tuple[int, int, int, int],
    stride: Any,
    dilation: Any,
    groups: int,
) -> None:
    a: Any = node.args
    way = products(numerics_of(node), low.target.isa)
    weight = low.tensor(a[1]).astype(np.float32)
    weight = weight if channels_last else weight[:, :, None, None]
    x = use_real(low, a[0], channels_last, halo, BF16 if way.depth == 2 else None, _PITCH if groups == 1 else None)
    other = node.kwargs.get("residual")
    values = [x] if other is None else [x, use_real(low, other, channels_last, NO_HALO, None)]  # type: ignore[arg-type]
    y = low.planned_real[node]
    layouts = [value.layout for value in values]
    assert layouts[0] is not None
    shape = ConvShape(
        layouts[0],
        y.layout,
        layouts[1] if other is not None else None,
        tuple(weight.shape[2:]),
        stride,
        (halo[0], halo[2]),
        dilation,
        groups,
    )
    lo, hi = a[EPILOGUE[node.target] : EPILOGUE[node.target] + 2]
    types = (x.dtype, values[-1].dtype, y.dtype)
    if is_depthwise(shape):
        factors = _rounded(weight) if way.depth == 2 else weight
        kernel = depthwise(shape, Real(factors, low.tensor(a[2]), lo, hi, types), low.target.isa, low.symbol_args)
    else:
        kernel = conv(shape, Real(weight, low.tensor(a[2]), lo, hi, types), low.target.isa, way, low.symbol_args)
    define_real(low, node, kernel, values)


def _rounded(weight: np.ndarray) -> np.ndarray:
    return (bfloat16_bits(weight).astype(np.uint32) << 16).view(np.float32)


FLOAT_EMITTERS = {FLOAT_CONV2D: _float_conv2d, FLOAT_LINEAR: _float_linear}
