"""Rules: activations that a model spells out in arithmetic, recognised by their values.

A small tree of elementwise operators over one tensor x is a function of one variable, however it is
written: x * relu6(x + 3) / 6, x * (relu6(x + 3) / 6) and x * hardsigmoid(x) are all hardswish(x). The
tree is run in float64 on a grid; where it agrees with a known activation to float32's precision,
that activation takes its place.

rrelu(x, lower, upper), not in training  ->  leaky_relu(x, (lower + upper) / 2)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir import Program, constant, is_constant, is_tensor
from qcompile.rewrite import Rule, call

aten = torch.ops.aten

_ELEMENTWISE = frozenset((
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.mul.Tensor,
    aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default, aten.pow.Tensor_Scalar, aten.exp.default,
    aten.log1p.default, aten.erf.default, aten.sigmoid.default, aten.tanh.default, aten.softplus.default,
    aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.hardsigmoid.default, aten.clamp.default,
    aten.clamp_min.default, aten.clamp_max.default, aten.reciprocal.default,
))  # fmt: skip
_LARGEST_TREE = 12
_GRID = torch.cat([torch.linspace(-30, 30, 601, dtype=torch.float64), torch.linspace(-4, 4, 1601, dtype=torch.float64)])
_PRECISION = 2e-6  # of constants such as 1/6 and sqrt(2/pi), which models round to float32 or to six digits

_KNOWN: tuple[tuple[Any, dict[str, Any], Callable[[Tensor], Tensor]], ...] = (
    (aten.hardswish.default, {}, torch.nn.functional.hardswish),
    (aten.hardsigmoid.default, {}, torch.nn.functional.hardsigmoid),
    (aten.silu.default, {}, torch.nn.functional.silu),
    (aten.gelu.default, {}, torch.nn.functional.gelu),
    (aten.gelu.default, {"approximate": "tanh"}, lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    (aten.mish.default, {}, torch.nn.functional.mish),
)
_KNOWN_VALUES = tuple(function(_GRID) for _, _, function in _KNOWN)


def _tree(node: fx.Node) -> tuple[list[fx.Node], fx.Node] | None:
    """The elementwise nodes that make `node`, in order, and the one tensor they all come from.

    Walks down from `node`; the latest tensor that every path leads through is the source.
    """
    return _close([node], node)


def _close(inside: list[fx.Node], top: fx.Node) -> tuple[list[fx.Node], fx.Node] | None:
    """The tree grown downwards from `top`, its lowest node so far, until one source is left."""
    order = {n: i for i, n in enumerate(top.graph.nodes)}
    frontier = set(_inputs(top))
    while len(frontier) > 1:
        latest = max(frontier, key=order.__getitem__)
        if latest.target not in _ELEMENTWISE or len(inside) == _LARGEST_TREE:
            return None
        frontier.discard(latest)
        frontier.update(_inputs(latest))
        inside.append(latest)
    return (sorted(inside, key=order.__getitem__), frontier.pop()) if frontier else None


def _inputs(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if is_tensor(n) and not is_constant(n)]


def _values(program: Program, tree: list[fx.Node], x: fx.Node) -> Tensor | None:
    """What the tree makes of the grid, in float64; None when a constant in it is not one number."""
    value: dict[fx.Node, Tensor] = {x: _GRID}

    def look_up(n: fx.Node) -> Tensor:
        return value[n] if n in value else constant(program.graph_module, n).to(torch.float64).reshape(())

    for node in tree:
        if any(is_constant(n) and n.meta["val"].numel() != 1 for n in node.all_input_nodes):
            return None
        if any(n not in value and not is_constant(n) for n in node.all_input_nodes):
            return None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), look_up)
        target: Any = node.target
        value[node] = target(*args, **kwargs)
    return value[tree[-1]]


def _recognise(program: Program, node: fx.Node) -> tuple[int, fx.Node] | None:
    """(position in _KNOWN, x) where `node` is a known activation of x."""
    found = _tree(node)
    while found is not None:
        tree, x = found
        values = _values(program, tree, x)
        if values is None:
            return None
        for i, known in enumerate(_KNOWN_VALUES):
            if bool(((values - known).abs() <= _PRECISION * (1 + known.abs())).all()):
                return i, x
        # The source may itself belong to the activation: hardswish may end in a division by 6.
        found = _grow(tree, x)
    return None


def _grow(tree: list[fx.Node], x: fx.Node) -> tuple[list[fx.Node], fx.Node] | None:
    if x.target not in _ELEMENTWISE or len(tree) == _LARGEST_TREE:
        return None
    return _close([*tree, x], x)


def _check(program: Program, node: fx.Node) -> str | None:
    return None if _recognise(program, node) is not None else ""


def _replace(program: Program, node: fx.Node) -> fx.Node:
    found = _recognise(program, node)
    assert found is not None
    index, x = found
    target, kwargs, _ = _KNOWN[index]
    return call(program, node, target, x, **kwargs)


def _check_rrelu(program: Program, node: fx.Node) -> str | None:
    training = node.args[3] if len(node.args) > 3 else node.kwargs.get("training", False)
    return "it is in training mode" if training else None


def _mean_slope(program: Program, node: fx.Node) -> fx.Node:
    """Outside training the random slope is its mean."""
    lower: Any = node.args[1] if len(node.args) > 1 else 1 / 8
    upper: Any = node.args[2] if len(node.args) > 2 else 1 / 3
    return call(program, node, aten.leaky_relu.default, node.args[0], (lower + upper) / 2)


_ENDS = (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar)
RULES = (
    Rule("recognise_activation", _ENDS, _check, _replace),
    Rule("rrelu_to_leaky_relu", (aten.rrelu.default,), _check_rrelu, _mean_slope),
)
