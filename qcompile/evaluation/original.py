"""The float graph that an integer program was made of, made once more: captured, and taken through the same passes.

An integer program keeps no float graph, which would double its memory. But it knows the passes that made it, and
names are stable: what the float half of the pipeline makes of the same model has the same nodes. That this is so is
checked against the ledger, operator by operator, so that layers of two different networks are never compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from qcompile.capture import capture
from qcompile.errors import InputError
from qcompile.ir import Program, Property
from qcompile.manager import STAGE_OF, PassManager
from qcompile.passes.base import Context, Pass
from qcompile.quantizer import Recipe
from qcompile.sites import is_computed

_REMEDY = "give the model that was compiled, as it was then"


def original(program: Program, recipe: Recipe | None, model: nn.Module | ExportedProgram, example: Any) -> Program:
    """The float graph of `model` that `program` was quantized from.

    Args:
        example: inputs to capture an nn.Module with.

    Raises:
        InputError: there is no recipe, or another graph comes out than went into `program`; names the first node.
        CaptureError, PassError: as `quantize` raises them.
    """
    if recipe is None:
        raise InputError(
            "the model was trained as int8 or quantized elsewhere, so its layers have no float counterparts",
            remedy="diagnose what was quantized here, from the float model; qcompile.evaluate compares the outputs",
        )
    captured = capture(model, example, None if isinstance(model, ExportedProgram) else recipe.dynamic_shapes)
    context = Context(
        recipe.config, rewrite_limit=recipe.rewrite_limit, objection=recipe.objection, maxima=recipe.maxima
    )
    with torch.no_grad():
        PassManager(tuple(float_half(recipe.passes))).run(captured, context)
    _check_same(program, captured)
    return captured


def float_half(passes: Iterable[Pass]) -> Iterator[Pass]:
    """The passes before the first one that leaves the float stage."""
    leaves = set(STAGE_OF) - {Property.FLOAT}
    return takewhile(lambda step: not step.establishes & leaves, passes)


def _check_same(program: Program, captured: Program) -> None:
    names, others = ([spec.name for spec in each.inputs] for each in (program, captured))
    if names != others:
        raise InputError(
            f"the model takes {', '.join(others)}, and the program was made of one that takes {', '.join(names)}",
            remedy=f"{_REMEDY}, with the inputs in the same order",
        )
    expected = {row.node: row.op for row in program.ledger.rows}
    actual = {node.name: str(node.target) for node in captured.graph.nodes if is_computed(node)}
    for name in [*expected, *actual]:
        if expected.get(name) != actual.get(name):
            ours, theirs = (ops.get(name, "no such operator") for ops in (expected, actual))
            raise InputError(
                f"the model is not the one that the program was made of: {name} is {ours} there, and {theirs} here",
                where=next((row.where for row in program.ledger.rows if row.node == name), None) or f"node {name}",
                remedy=f"{_REMEDY}; a pass that renames operators after the float stage cannot be followed",
            )
