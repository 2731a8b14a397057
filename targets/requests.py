"""What cannot be asked of a GPU, found before any work."""

from __future__ import annotations

import torch

from qcompile.errors import BuildError, ConfigError
from qcompile.executable import refuse_threads
from qcompile.ir import Program, is_tensor, source, where
from qcompile.sites import COVERS
from qcompile.targets.base import Target
from qcompile.targets.nvidia import Gpu
from qcompile.targets.plan import is_int8

ONLY_MOVES = "it moves floats, and no integer operator reads them"


def check(
    target: Target,
    *,
    threads: int | None = None,
    numerics: str = "int8",
    max_accuracy_drop: float | None = None,
) -> None:
    """Refuse arguments of `compile` that have no meaning for `target`, where that is a GPU.

    Raises:
        ConfigError: names the argument.
    """
    if not isinstance(target.isa, Gpu):
        return
    refuse_threads(threads, target.name)
    if numerics != "int8" or max_accuracy_drop is not None:
        name, value = ("numerics", numerics) if numerics != "int8" else ("max_accuracy_drop", max_accuracy_drop)
        raise ConfigError(
            f"{name} is {value!r}, and {target.name} has kernels for int8 alone: nothing can stay float there",
            where=name,
            remedy=f"leave {name} out, or compile for a processor",
        )


def refuse_float(program: Program, target: Target) -> None:
    """Raise BuildError for the first operator that stays float, with the reason, where `target` is a GPU."""
    if not isinstance(target.isa, Gpu):
        return
    for node in program.graph.nodes:
        integer = is_int8(node) or node.target is torch.ops.qcompile.dequantize.default
        if node.op != "call_function" or not is_tensor(node) or integer:
            continue
        covered = {node.name, *node.meta.get(COVERS, ())}
        rows = [row for row in program.ledger.rows if row.node in covered]
        reasons = [*(row.reason for row in rows if row.reason), ONLY_MOVES]
        raise BuildError(
            f"{rows[0].op if rows else node.target} stays float, and {target.name} has kernels for integers alone: "
            f"{reasons[0]}",
            where=where(node) or node.name,
            source=source(node),
            remedy="replace it, or keep it outside of the compiled model; the targets of processors have float kernels",
        )
