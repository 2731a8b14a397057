"""Give each meaning one form, so that later passes and the op table need to know only that form.

The rules live next door, by subject; here is their order of preference at one node. Every rule
keeps the exact meaning of the graph (sums may be added up in another order).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile import rewrite
from qcompile.ir import Program, Property
from qcompile.passes.base import Context, Pass
from qcompile.passes.rules_activation import RULES as ACTIVATION
from qcompile.passes.rules_identity import RULES as IDENTITY
from qcompile.passes.rules_pool import RULES as POOL
from qcompile.passes.rules_shuffle import RULES as SHUFFLE
from qcompile.passes.rules_weighted import RULES as WEIGHTED

RULES = (*IDENTITY, *WEIGHTED, *POOL, *SHUFFLE, *ACTIVATION)


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Float -> float."""

    name: ClassVar[str] = "canonicalize"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.FLOAT})
    establishes: ClassVar[frozenset[Property]] = frozenset({Property.CANONICAL})

    def run(self, program: Program, context: Context) -> bool:
        return rewrite.apply(RULES, program, context)
