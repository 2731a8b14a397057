"""Every function of one int8 value as a table of 256 int8 values, built in float64 at compile time.

    table[i] = rne(clamp(f(s_x * (i - 128 - x_zp)) / s_y, lo - zp, hi - zp)) + zp         out = table[x + 128]

f is the ATen operator itself, run in float64 on the 256 real values with its constant arguments in
place, so one row covers the activations, clamps, and arithmetic with constants. Where a constant
varies along the channels (prelu, a scale per channel), each channel has its own table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.arith import QMAX, QMIN
from qcompile.ir import QParams, constant, is_constant, shape_of
from qcompile.ops.row import Act, Call, Row, Sample, Site, activations, random_int8
from qcompile.ops.unary_examples import examples

aten = torch.ops.aten


def lookup(x: Tensor, table: Tensor) -> Tensor:
    """Reference. x int8; `table` int8 (256,), or (C, 256) with one row per index of dimension 1 of x."""
    index = x.to(torch.int64) - QMIN
    if table.dim() == 1:
        return table[index]
    channel = torch.arange(table.shape[0]).reshape(-1, *[1] * (x.dim() - 2))
    return table[channel, index]


def lookup_fake(x: Tensor, table: Tensor) -> Tensor:
    return torch.empty_like(x)


def _value(node: fx.Node) -> Tensor:
    """The tensor of a constant node."""
    owner = node.graph.owning_module
    assert owner is not None
    return constant(owner, node)


def _in_float64(argument: Any) -> Any:
    """A constant argument, read from the graph where it is a tensor."""
    return _value(argument).to(torch.float64) if isinstance(argument, fx.Node) else argument


def values(node: fx.Node, real: Tensor) -> Tensor:
    """What the ATen call `node` makes of the values `real` (n,) of its operand, in float64: (n,), or (n, C)."""
    (operand,) = activations(node)
    rank = max(1, len(shape_of(operand)))
    channels = _channels(node)
    # One "image" per value, so that constants broadcast (and prelu finds its channels) as they do in the model.
    batch = real.to(torch.float64).reshape(-1, *[1] * (rank - 1))
    if channels > 1:
        batch = batch.expand(-1, channels, *[1] * (rank - 2)).contiguous()
    args = [batch if arg is operand else _in_float64(arg) for arg in node.args]
    kwargs = {key: _in_float64(value) for key, value in node.kwargs.items()}
    target: Any = node.target
    result = target(*args, **kwargs).reshape(len(real), -1)
    return result if channels > 1 else result[:, 0]


def table(node: fx.Node, x: QParams, y: QParams, lo: int = QMIN, hi: int = QMAX) -> Tensor:
    """The table of the ATen call `node`, for an input at `x` and an output at `y`: (256,) or (C, 256)."""
    q = to_int8(values(node, _every(x)), y, lo, hi)
    return q if q.dim() == 1 else q.T.contiguous()


def requantize_table(x: QParams, y: QParams) -> Tensor:
    """The table (256,) that brings int8 values at `x` to `y`."""
    return to_int8(_every(x), y, y.qmin, y.qmax)


def _every(x: QParams) -> Tensor:
    """The real values of -128 to 127."""
    return (torch.arange(QMIN, QMAX + 1, dtype=torch.float64) - x.zero_point) * x.scale


def to_int8(real: Tensor, y: QParams, lo: int, hi: int) -> Tensor:
    """float64 -> int8 at `y`. A NaN (the logarithm of a negative number) becomes the zero point."""
    steps = real / y.scale
    steps = torch.where(torch.isnan(steps), 0.0, steps).clamp(lo - y.zero_point, hi - y.zero_point)
    return (torch.round(steps).to(torch.int32) + y.zero_point).to(torch.int8)


def _constants(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if is_constant(n)]


def _channels(node: fx.Node) -> int:
    """How many tables `node` needs: the length of its constants along dimension 1 of its operand.

    The constant is (C,) for prelu; elsewhere it broadcasts: (C, 1, 1), (1, C, 1, 1), ...
    """
    return max((_value(constant_node).numel() for constant_node in _constants(node)), default=1)


def _decline(node: fx.Node) -> str | None:
    operands = activations(node)
    if len(operands) != 1:
        return "its operands are computed at run time"
    if any(isinstance(arg, fx.Node) and arg not in (*operands, *_constants(node)) for arg in node.args):
        return "an argument is computed at run time"
    shape = shape_of(operands[0])
    for constant_node in _constants(node):
        size = tuple(_value(constant_node).shape)
        if len(size) > len(shape):
            return "a constant broadcasts its operand"
        if math.prod(size) == 1:
            continue
        aligned = size if node.target is aten.prelu.default else (1,) * (len(shape) - len(size)) + size
        at = 0 if node.target is aten.prelu.default else 1
        per_channel = len(shape) >= 2 and all(n == 1 for i, n in enumerate(aligned) if i != at)
        if not per_channel or aligned[at] != shape[1]:
            return "a constant varies beyond the channels"
    return None


def _fuse(site: Site) -> Call:
    (x,) = site.inputs
    values = table(site.node, x.qparams, site.output, site.lo, site.hi)
    return LOOKUP.op, (x.node, site.constant(f"{site.node.name}_table", values)), {}


# Operators that only clamp -> their bounds when the arguments are left out.
CLAMPS: dict[Any, tuple[float | None, float | None]] = {
    aten.relu.default: (0.0, None),
    aten.relu6.default: (0.0, 6.0),
    aten.hardtanh.default: (-1.0, 1.0),
    aten.clamp.default: (None, None),
    aten.clamp_min.default: (None, None),
    aten.clamp_max.default: (None, None),
}


def clamp_bounds(node: fx.Node) -> tuple[float | None, float | None] | None:
    """The real bounds (None: unbounded) that a relu, relu6, hardtanh or clamp imposes; None for
    any other operator, and for bounds computed at run time."""
    if node.op != "call_function" or node.target not in CLAMPS:
        return None
    given: list[Any] = list(node.args[1:])
    if node.target is aten.clamp_max.default:
        given = [None, *given]
    given = given or [node.kwargs.get("min"), node.kwargs.get("max")]
    low, high = (given[i] if i < len(given) and given[i] is not None else d for i, d in enumerate(CLAMPS[node.target]))
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return None
    return low, high


_SHAPES: tuple[tuple[int, ...], ...] = ((1,), (37,), (2, 100), (3, 17, 5), (1, 3, 11, 13), (2, 64, 7, 7), (3, 33, 1, 1))
_CHANNEL_SHAPES: tuple[tuple[int, ...], ...] = ((2, 17), (3, 5, 13), (1, 3, 11, 13), (2, 64, 5, 5), (2, 33, 1, 1))


def _samples(g: torch.Generator) -> Iterator[Sample]:
    for shape in _SHAPES:
        yield Sample((Act(random_int8(g, *shape)), random_int8(g, 256)), label="x".join(map(str, shape)))
    every = torch.arange(QMIN, QMAX + 1, dtype=torch.int32).to(torch.int8)
    yield Sample((Act(every), random_int8(g, 256)), label="every value")
    for shape in _CHANNEL_SHAPES:
        label = "x".join(map(str, shape)) + " per channel"
        yield Sample((Act(random_int8(g, *shape)), random_int8(g, shape[1], 256)), label=label)


_ACTIVATIONS = (
    aten.sigmoid, aten.tanh, aten.silu, aten.gelu, aten.hardswish, aten.hardsigmoid, aten.elu, aten.selu, aten.celu,
    aten.leaky_relu, aten.prelu, aten.mish, aten.softplus, aten.log_sigmoid, aten.hardshrink, aten.softshrink,
    aten.threshold, aten.relu, aten.relu6, aten.hardtanh, aten.clamp, aten.clamp_min, aten.clamp_max,
)  # fmt: skip
_FUNCTIONS = (
    aten.exp, aten.exp2, aten.expm1, aten.log, aten.log1p, aten.log2, aten.sqrt, aten.rsqrt, aten.reciprocal, aten.abs,
    aten.neg, aten.square, aten.sin, aten.cos, aten.atan, aten.erf, aten.floor, aten.ceil, aten.round, aten.trunc,
    aten.sign, aten.maximum, aten.minimum,
)  # fmt: skip
_WITH_CONSTANTS = (
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.add.Scalar, aten.sub.Scalar,
    aten.mul.Scalar, aten.div.Scalar, aten.rsub.Scalar, aten.pow.Tensor_Scalar,
)  # fmt: skip

LOOKUP = Row(
    name="lookup",
    schema="(Tensor x, Tensor table) -> Tensor",
    aten=(*(packet.default for packet in (*_ACTIVATIONS, *_FUNCTIONS)), *_WITH_CONSTANTS),
    reference=lookup,
    fake=lookup_fake,
    fuse=_fuse,
    samples=_samples,
    examples=examples,
    decline=_decline,
)

ROWS = (LOOKUP,)
