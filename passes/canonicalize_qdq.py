"""Bring a graph that was quantized elsewhere into the form that this project's own `quantize` writes.

For a model that has been through torchao's PT2E flow (prepare_pt2e, calibration, convert_pt2e): its
scales, zero points and weights are taken as they are. What it left in float stays float, and the ledger says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from qcompile import ops, rewrite
from qcompile.arith import QMAX, QMIN
from qcompile.errors import QuantizationError
from qcompile.ir import Program, Property, is_constant, source, where
from qcompile.ops.row import Row
from qcompile.passes.base import Context, Pass
from qcompile.passes.canonicalize import RULES as CANONICALIZE
from qcompile.passes.fold_batchnorm import FOLD
from qcompile.passes.rules_qdq_form import OVERLOADS
from qcompile.passes.rules_qdq_form import RULES as FORM
from qcompile.passes.rules_qdq_share import narrowing, rules
from qcompile.qdq import (
    DEQUANTIZE,
    MARKS,
    NAMESPACE,
    QUANTIZE,
    QUANTIZE_CHANNELS,
    WEIGHT,
    is_dequantize,
    is_quantize,
    lift_weights,
    lower_weights,
)
from qcompile.sites import STAYS_FLOAT, is_computed, read

NOT_QUANTIZED = "it is not quantized in the given graph"
_KNOWN = (QUANTIZE, DEQUANTIZE, QUANTIZE_CHANNELS, WEIGHT, *OVERLOADS)


@dataclass(frozen=True)
class CanonicalizeQdq(Pass):
    """Given qdq -> qdq.

    Raises:
        QuantizationError: the graph is quantized in a way that has no int8 meaning here: by scales computed at run
            time, to other types, per channel of an activation.
    """

    name: ClassVar[str] = "canonicalize_qdq"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.GIVEN_QDQ})
    establishes: ClassVar[frozenset[Property]] = frozenset({Property.QDQ})

    def run(self, program: Program, context: Context) -> bool:
        for node in program.graph.nodes:
            if node.op == "call_function" and getattr(node.target, "namespace", "") == NAMESPACE:
                _refuse(node)
        changed = rewrite.apply((*FORM, *CANONICALIZE, FOLD), program, context)
        for node in program.graph.nodes:
            if node.target in (QUANTIZE, DEQUANTIZE):
                _check_activation(node)
        context.config.check(filter(is_computed, program.graph.nodes), program.placeholders())
        lifted = lift_weights(program)

        def refusal(row: Row, node: fx.Node) -> str | None:
            selector = context.config.excludes(node)
            if selector is not None:
                return f"excluded by the configuration ({selector!r})"
            if row.weight_arg is not None and node.args[row.weight_arg] not in lifted:
                return "its weight is not quantized in the given graph"
            return context.objection(row, node) if context.objection is not None else None

        def takes(row: Row, node: fx.Node) -> bool:
            return STAYS_FLOAT not in node.meta and refusal(row, node) is None

        changed |= rewrite.apply(rules(takes), program, context)
        changed |= rewrite.apply((narrowing(takes),), program, context)
        _give_reasons(program, refusal)
        lower_weights(program, lifted)
        return changed


def _error(node: fx.Node, what: str, remedy: str) -> QuantizationError:
    return QuantizationError(what, where=where(node) or node.name, source=source(node), remedy=remedy)


def _refuse(node: fx.Node) -> None:
    """Refuse an operator of the convention that cannot be static int8."""
    if node.target not in _KNOWN or node.kwargs.get("out_dtype") not in (None, torch.float32):
        raise _error(
            node,
            f"the given graph has {node.target}, which is not static quantization to int8 or uint8",
            "quantize with is_dynamic=False, per tensor for activations and per tensor or channel for weights",
        )
    computed = [a for a in node.args[1:] if isinstance(a, fx.Node) and not is_constant(a)]
    if computed:
        raise _error(
            node, "the given graph computes a scale at run time", "quantize with is_dynamic=False (static quantization)"
        )


def _check_activation(node: fx.Node) -> None:
    """Refuse what does not stand for an int8 activation."""
    _, scale, zero_point, qmin, qmax, dtype = node.args
    numbers: Any = (scale, zero_point, qmin, qmax)
    if dtype is not torch.int8 or not (QMIN <= numbers[2] <= numbers[3] <= QMAX):
        raise _error(
            node,
            f"an activation is quantized to {dtype} between {qmin} and {qmax}",
            "quantize activations to int8 or uint8",
        )
    if not (math.isfinite(numbers[0]) and numbers[0] > 0 and QMIN <= numbers[1] <= QMAX):
        raise _error(
            node,
            f"an activation has scale {scale} and zero point {zero_point}",
            "calibrate with data that reaches every layer, so that each scale is positive",
        )
    ends = is_dequantize(node) if node.target is DEQUANTIZE else all(user.target is DEQUANTIZE for user in node.users)
    if not ends:
        raise _error(
            node,
            "integers are read or made by an operator that is neither quantize nor dequantize",
            "give the graph as convert_pt2e returns it, with float inputs and float operators in between",
        )


def _give_reasons(program: Program, refusal: Any) -> None:
    """Note at each operator that stays float why it does."""
    for node in program.graph.nodes:
        row, _ = ops.match(node)
        reason = refusal(row, node) if row is not None else None
        if reason:
            node.meta.setdefault(STAYS_FLOAT, reason)
    grouped = {m for group in read(program.graph, is_dequantize, is_quantize) for m in group.members}
    for node in program.graph.nodes:
        if is_computed(node) and node.target not in MARKS and node not in grouped and ops.match(node)[0] is not None:
            node.meta.setdefault(STAYS_FLOAT, NOT_QUANTIZED)
