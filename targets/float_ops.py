"""Operators that stay float: lowered one by one, into the same function.

Each takes the first way that works: a conversion of our own (`float_kernels`), TVM's PyTorch frontend, or
PyTorch's decomposition into simpler operators, which take these ways in turn. They are correct, not tuned, and
not bit-exact between machines (sums may be taken in another order); the ledger names each of them with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND, elementwise_dtypes
from tvm import relax
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from qcompile.errors import BuildError
from qcompile.ir import constant, is_tensor, source, where
from qcompile.targets.decompose import decomposed
from qcompile.targets.decompositions import OWN
from qcompile.targets.float_kernels import CONVERSIONS, argument, dtype_of
from qcompile.targets.function import Kernel
from qcompile.targets.real_lower import real_tensor

if TYPE_CHECKING:
    from qcompile.targets.lowering import Lowering

aten = torch.ops.aten


def _odd_scale(node: fx.Node) -> bool:
    """Whether an image grows by a factor that gives no whole number of pixels: TVM does not know the factor."""
    factors = argument(node, "scale_factors") or ()
    return any(factor != int(factor) for factor in factors)


def _scaled_or_grouped(node: fx.Node) -> bool:
    return argument(node, "scale") is not None or bool(argument(node, "enable_gqa"))


def _always(node: fx.Node) -> bool:
    return True


# What TVM's frontend converts to something else than PyTorch means, and where.
WRONG: dict[Any, Callable[[fx.Node], bool]] = {
    aten.upsample_nearest2d.vec: _always,  # other pixels, where a size is no multiple
    aten.upsample_bilinear2d.vec: _odd_scale,
    aten.upsample_bicubic2d.vec: _odd_scale,
    aten._upsample_bilinear2d_aa.default: _always,  # it does not smooth
    aten.pixel_shuffle.default: _always,  # an operator that TVM cannot lower
    aten.scaled_dot_product_attention.default: _scaled_or_grouped,
}


class FloatOps:
    """Translates float nodes; holds the frontend's view of the values lowered so far."""

    def __init__(self, low: Lowering) -> None:
        self.low = low
        self.importer = ExportedProgramImporter()
        self.importer.block_builder = low.builder

    def emit(self, node: fx.Node) -> Any:
        """The Relax value of `node`: an expression, or a tuple of them.

        Raises:
            BuildError: there is no way to compute it; names the operator and its place.
        """
        try:
            return self._convert(node, self.low.program.graph_module)
        except _NoWay as error:
            raise BuildError(
                f"{node.target} stays float, but cannot be compiled: {error}",
                where=where(node) or node.name,
                source=source(node),
                remedy="write it with other operators, or move it out of the compiled model",
            ) from error

    def takes(self, target: Any) -> bool:
        """Whether there is a conversion of an operator as it is."""
        known = target.__name__ in self.importer.convert_map and target not in OWN
        return target in CONVERSIONS or (known and WRONG.get(target) is not _always)

    def value(self, node: fx.Node) -> Any:
        """The Relax value of an operand."""
        return self.importer.env[node]

    def constant(self, node: fx.Node) -> Tensor:
        """The tensor of a constant operand."""
        return constant(node.graph.owning_module or self.low.program.graph_module, node)

    def call(self, node: fx.Node, kernel: Kernel, x: fx.Node, dtype: str) -> relax.Expr:
        """Call a generated kernel on `x`; its result has the shape of `x`."""
        expr = self.low.call(x, kernel, [self.low.real(self.value(x), dtype_of(x))], None, dtype).expr
        return self.low.shaped(expr, self.low.shape(x))

    def _convert(self, node: fx.Node, owner: fx.GraphModule) -> Any:
        for operand in node.all_input_nodes:
            if operand not in self.importer.env:
                self.importer.env[operand] = self._operand(operand, owner)
        if self.takes(node.target) and not WRONG.get(node.target, lambda n: False)(node):
            try:
                return self._define(node, self._directly(node))
            except Exception as error:  # noqa: BLE001  the frontend raises whatever it meets
                reason = f"TVM's frontend refused it: {error}"
        else:
            reason = "TVM has no float implementation of it"
        try:
            simpler = decomposed(node, self.takes) if isinstance(node.target, torch._ops.OpOverload) else None
        except Exception as error:  # PyTorch raises whatever it meets
            raise _NoWay(f"{reason}, and PyTorch cannot take it apart: {error}") from error
        if simpler is None:
            raise _NoWay(reason)
        return self._define(node, self._inline(node, simpler))

    def _directly(self, node: fx.Node) -> Any:
        if node.target in CONVERSIONS:
            return CONVERSIONS[node.target](self, node)
        with self._promoted(node):
            return self.importer.convert_map[node.target.__name__](node)  # type: ignore[union-attr]

    def _inline(self, node: fx.Node, simpler: fx.GraphModule) -> Any:
        """The values that the graph of `simpler` computes from the operands of `node`."""
        env, operands = self.importer.env, iter(node.all_input_nodes)
        for inner in simpler.graph.nodes:
            value = inner.meta.get("val")
            if isinstance(value, Tensor):
                self.low.shapes[inner] = tuple(self.low.dim(size, inner) for size in value.shape)
            if inner.op == "placeholder":
                env[inner] = env[next(operands)]
            elif inner.op == "output":
                result = fx.node.map_arg(inner.args[0], env.__getitem__)
                return list(result) if isinstance(result, (tuple, list)) else result
            elif isinstance(value, (torch.SymInt, int)) or inner.op == "get_attr":
                env[inner] = self._operand(inner, simpler)
            else:
                self._convert_part(inner, simpler)
        raise AssertionError("a graph without an output")

    def _convert_part(self, node: fx.Node, owner: fx.GraphModule) -> None:
        try:
            self._convert(node, owner)
        except _NoWay as error:
            raise _NoWay(f"it takes {node.target}, and {error}") from error

    def _operand(self, node: fx.Node, owner: fx.GraphModule) -> Any:
        if node.op == "get_attr":
            value = constant(owner, node)
            return relax.const(value.contiguous().numpy(), str(value.dtype).removeprefix("torch."))
        if isinstance(node.meta.get("val"), (torch.SymInt, int)):
            return self.low.dim(node.meta["val"], node)
        return real_tensor(self.low, node)

    @contextmanager
    def _promoted(self, node: fx.Node) -> Iterator[None]:
        """Within, the operands of an elementwise operator have the type that it computes in: PyTorch promotes
        them, the frontend does not."""
        operands = {n for n in node.all_input_nodes if is_tensor(n)}
        if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.pointwise not in node.target.tags:
            yield
            return
        conditions = {a for a, s in zip(node.args, node.target._schema.arguments, strict=False) if _is_condition(s)}
        operands = {n for n in operands if n not in conditions}
        computes = _computation_type(node, operands)
        kept = {n: self.importer.env[n] for n in operands if n.meta["val"].dtype is not computes}
        try:
            for n, expr in kept.items():
                self.importer.env[n] = self.low.builder.emit(relax.op.astype(expr, _name(computes)))
            yield
        finally:
            self.importer.env.update(kept)

    def _define(self, node: fx.Node, expr: Any) -> Any:
        """`node` is computed by `expr`, which must have its shapes and types."""
        self.importer.env[node] = expr
        values = node.meta.get("val")
        if isinstance(values, Tensor):
            self._check(node, values, expr)
        elif isinstance(values, (tuple, list)) and isinstance(expr, (tuple, list)):
            for value, part in zip(values, expr, strict=True):
                if isinstance(value, Tensor):
                    self._check(node, value, part)
        return expr

    def _check(self, node: fx.Node, value: Tensor, expr: Any) -> None:
        got = [d.value if hasattr(d, "value") else None for d in expr.ty.shape] if expr.ty.shape is not None else []
        want = [self.low.dim(size, node) for size in value.shape]
        static = [(g, w) for g, w in zip(got, want, strict=False) if g is not None and isinstance(w, int)]
        if len(got) != len(want) or any(g != w for g, w in static):
            raise _NoWay(f"TVM's frontend gives the shape {got} instead of {want}")
        if str(expr.ty.dtype) != _name(value.dtype):
            raise _NoWay(f"TVM's frontend gives {expr.ty.dtype} instead of {_name(value.dtype)}")


class _NoWay(Exception):
    """An operator cannot be lowered in any way; says why."""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_condition(argument: Any) -> bool:
    return argument.name in ("condition", "mask")


def _computation_type(node: fx.Node, operands: set[fx.Node]) -> torch.dtype:
    """What an elementwise operator computes in, by PyTorch's rules: of comparisons, not the result's type."""
    result = node.meta["val"].dtype
    if result is not torch.bool:
        return result
    values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in node.args if a in operands or _is_number(a)]
    return elementwise_dtypes(*values, type_promotion_kind=ELEMENTWISE_TYPE_PROMOTION_KIND.DEFAULT)[0]


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float))
