"""Factors per channel: where they can move from the layer that makes a tensor to the layers that read it.

    reader(f(maker(x)))  =  (reader / s)(f((s maker)(x)))        f(s v) = s f(v) for every s > 0

s multiplies the rows of the maker's weight and its bias, and divides the columns of each reader's weight, one factor
per channel. f may be any chain of operators that are positively homogeneous and keep channels apart: relu, leaky relu,
prelu, pooling, a reshape that leaves the channels where they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir import MOMENTS, Program, add_constant, call_nodes, constant, is_constant, is_tensor, origin, shape_of
from qcompile.ops.conv import argument
from qcompile.ops.unary import clamp_bounds
from qcompile.weights import by_channel

aten = torch.ops.aten
_LINEAR = aten.linear.default
_CONVOLUTIONS = (aten.conv2d.default, aten.conv1d.default)
LAYERS = (*_CONVOLUTIONS, _LINEAR)
_NORMS: dict[Any, tuple[int, ...]] = {
    aten.layer_norm.default: (2, 3),
    aten.rms_norm.default: (2,),
    aten.group_norm.default: (2, 3),
}
MAKERS = (*LAYERS, *_NORMS)
_POOLS = (
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
)
_RESHAPES = (aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.squeeze.dim, aten.unsqueeze.default)


@dataclass(frozen=True)
class Link:
    """The channels between one maker and all that reads it.

    Attributes:
        maker: a convolution, a linear layer or a norm, with constant weights.
        readers: the convolutions and linear layers that read its channels, at least one.
    """

    maker: fx.Node
    readers: tuple[fx.Node, ...]


def link(maker: fx.Node) -> Link | str:
    """The channels that `maker` (one of `MAKERS`) makes, or why no factor can leave it."""
    constants = _constants(maker)
    if constants[0] is None:
        return "it has no weights of its own"
    if not all(is_constant(n) for n in constants if n is not None):
        return "its weights are computed at run time"
    if maker.target in _NORMS and maker.target is not aten.group_norm.default and len(maker.args[1]) != 1:  # type: ignore[arg-type]
        return "it normalizes more than one dimension"
    if maker.target in _CONVOLUTIONS and len(shape_of(maker)) != len(shape_of(maker.args[1])):  # type: ignore[arg-type]
        return "its input has no batch dimension"
    last = maker.target not in (*_CONVOLUTIONS, aten.group_norm.default)
    readers: list[fx.Node] = []
    reason = _walk(maker, len(shape_of(maker)) - 1 if last else 1, readers)
    if reason:
        return reason
    return Link(maker, tuple(readers)) if readers else "no layer reads it"


def links_behind(program: Program, makers: Iterable[Any], rule: str) -> list[Link]:
    """The links that calls of `makers` begin, in graph order; the ledger says of `rule` why others begin none."""
    found: list[Link] = []
    for node in call_nodes(program.graph, makers):
        begun = link(node)
        if isinstance(begun, str):
            program.ledger.decline(rule, node, begun)
        else:
            found.append(begun)
    return found


def _walk(tensor: fx.Node, axis: int, readers: list[fx.Node]) -> str:
    """Collect the layers that read `tensor`, whose channels lie along `axis`; or why a factor cannot reach them."""
    for user in tensor.users:
        if user.target in LAYERS and user.args[0] is tensor and user.all_input_nodes.count(tensor) == 1:
            if not is_constant(user.args[1]):  # type: ignore[arg-type]
                return f"the weights of {user.name} are computed at run time"
            rank = len(shape_of(tensor))
            if axis != (rank - 1 if user.target is _LINEAR else 1) or rank == 1:
                return f"{user.name} sums over another dimension than the channels"
            readers.append(user)
        else:
            reason = _objection(user, tensor, axis) or _walk(user, axis, readers)
            if reason:
                return reason
    return ""


def _objection(node: fx.Node, tensor: fx.Node, axis: int) -> str:
    """Why a factor per channel of `tensor` cannot pass `node`."""
    if node.op == "output":
        return "it is an output of the model"
    if node.target is aten.leaky_relu.default or clamp_bounds(node) == (0.0, None):
        return ""
    bounds = clamp_bounds(node)
    if bounds is not None:
        return f"{node.name} clamps to {bounds[0]} and {bounds[1]}, of every channel alike"
    if node.target is aten.prelu.default:
        weight: Any = node.args[1]
        own = axis == 1 or tuple(shape_of(weight)) == (1,)
        return "" if weight is not tensor and own else f"{node.name} has its slopes along another dimension"
    if node.target in _POOLS:
        return "" if axis == 1 and len(shape_of(tensor)) > 2 else f"{node.name} pools over the channels"
    if node.target in _RESHAPES and is_tensor(node):
        before, after = ([str(n) for n in shape_of(each)[: axis + 1]] for each in (tensor, node))
        return "" if before == after else f"{node.name} moves the channels"
    return f"{node.name} ({node.target}) reads it, which is not f(s x) = s f(x)"


# --- weights --------------------------------------------------------------------------------------


def _constants(maker: fx.Node) -> list[fx.Node | None]:
    """The weight and, if it can have one, the bias."""
    return [argument(maker, at, None) for at in _places(maker)]


def _places(maker: fx.Node) -> tuple[int, ...]:
    return _NORMS.get(maker.target, (1, 2))


def _groups(layer: fx.Node) -> int:
    return 1 if layer.target is _LINEAR else int(argument(layer, 6, 1))


def rows(weight: Tensor) -> Tensor:
    """(channels, taps): what each channel of the maker is made with."""
    return weight.reshape(len(weight), -1)


def columns(layer: fx.Node, weight: Tensor) -> Tensor:
    """(input channels, whatever meets them): the weight of a reader by what it multiplies."""
    groups = _groups(layer)
    return weight.reshape(groups, len(weight) // groups, weight.shape[1], -1).transpose(1, 2).flatten(0, 1).flatten(1)


def per_column(layer: fx.Node, weight: Tensor, factors: Tensor) -> Tensor:
    """`factors` (input channels) in a shape that broadcasts against the weight of a reader."""
    groups = _groups(layer)
    spread = factors.reshape(groups, 1, weight.shape[1]).expand(-1, len(weight) // groups, -1)
    return spread.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))


def weight_of(program: Program, node: fx.Node) -> Tensor:
    """A copy of the weight of a maker or reader, float64."""
    held: Any = node.args[_places(node)[0]]
    return constant(program.graph_module, held).to(torch.float64, copy=True, memory_format=torch.contiguous_format)


def bias_of(program: Program, maker: fx.Node) -> Tensor:
    """A copy of the bias (channels,) of a maker, float64; zeros where it has none."""
    weight, *bias = _constants(maker)
    held = next((node for node in bias if node is not None), None)
    if held is None:
        return torch.zeros(shape_of(weight)[0], dtype=torch.float64)  # type: ignore[arg-type]
    return constant(program.graph_module, held).to(torch.float64, copy=True)


def move(program: Program, link: Link, factors: Tensor) -> None:
    """Multiply what the maker makes by `factors` (channels), and divide the readers' columns by them."""
    for at in _places(link.maker):
        if argument(link.maker, at, None) is not None:
            _replace(program, link.maker, at, lambda w: w * by_channel(factors, w))
    if MOMENTS in link.maker.meta:
        link.maker.meta[MOMENTS] = link.maker.meta[MOMENTS].scaled(factors)
    for reader in link.readers:
        _replace(program, reader, 1, lambda w, reader=reader: w / per_column(reader, w, factors))


def _replace(program: Program, node: fx.Node, at: int, change: Any) -> None:
    """Give `node` a constant of its own; what else holds the old one keeps it."""
    old: Any = node.args[at]
    value = change(constant(program.graph_module, old).double()).float()
    with program.graph.inserting_before(node):
        new = add_constant(program.graph_module, str(old.target), value, origin(old))
    args = list(node.args)
    args[at] = new
    node.args = tuple(args)
