"""One calibration, many quantizations: the pipeline run to its observers once, and from there again and again, each
time with other layers left in float.

What an observer measures are the values of the float graph. They do not depend on which layers are quantized, so a run
that leaves some in float finds all that it has to measure among the observers of the run that leaves none.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from qcompile.errors import PipelineError
from qcompile.ir import Program, Property
from qcompile.manager import PassManager, PassRecord
from qcompile.observers import Observer
from qcompile.ops.row import Row
from qcompile.passes.base import Context, Pass
from qcompile.quantizer import QuantizedModel, Recipe

REASON = "left in float for accuracy (max_accuracy_drop)"


class Stages:
    """The stages of one model.

    Attributes:
        captured: the graph as it was captured, before any pass.
        float: the graph in which observers would be inserted.
        qdq: with every layer quantized that can be.
        context: of the passes.

    Raises:
        PipelineError: the passes do not observe and calibrate.
    """

    def __init__(
        self, program: Program, context: Context, passes: tuple[Pass, ...], dynamic_shapes: Any = None
    ) -> None:
        self._passes, self._dynamic_shapes = passes, dynamic_shapes
        at = {p: i for i, step in enumerate(passes) for p in step.establishes}
        if not {Property.OBSERVED, Property.CALIBRATED} <= set(at):
            raise PipelineError(
                "the pipeline does not calibrate, so that no layers can be chosen",
                remedy="leave max_accuracy_drop out, or start from qcompile.passes.default_pipeline()",
            )
        self.context = context
        self.captured = copy.deepcopy(program)
        self._observing = passes[at[Property.OBSERVED] : at[Property.CALIBRATED]]
        self._quantizing = passes[at[Property.CALIBRATED] + 1 : at[Property.INTEGER]]
        self._fusing = passes[at[Property.INTEGER] :]
        self._before = self._run(program, passes[: at[Property.OBSERVED]])
        self.float = copy.deepcopy(program)
        *_, self._calibration = self._run(program, passes[at[Property.OBSERVED] : at[Property.CALIBRATED] + 1])
        self._observers = dict(_observers(program))
        self._run(program, self._quantizing)
        self.qdq = program

    def integer(self, left: Collection[str]) -> QuantizedModel:
        """The integer program in which the operators called `left` stay float."""

        def object_to(row: Row, node: fx.Node) -> str | None:
            if node.name in left:
                return REASON
            return self.context.objection(row, node) if self.context.objection is not None else None

        program = copy.deepcopy(self.float)
        context = replace(self.context, objection=object_to, originals={}, rewrites=[])
        records = [*self._before, *self._run(program, self._observing, context), self._calibration]
        for name, _ in _observers(program):
            setattr(program.graph_module, name, self._observers[name])
        program.properties.add(Property.CALIBRATED)
        records += self._run(program, (*self._quantizing, *self._fusing), context)
        recipe = Recipe(self._passes, context.config, self._dynamic_shapes, object_to, maxima=context.maxima)
        return QuantizedModel(program, records, recipe)

    def _run(self, program: Program, passes: tuple[Pass, ...], context: Context | None = None) -> list[PassRecord]:
        with torch.no_grad():
            return PassManager(passes).run(program, context or self.context)


def _observers(program: Program) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in program.graph_module.named_children() if isinstance(m, Observer)]
