"""Rules: quantize a tensor whose neighbour the given graph quantizes, so that whole operators become integer.

A quantizer marks what its own backend fuses. These rules move marks to where ours needs them. With q a
quantize and its dequantize, in the same scale throughout:

    move(q(x))                    ->  q(move(q(x)))                 move: reshape, slice, max pool, ...
    q(move(x)), q(cat(x, y))      ->  q(move(q(x))), q(cat(q(x), q(y)))
    relu(max_pool(x))             ->  max_pool(relu(x))
    q(f(x))                       ->  q(f(q'(x)))                   f: a function of one value
    q(x) and other readers of x   ->  all read q(x)

The first three change no value, since rounding and clamping keep the order of values. In the fourth, q' spans
what f tells apart within the range of q, from the first to the last value at which the result changes, so x is
rounded to 1/255 of that. In the last, readers for which the graph had the float value get it rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from qcompile import arith, ops
from qcompile.arith import QMAX, QMIN
from qcompile.ir import Program, QParams
from qcompile.ops.cat import CAT
from qcompile.ops.row import Output, Row
from qcompile.ops.unary import CLAMPS, LOOKUP, clamp_bounds, to_int8, values
from qcompile.qdq import DEQUANTIZE, QUANTIZE, is_dequantize, is_narrow, is_quantize, pair, params
from qcompile.rewrite import Rule, call
from qcompile.sites import only_user, other_operand

Takes = Callable[[Row, fx.Node], bool]
"""Whether a node may become this row's integer operator, as far as its own arguments go."""

_MAGNITUDES = torch.logspace(-12, 14, 1 << 12, base=2, dtype=torch.float64)
_GRID = torch.cat([-_MAGNITUDES.flip(0), torch.zeros(1, dtype=torch.float64), _MAGNITUDES])
_MOVES = tuple(target for row in ops.ROWS if row.output is Output.SHARED for target in row.aten)


def row_of(takes: Takes, node: fx.Node) -> Row | None:
    row, _ = ops.match(node)
    return row if row is not None and takes(row, node) else None


def tail_row(takes: Takes, x: fx.Node) -> Row | None:
    """The row of the integer operator that could compute `x`, from quantized operands; None where none can."""
    row = row_of(takes, x)
    if row is None:
        return None
    if all(map(is_dequantize, row.operands(x))):
        return row
    before: Any = x.args[0]
    if clamp_bounds(x) is not None and clamp_bounds(before) is None and only_user(before) is x:
        fused = tail_row(takes, before)
        return fused if fused is not None and fused.absorbs_clamp else None
    for y in row.operands(x):
        fused, other = row_of(takes, y), other_operand(x, y)
        fits = fused is not None and fused.absorbs_residual and all(map(is_dequantize, fused.operands(y)))
        if fits and only_user(y) is x and other is not None and is_dequantize(other):
            return fused
    return None


def _becomes_integer(takes: Takes, x: fx.Node) -> bool:
    """Whether `x` comes from quantized operands by operators that can all be integer."""
    if is_dequantize(x) or tail_row(takes, x) is not None:
        return True
    row = row_of(takes, x)
    if row is None or not (row is LOOKUP or row.output is Output.SHARED):
        return False
    (operand,) = row.operands(x)
    return only_user(operand) is x and _becomes_integer(takes, operand)


def _behind(node: fx.Node) -> QParams | None:
    """The one quantization that all readers of `node` apply to it; None when some apply none or another."""
    found = {params(user) if is_quantize(user) else None for user in node.users}
    return found.pop() if len(found) == 1 else None


def _range(node: fx.Node, p: QParams) -> QParams | None:
    """The narrowest quantization of the operand of `node` outside of which its result, quantized as `p`, is constant.

    None where it goes on changing, as a sine does.
    """
    results = to_int8(values(node, _GRID), p, p.qmin, p.qmax).reshape(len(_GRID), -1)
    changes = (results[1:] != results[:-1]).any(1).nonzero()
    if not len(changes) or int(changes[0]) == 0 or int(changes[-1]) == len(_GRID) - 2:
        return None
    low, high = min(float(_GRID[changes[0]]), 0.0), max(float(_GRID[changes[-1] + 1]), 0.0)
    scale = arith.float32((high - low) / (QMAX - QMIN))
    return QParams(scale, max(QMIN, min(QMAX, QMIN + round(-low / scale))))


def rules(takes: Takes) -> tuple[Rule, ...]:
    """The rules, for operators that `takes` allows to be integer."""

    def check_same(program: Program, node: fx.Node) -> str | None:
        twins = (u for u in node.args[0].users if is_quantize(u) and u < node)  # type: ignore[union-attr]
        return None if any(params(twin) == params(node) for twin in twins) else ""

    def same(program: Program, node: fx.Node) -> fx.Node:
        x: Any = node.args[0]
        return next(u for u in x.users if is_quantize(u) and u < node and params(u) == params(node))

    def check_output(program: Program, node: fx.Node) -> str | None:
        row = row_of(takes, node)
        if row is None or row.output is not Output.SHARED or not is_dequantize(row.operands(node)[0]):
            return ""
        return "" if _behind(node) == params(row.operands(node)[0]) else None

    def output(program: Program, node: fx.Node) -> fx.Node:
        new = call(program, node, node.target, *node.args, **node.kwargs)
        return pair(program, new, params(ops.match(node)[0].operands(node)[0]))  # type: ignore[union-attr]

    def check_input(program: Program, node: fx.Node) -> str | None:
        row = row_of(takes, node)
        if row is None or _behind(node) is None or not (row is CAT or row.output is Output.SHARED):
            return ""
        # The range of what a max pool or a slice keeps may be too small for the other readers of its operand.
        others = row is not CAT and any(only_user(x) is not node for x in row.operands(node) if x.op != "placeholder")
        return "" if others or all(map(is_dequantize, row.operands(node))) else None

    def inputs(program: Program, node: fx.Node) -> fx.Node:
        p = _behind(node)
        assert p is not None
        row, _ = ops.match(node)
        quantized = {x: x if is_dequantize(x) else pair(program, x, p) for x in row.operands(node)}  # type: ignore[union-attr]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: quantized.get(n, n))
        return call(program, node, node.target, *args, **kwargs)

    def check_clamp(program: Program, node: fx.Node) -> str | None:
        move: Any = node.args[0]
        if clamp_bounds(node) is None or move.target not in _MOVES or "pad" in str(move.target):
            return ""
        x = move.args[0]
        fused = tail_row(takes, x) if only_user(move) is node and only_user(x) is move else None
        return None if fused is not None and fused.absorbs_clamp and clamp_bounds(x) is None else ""

    def clamp(program: Program, node: fx.Node) -> fx.Node:
        move: Any = node.args[0]
        clamped = call(program, node, node.target, move.args[0], *node.args[1:], **node.kwargs)
        return call(program, move, move.target, clamped, *move.args[1:], **move.kwargs)

    def check_function(program: Program, node: fx.Node) -> str | None:
        p = _behind(node)
        if p is None or row_of(takes, node) is not LOOKUP or tail_row(takes, node) is not None:
            return ""
        (x,) = LOOKUP.operands(node)
        if only_user(x) is not node or not _becomes_integer(takes, x):
            return ""
        return None if _range(node, p) is not None else "its output's range does not bound its input's"

    def function(program: Program, node: fx.Node) -> fx.Node:
        (x,) = LOOKUP.operands(node)
        found = _range(node, _behind(node))  # type: ignore[arg-type]
        assert found is not None
        dequantized = pair(program, x, found)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: dequantized if n is x else n)
        return call(program, node, node.target, *args, **kwargs)

    def check_readers(program: Program, node: fx.Node) -> str | None:
        x: Any = node.args[0]
        if len(x.users) == 1 or tail_row(takes, x) is None:
            return ""
        widest = max(filter(is_quantize, x.users), key=lambda q: params(q).scale * (params(q).qmax - params(q).qmin))
        return None if node is widest else ""

    def readers(program: Program, node: fx.Node) -> fx.Node:
        x: Any = node.args[0]
        with program.graph.inserting_after(x):
            anchor = program.graph.call_function(QUANTIZE, (x,))  # holds the place right behind x
        with program.graph.inserting_before(anchor):
            dequantized = pair(program, x, params(node))
        program.graph.erase_node(anchor)
        quantized: Any = dequantized.args[0]
        for user in list(x.users):
            if user not in (quantized, node):
                user.replace_input_with(x, dequantized)
        return quantized

    return (
        Rule("same_quantization", (QUANTIZE,), check_same, same),
        Rule("clamp_first", tuple(CLAMPS), check_clamp, clamp),
        Rule("quantize_moved", _MOVES, check_output, output),
        Rule("quantize_before_moving", (*_MOVES, *CAT.aten), check_input, inputs),
        Rule("quantize_argument", LOOKUP.aten, check_function, function),
        Rule("quantize_for_all", (QUANTIZE,), check_readers, readers),
    )


def narrowing(takes: Takes) -> Rule:
    """quantize to less than int8's range  ->  the same behind a clamp, where the operator cannot clamp itself."""

    def check(program: Program, node: fx.Node) -> str | None:
        x: Any = node.args[0]
        row = tail_row(takes, x)
        clamps = row is not None and (row.absorbs_clamp or row is LOOKUP or row.output is Output.SHARED)
        return None if is_narrow(params(node)) and not clamps and x.target is not DEQUANTIZE else ""

    def replace(program: Program, node: fx.Node) -> fx.Node:
        x: Any = node.args[0]
        p = params(node)
        wide = pair(program, x, QParams(p.scale, p.zero_point))
        low, high = ((bound - p.zero_point) * p.scale for bound in (p.qmin, p.qmax))
        clamped = call(program, x, torch.ops.aten.clamp.default, wide, low, high)
        return call(program, x, QUANTIZE, clamped, *node.args[1:])

    return Rule("narrow_range", (QUANTIZE,), check, replace)
