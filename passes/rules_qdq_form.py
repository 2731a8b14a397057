"""Rules: what quantizers write in different ways, in the one form that this project's own `quantize` writes.

quantize_per_tensor.tensor(x, constants)        ->  quantize_per_tensor(x, numbers); dequantize the same
uint8 at zero point z                           ->  int8 at zero point z - 128
quantize(constant)                              ->  an int8 constant
dequantize(int8 constant), a weight             ->  dequantize_per_channel(int8 in [-127, 127], scales, zeros)
dequantize(int8 constant), anything else        ->  a float constant
matmul(x, dequantize(W))                        ->  linear(x, dequantize(W^T))
batch_norm(conv(x, dequantize(q, s), b))        ->  conv(x, dequantize(sign(g) q, |g| s), b')
conv(x, dequantize(q, s), b), b beyond int32    ->  conv(x, dequantize(q', s'), b), s' as wide as b needs

All but two keep the values exactly. A weight of -128, which the integer contract does not have, moves by a part
of a step: of two ways, -127 in its place or a scale that is 128/127 as wide, each channel gets the one with the
smaller error. A channel whose weights are next to nothing beside its bias gets fewer levels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qcompile import ops
from qcompile.arith import QMAX, QMIN, WEIGHT_MAX
from qcompile.ir import Program, add_constant, constant, is_constant, shape_of
from qcompile.ops.conv import argument
from qcompile.passes.fold_batchnorm import FOLD, affine, norm_of, objection_to_norm
from qcompile.qdq import DEQUANTIZE, QUANTIZE, QUANTIZE_CHANNELS, WEIGHT, is_dequantize, params, qd
from qcompile.rewrite import Rule, call
from qcompile.sites import STAYS_FLOAT
from qcompile.weights import by_channel, nearest, smallest_scale

aten = torch.ops.aten
OVERLOADS = {
    qd.quantize_per_tensor.tensor: QUANTIZE,
    qd.quantize_per_tensor.tensor2: QUANTIZE,
    qd.dequantize_per_tensor.tensor: DEQUANTIZE,
    qd.dequantize_per_tensor.tensor2: DEQUANTIZE,
}
_MATMULS = (aten.matmul.default, aten.mm.default)


def _always(program: Program, node: fx.Node) -> str | None:
    return None


# --- activations ----------------------------------------------------------------------------------


def _numbers(program: Program, node: fx.Node) -> fx.Node:
    numbers = [constant(program.graph_module, a).item() if isinstance(a, fx.Node) else a for a in node.args[1:]]
    return call(program, node, OVERLOADS[node.target], node.args[0], *numbers)  # type: ignore[index]


def _check_unsigned(program: Program, node: fx.Node) -> str | None:
    return None if node.args[5] is torch.uint8 and not is_constant(node.args[0]) else ""  # type: ignore[arg-type]


def _signed(program: Program, node: fx.Node) -> fx.Node:
    x, scale, *bounds, _ = node.args
    return call(program, node, node.target, x, scale, *(bound + QMIN for bound in bounds), torch.int8)  # type: ignore[operator]


# --- constants ------------------------------------------------------------------------------------


def _check_constant(program: Program, node: fx.Node) -> str | None:
    return None if is_constant(node.args[0]) else ""  # type: ignore[arg-type]


def _compute(program: Program, node: fx.Node) -> fx.Node:
    args: Any = fx.node.map_arg(node.args, lambda n: constant(program.graph_module, n))
    target: Any = node.target
    x: Any = node.args[0]
    kind = "float" if target in (DEQUANTIZE, WEIGHT) else "int8"
    return add_constant(program.graph_module, f"{x.target}_{kind}", target(*args))


def _integers(program: Program, node: fx.Node) -> tuple[Tensor, Tensor, int | None]:
    """(q less its zero point as int64, scale, the axis of the scale or None) of a dequantized constant."""
    q = constant(program.graph_module, node.args[0]).to(torch.int64)  # type: ignore[arg-type]
    if node.target is DEQUANTIZE:
        return q - node.args[2], torch.tensor([node.args[1]], dtype=torch.float32), None  # type: ignore[operator]
    scale = constant(program.graph_module, node.args[1])  # type: ignore[arg-type]
    axis: Any = node.args[3] % q.dim()  # type: ignore[operator]
    if isinstance(node.args[2], fx.Node):
        zero = constant(program.graph_module, node.args[2]).to(torch.int64)
        q = q - zero.reshape([-1 if i == axis else 1 for i in range(q.dim())])
    return q, scale.to(torch.float32), axis


def _reads_as_weight(node: fx.Node, user: fx.Node) -> bool:
    row = ops.find(user)
    return row is not None and row.weight_arg is not None and user.args[row.weight_arg] is node


def _objection(program: Program, node: fx.Node, out_axis: int) -> str | None:
    """Why a dequantized constant cannot be a weight whose output channels are at `out_axis`; None when it can."""
    q, scale, axis = _integers(program, node)
    if int(q.min()) < QMIN or int(q.max()) > QMAX:
        return "its weight has a zero point, and leaves int8 without it"
    if not bool(torch.isfinite(scale).all() and (scale > 0).all()):
        return "a scale of its weight is not positive"
    return None if axis in (None, out_axis) else f"its weight has a scale per index of dimension {axis}"


def _is_canonical(program: Program, node: Any) -> bool:
    if node.target is not WEIGHT or node.args[3:] != (0, -WEIGHT_MAX, WEIGHT_MAX, torch.int8):
        return False
    zeros = node.args[2]
    return isinstance(zeros, fx.Node) and not bool(constant(program.graph_module, zeros).any())


def _check_weight(program: Program, node: fx.Node) -> str | None:
    if _check_constant(program, node) is not None or _is_canonical(program, node):
        return ""
    if not all(_reads_as_weight(node, user) for user in node.users):
        return ""
    return _objection(program, node, 0)


def _weight(program: Program, node: fx.Node) -> fx.Node:
    q, scale, _ = _integers(program, node)
    return _dequantized(program, node, q, scale)


def _dequantized(program: Program, node: fx.Node, q: Tensor, scale: Tensor) -> fx.Node:
    """A weight in the form of this project, in the place of the dequantized constant `node`."""
    x: Any = node.args[0]
    owner, base = program.graph_module, str(x.target)
    q, scale = without_lowest(q, scale.expand(len(q)))
    values = add_constant(owner, f"{base}_q", q)
    scales = add_constant(owner, f"{base}_scale", scale)
    zeros = add_constant(owner, f"{base}_zero_point", torch.zeros(len(q), dtype=torch.int64))
    return call(program, node, WEIGHT, values, scales, zeros, 0, -WEIGHT_MAX, WEIGHT_MAX, torch.int8)


def without_lowest(q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(q, scale) with -128 in no channel; the other channels stay as they are."""
    rows, before = q.flatten(1).to(torch.float64), scale.to(torch.float64)
    wide = (before * (-QMIN / WEIGHT_MAX)).to(torch.float32)
    tried = []
    for candidate in (scale, wide):
        rounded = nearest(rows * before[:, None], candidate.to(torch.float64), WEIGHT_MAX)
        error = (rounded * candidate.to(torch.float64)[:, None] / before[:, None]) - rows
        tried.append((error.sum(1).square() + error.square().sum(1), rounded))
    better = (rows == QMIN).any(1) & (tried[1][0] < tried[0][0])
    chosen = torch.where(better[:, None], tried[1][1], tried[0][1])
    return chosen.to(torch.int8).reshape(q.shape), torch.where(better, wide, scale)


def _check_dequantized(program: Program, node: fx.Node) -> str | None:
    """Fold what is no weight: biases, and what float operators read."""
    if _check_constant(program, node) is not None or _is_canonical(program, node):
        return ""
    # A matrix product is turned into a linear first.
    return "" if any(_check_matmul(program, user) is None for user in node.users) else None


def _fold(program: Program, node: fx.Node) -> fx.Node:
    objection = _objection(program, node, 0)
    for user in node.users:
        if objection and _reads_as_weight(node, user):
            user.meta[STAYS_FLOAT] = objection
    return _compute(program, node)


# --- weights behind other operators ---------------------------------------------------------------


def _check_matmul(program: Program, node: fx.Node) -> str | None:
    weight = node.args[1] if node.target in _MATMULS else None
    if not isinstance(weight, fx.Node) or weight.target not in (DEQUANTIZE, WEIGHT):
        return ""
    if _check_constant(program, weight) is not None or len(shape_of(weight)) != 2:
        return ""
    return _objection(program, weight, 1)


def _linear(program: Program, node: fx.Node) -> fx.Node:
    weight: Any = node.args[1]
    q, scale, _ = _integers(program, weight)
    return call(program, node, aten.linear.default, node.args[0], _dequantized(program, weight, q.t(), scale), None)


def _check_norm(program: Program, node: fx.Node) -> str | None:
    objection = objection_to_norm(node)
    if objection is not None:
        return objection
    norm: Any = norm_of(node)
    conv: Any = norm.args[0]
    row = ops.find(conv)
    if row is None or row.weight_arg is None or not _is_canonical(program, conv.args[1]):
        return ""
    if set(conv.users) != {norm} or set(conv.args[1].users) != {conv}:
        return f"{conv.name} or its weight has other users, which need it as it is"
    bias: Any = argument(conv, 2, None)
    if bias is not None and not is_constant(bias):
        return f"the bias of {conv.name} is computed at run time"
    flat = conv.target is aten.linear.default and len(shape_of(conv)) != 2
    return "it normalizes dimension 1, which is not the features of the linear" if flat else None


def _fold_norm(program: Program, node: fx.Node) -> fx.Node:
    norm: Any = norm_of(node)
    conv = norm.args[0]
    g, shift = affine(program, norm)
    q, scale, _ = _integers(program, conv.args[1])
    # Where g is 0 the channel is constant.
    q = q * by_channel(torch.sign(g).to(torch.int64), q)
    scale = torch.where(g == 0, scale, (scale.to(torch.float64) * g.abs()).to(torch.float32))
    bias = argument(conv, 2, None)
    if bias is not None:
        shift = shift + constant(program.graph_module, bias).to(torch.float64) * g
    weight = _dequantized(program, conv.args[1], q, scale)
    held = add_constant(program.graph_module, f"{conv.name}_folded_bias", shift.to(torch.float32))
    return call(program, conv, conv.target, conv.args[0], weight, held, *conv.args[3:])


# --- biases ---------------------------------------------------------------------------------------


def _least_scale(program: Program, node: fx.Node) -> Tensor | None:
    """The smallest scales of the weights of `node` with which its bias fits int32, where it is quantized."""
    row = ops.find(node)
    bias = argument(node, row.bias_arg, None) if row is not None and row.bias_arg is not None else None
    x, weight = node.args[:2]
    if not isinstance(bias, fx.Node) or not is_constant(bias):
        return None
    if not is_dequantize(x) or not _is_canonical(program, weight):
        return None
    return smallest_scale(constant(program.graph_module, bias), params(x).scale)  # type: ignore[arg-type]


def _check_bias(program: Program, node: fx.Node) -> str | None:
    least = _least_scale(program, node)
    return "" if least is None or bool((_integers(program, node.args[1])[1] >= least).all()) else None  # type: ignore[arg-type]


def _widen(program: Program, node: fx.Node) -> fx.Node:
    weight: Any = node.args[1]
    least = _least_scale(program, node)
    assert least is not None
    q, scale, _ = _integers(program, weight)
    wide = torch.maximum(scale, least)
    rows = q.flatten(1).to(torch.float64) * (scale.to(torch.float64) / wide.to(torch.float64))[:, None]
    new = _dequantized(program, weight, rows.round().to(torch.int64).reshape(q.shape), wide)
    return call(program, node, node.target, node.args[0], new, *node.args[2:])


WEIGHTED = tuple(target for row in ops.ROWS if row.weight_arg is not None for target in row.aten)
RULES = (
    Rule("numbers", tuple(OVERLOADS), _always, _numbers),
    Rule("int8", (QUANTIZE, DEQUANTIZE), _check_unsigned, _signed),
    Rule("quantized_constant", (QUANTIZE, QUANTIZE_CHANNELS), _check_constant, _compute),
    Rule("weight_form", (DEQUANTIZE, WEIGHT), _check_weight, _weight),
    Rule("dequantized_constant", (DEQUANTIZE, WEIGHT), _check_dequantized, _fold),
    Rule("matmul_to_linear", _MATMULS, _check_matmul, _linear),
    Rule("fold_batchnorm", FOLD.pattern, _check_norm, _fold_norm),
    Rule("wide_bias", WEIGHTED, _check_bias, _widen),
)
