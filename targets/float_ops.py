"""Operators that stay float: lowered one by one by TVM's own PyTorch frontend, into the same function.

They are correct, not tuned, and not bit-exact between machines (sums may be taken in another order);
the ledger names each of them with the reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from tvm import relax
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from qcompile.errors import BuildError
from qcompile.ir import constant, is_tensor, source, where

if TYPE_CHECKING:
    from qcompile.targets.lower import Lowering


class FloatOps:
    """Translates float nodes; holds the frontend's view of the values lowered so far."""

    def __init__(self, low: Lowering) -> None:
        self.low = low
        self.importer = ExportedProgramImporter()
        self.importer.block_builder = low.builder

    def emit(self, node: fx.Node) -> Any:
        """The Relax value of `node`: an expression, or a tuple of them.

        Raises:
            BuildError: the frontend does not know the operator, or gives another shape.
        """
        env = self.importer.env
        for operand in node.all_input_nodes:
            if operand not in env:
                env[operand] = self._operand(operand)
        convert = self.importer.convert_map.get(node.target.__name__)  # type: ignore[union-attr]
        if convert is None:
            raise self._error(node, "TVM has no float implementation of it")
        try:
            env[node] = convert(node)
        except Exception as error:  # the frontend raises whatever it meets
            raise self._error(node, f"TVM's frontend refused it: {error}") from error
        if is_tensor(node):
            self._check_shape(node, env[node])
        return env[node]

    def _operand(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            value = constant(self.low.program.graph_module, node)
            return relax.const(value.contiguous().numpy(), str(value.dtype).removeprefix("torch."))
        if isinstance(node.meta.get("val"), (torch.SymInt, int)):
            return self.low.dim(node.meta["val"], node)
        return self.low.values[node].expr

    def _check_shape(self, node: fx.Node, expr: Any) -> None:
        shape = expr.ty.shape
        got = [d.value if hasattr(d, "value") else None for d in shape] if shape is not None else []
        want = self.low.shape(node)
        static = [(g, w) for g, w in zip(got, want, strict=False) if g is not None and isinstance(w, int)]
        if len(got) != len(want) or any(g != w for g, w in static):
            raise self._error(node, f"TVM's frontend gives the shape {got} instead of {list(want)}")

    def _error(self, node: fx.Node, what: str) -> BuildError:
        return BuildError(
            f"{node.target} stays float, but cannot be compiled: {what}",
            where=where(node) or node.name,
            source=source(node),
            remedy="write it with other operators, or move it out of the compiled model",
        )
