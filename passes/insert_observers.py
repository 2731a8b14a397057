"""Decide what becomes integer, and put an observer behind every tensor that will be int8.

Before: the float graph. After: the same graph with identity modules that measure. A tensor that
several integer operators share has one observer; the values inside a group (a convolution and the
residual add and relu that it absorbs) have none, because they never exist as int8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from qcompile.config import AVERAGING, PERCENTILE, QuantConfig
from qcompile.distributed import processes
from qcompile.histograms import Percentile
from qcompile.ir import Program, Property
from qcompile.observers import MinMax, MovingAverage, Observer, Shared
from qcompile.ops.row import Output, Row
from qcompile.passes.base import Context, Pass
from qcompile.searches import Entropy, LearnedStep, LeastSquares
from qcompile.sites import Group, Refusal, is_computed, plan

_WITHOUT_OPTIONS: dict[str, Callable[[], Observer]] = {
    "minmax": MinMax,
    "mse": LeastSquares,
    "lsq": LearnedStep,
    "entropy": Entropy,
}


@dataclass(frozen=True)
class InsertObservers(Pass):
    """Float -> observed."""

    name: ClassVar[str] = "insert_observers"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.FLOAT, Property.CANONICAL, Property.BATCHNORM_FOLDED})
    establishes: ClassVar[frozenset[Property]] = frozenset({Property.OBSERVED})

    def run(self, program: Program, context: Context) -> bool:
        context.config.check(filter(is_computed, program.graph.nodes), program.placeholders())

        groups = plan(program.graph, refusal(context))
        inserted: dict[fx.Node, fx.Node] = {}
        for group in groups.values():
            _observe_group(program, context, group, inserted)
        quantized = {member for group in groups.values() for member in group.members}
        for tensor, observer in inserted.items():
            made_as_int8 = tensor in quantized
            for user in list(tensor.users):
                # What an integer operator computes exists as int8 only; what float code computes, and
                # the model's inputs, are quantized for the integer operators that read them.
                if user is not observer and (made_as_int8 or user in quantized):
                    user.replace_input_with(tensor, observer)
        return bool(inserted)


def refusal(context: Context) -> Refusal:
    """Why a node that a row could take must stay float."""

    def refuse(row: Row, node: fx.Node) -> str | None:
        selector = context.config.excludes(node)
        if selector is not None:
            return f"excluded by the configuration ({selector!r})"
        activations = context.config.of([node]).activations
        if activations != "static":
            return f"activations={activations!r}, which only linear layers can have"
        return context.objection(row, node) if context.objection is not None else None

    return refuse


def _observe_group(program: Program, context: Context, group: Group, inserted: dict[fx.Node, fx.Node]) -> None:
    for tensor in group.inputs:
        if tensor not in inserted:
            inserted[tensor] = _insert(program, tensor, make(context.config.of([tensor])))
    if group.row.output is Output.SHARED:
        source = inserted[group.operands[0]]
        observer = program.graph_module.get_submodule(str(source.target))
        assert isinstance(observer, Observer)
        inserted[group.tail] = _insert(program, group.tail, Shared(observer))
    elif group.tail not in inserted:
        inserted[group.tail] = _insert(program, group.tail, make(context.config.of(group.members)))


def make(config: QuantConfig) -> Observer:
    """A fresh observer, as `config` asks."""
    if config.observer == "moving_average":
        return MovingAverage(AVERAGING if config.averaging is None else config.averaging, processes())
    if config.observer == "percentile":
        return Percentile(PERCENTILE if config.percentile is None else config.percentile)
    return _WITHOUT_OPTIONS[str(config.observer)]()


def _insert(program: Program, tensor: fx.Node, observer: Observer) -> fx.Node:
    """Call `observer` on `tensor`, right behind it (behind all inputs, for an input)."""
    name = f"observe_{tensor.name}"
    program.graph_module.add_submodule(name, observer)
    at = program.placeholders()[-1] if tensor.op == "placeholder" else tensor
    with program.graph.inserting_after(at):
        node = program.graph.call_module(name, (tensor,))
    node.meta["val"] = tensor.meta["val"]
    return node
