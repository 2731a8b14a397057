"""Take a float graph as it is for the last stage: no operator becomes integer, and the ledger says so of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile import ops
from qcompile.ir import LedgerRow, Program, Property, where
from qcompile.passes.base import Context, Pass
from qcompile.sites import computes_no_reals, is_computed, is_shape


@dataclass(frozen=True)
class KeepFloat(Pass):
    """Float -> integer, with no integer operator in it.

    Attributes:
        reason: why, for the ledger.
    """

    name: ClassVar[str] = "keep_float"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.FLOAT, Property.CANONICAL, Property.BATCHNORM_FOLDED})
    establishes: ClassVar[frozenset[Property]] = frozenset({Property.INTEGER})
    reason: str = "nothing was quantized"

    def run(self, program: Program, context: Context) -> bool:
        program.ledger.rows = []
        for node in filter(is_computed, program.graph.nodes):
            moves = computes_no_reals(node) or is_shape(ops.find(node))
            kind, reason = ("shape", "") if moves else ("float", self.reason)
            program.ledger.rows.append(LedgerRow(str(node.target), node.name, kind, "", reason, where(node)))
        return True
