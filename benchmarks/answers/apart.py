"""Passes that keep apart what qcompile joins, and one that counts: to measure what joining brings."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx

from qcompile import ops, rewrite
from qcompile.ir import Program, Property
from qcompile.observers import Observer
from qcompile.passes import Context, Pass, Pipeline, default_pipeline
from qcompile.passes.fold_batchnorm import TO_DEPTHWISE
from qcompile.passes.insert_observers import make
from qcompile.sites import is_computed, is_shape, read


@dataclass(frozen=True)
class KeepNorms(Pass):
    """Every batch norm becomes a depthwise 1x1 convolution; none is folded into the layer before it."""

    name: ClassVar[str] = "keep_norms"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.FLOAT, Property.CANONICAL})
    establishes: ClassVar[frozenset[Property]] = frozenset({Property.BATCHNORM_FOLDED})

    def run(self, program: Program, context: Context) -> bool:
        return rewrite.apply((TO_DEPTHWISE,), program, context)


@dataclass(frozen=True)
class ObserveEach(Pass):
    """Observe what residual adds and clamps take, too: it then exists as int8, and they are operators of their own."""

    name: ClassVar[str] = "observe_each"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.OBSERVED})

    def run(self, program: Program, context: Context) -> bool:
        modules = dict(program.graph_module.named_modules())
        observes = lambda node: isinstance(modules.get(str(node.target)), Observer)  # noqa: E731
        inner = [m for g in read(program.graph, observes, observes) for m in g.members if m is not g.tail]
        for node in inner:
            name = f"observe_{node.name}"
            program.graph_module.add_submodule(name, make(context.config.of([node])))
            with program.graph.inserting_after(node):
                observer = program.graph.call_module(name, (node,))
            observer.meta["val"] = node.meta["val"]
            for user in set(node.users) - {observer}:
                user.replace_input_with(node, observer)
        return bool(inner)


@dataclass(frozen=True)
class Count(Pass):
    """Note how many operators there are, under the pass' own name."""

    name: str  # type: ignore[misc]  # a pipeline has several of them
    found: dict[str, int]

    def run(self, program: Program, context: Context) -> bool:
        self.found[self.name] = len(operators(program))
        return False


PIPELINES = {
    "joined": default_pipeline(),
    "add and relu apart": default_pipeline().after("insert_observers", ObserveEach()),
    "and batch norm apart": default_pipeline()
    .after("insert_observers", ObserveEach())
    .replace("fold_batchnorm", KeepNorms()),
}


def counting(pipeline: Pipeline, found: dict[str, int]) -> Pipeline:
    """`pipeline`, which then notes in `found` how many operators there are at its start and behind each pass."""
    first, *_ = pipeline.names
    counted = pipeline.before(first, Count("captured", found))
    for name in pipeline.names:
        counted = counted.after(name, Count(f"after {name}", found))
    return counted


def operators(program: Program) -> list[fx.Node]:
    """What computes something: no constants, no choice among several results."""
    return [n for n in program.graph.nodes if n.op == "call_function" and n.target is not operator.getitem]


def bytes_moved(program: Program) -> tuple[int, int]:
    """(activations, constants) in bytes that the operators read and write, each by itself; views move nothing."""
    activations = constants = 0
    for node in operators(program):
        if is_computed(node) and is_shape(ops.find(node)):
            continue
        activations += _bytes(node.meta["val"])
        for taken in node.all_input_nodes:
            value = taken.meta.get("val")
            if taken.op == "get_attr":
                constants += _bytes(value if value is not None else getattr(program.graph_module, str(taken.target)))
            else:
                activations += _bytes(value)
    return activations, constants


def _bytes(value: Any) -> int:
    if isinstance(value, (tuple, list)):
        return sum(map(_bytes, value))
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
