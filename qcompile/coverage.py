"""The ledger as an artifact keeps it: what became of every operator, and which kernel computes it."""

from __future__ import annotations

from collections.abc import Mapping

from qcompile.artifact import CoverageRow
from qcompile.errors import StrictError
from qcompile.ir import Program
from qcompile.sites import COVERS

_OUTSIDE = "keep them outside of the compiled model: GPUs have no float kernels here"


def coverage_rows(program: Program, kernels: Mapping[str, str]) -> tuple[CoverageRow, ...]:
    """The ledger, with the kernel that computes each operator (several share one where they are fused)."""
    computes = {
        covered: kernels[n.name] for n in program.graph.nodes for covered in n.meta.get(COVERS, ()) if n.name in kernels
    }
    return tuple(
        CoverageRow(r.op, r.node, r.kind, computes.get(r.node, r.kernel), r.reason, r.where)
        for r in program.ledger.rows
    )


def refuse_float(program: Program, runs: bool = True) -> None:
    """Raise StrictError when the ledger has a float operator; names the first ones and the reasons.

    `runs`: whether the target has kernels for it at all.
    """
    left = [row for row in program.ledger.rows if row.kind == "float"]
    if left:
        shown = "; ".join(f"{row.where or row.node} ({row.op}): {row.reason}" for row in left[:5])
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        raise StrictError(
            f"{len(left)} operators would stay float",
            where=shown + more,
            remedy="replace them, or " + ("compile with strict=False: they then run in float32" if runs else _OUTSIDE),
        )
