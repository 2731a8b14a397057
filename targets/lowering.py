"""The state of one lowering, and what the emitters ask of it.

Every int8 activation is a flat Relax tensor; its layout says what it holds (`qcompile.targets.plan`).
Float tensors keep their logical shape. Constants stay outside the module: the entry point takes
them as one tuple, a tensor per element type, so that an artifact can map them without a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sympy
import torch
from torch import fx
from tvm import relax, tirx

from qcompile.errors import BuildError
from qcompile.ir import Program, constant, is_tensor, source, where
from qcompile.targets.base import Target
from qcompile.targets.constants import POOLS, Pool
from qcompile.targets.cpu.epilogue import Requantize
from qcompile.targets.cuda.launch import Entry
from qcompile.targets.filters import ConvShape, Filters
from qcompile.targets.function import Kernel
from qcompile.targets.generator import Generator
from qcompile.targets.kernels import Kernels, kernels_for
from qcompile.targets.layout import NO_HALO, Dim, Layout, align, dense, innermost, product, relabel
from qcompile.targets.plan import PITCH, Halo, Planned
from qcompile.targets.real_plan import PlannedReal
from qcompile.targets.take import Take, identity
from qcompile.targets.workload import Chosen, Workload

q = torch.ops.qcompile


@dataclass(frozen=True)
class Value:
    """A lowered value: an int8 activation with its layout, or a float tensor (layout None)."""

    expr: relax.Expr
    layout: Layout | None
    dtype: str
    fill: int = 0  # the int8 value in the halo


_FIXED_SHAPES = "compute with masks (torch.where) in place of selecting, so that every shape follows from the inputs'"


@dataclass
class Lowering:
    """The state of one lowering: what is shared by the emitters in `qcompile.targets.emitters`."""

    program: Program
    target: Target
    builder: relax.BlockBuilder = field(default_factory=relax.BlockBuilder)
    values: dict[fx.Node, Value] = field(default_factory=dict)
    pools: dict[str, Pool] = field(default_factory=lambda: {d: Pool(d) for d in POOLS})
    tables: dict[str, relax.Expr] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    calls: list[tuple[str, str]] = field(default_factory=list)
    symbols: dict[sympy.Symbol, tirx.Var] = field(default_factory=dict)
    shapes: dict[fx.Node, tuple[Dim, ...]] = field(default_factory=dict)
    planned: dict[fx.Node, Planned] = field(default_factory=dict)
    planned_real: dict[fx.Node, PlannedReal] = field(default_factory=dict)
    copies: dict[Any, Value] = field(default_factory=dict)
    chosen: Chosen = field(default_factory=dict)
    workloads: dict[tuple[str, str], Workload] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)

    @property
    def kernels(self) -> Kernels:
        """Those of the target's kind of processor."""
        return kernels_for(self.target.isa)

    # --- shapes -----------------------------------------------------------------------------------

    def dim(self, size: Any, node: fx.Node) -> Dim:
        """An int, or the TVM expression of a symbolic size."""
        if isinstance(size, int):
            return size
        return self._expression(size.node.expr, node)

    def _expression(self, expr: Any, node: fx.Node) -> Dim:
        if isinstance(expr, sympy.Integer):
            return int(expr)
        if isinstance(expr, sympy.Symbol):
            if expr not in self.symbols:
                raise self.error(node, "its shape depends on the values of a tensor", _FIXED_SHAPES)
            return self.symbols[expr]
        operator: Callable[[Any, Any], Any] | None = {
            "Add": lambda a, b: a + b,
            "Mul": lambda a, b: a * b,
            "FloorDiv": lambda a, b: a // b,
            "Mod": lambda a, b: a % b,
            "PythonMod": lambda a, b: a % b,
        }.get(type(expr).__name__)
        if operator is None:
            raise self.error(node, f"its shape has a dimension that cannot be lowered: {expr}")
        result, *rest = (self._expression(e, node) for e in expr.args)
        for other in rest:
            result = operator(result, other)
        return result

    @property
    def symbol_args(self) -> tuple[tirx.Var, ...]:
        return tuple(self.symbols.values())

    def shape(self, node: fx.Node) -> tuple[Dim, ...]:
        return self.shapes[node]

    def error(self, node: fx.Node, what: str, remedy: str | None = None) -> BuildError:
        return BuildError(
            f"{node.target} cannot be lowered for {self.target.name}: {what}",
            where=where(node) or node.name,
            source=source(node),
            remedy=remedy or "exclude the layer from quantization (QuantConfig(exclude=...)) so that it stays float",
        )

    # --- constants and calls ----------------------------------------------------------------------

    def tensor(self, node: fx.Node) -> np.ndarray:
        """The value of a constant argument."""
        return constant(self.program.graph_module, node).numpy()

    def call(self, node: fx.Node, kernel: Kernel, inputs: list[Value], layout: Layout | None, dtype: str) -> Value:
        """Call `kernel` on the flat buffers of `inputs`; the result has `layout`, or is dense float."""
        function = self.builder.add_func(kernel.func, kernel.name)
        self.calls.append((node.name, str(function.name_hint)))
        self.entries |= {entry.name: entry for entry, _ in kernel.launches}
        starts = [self.pools[str(c.dtype)].add(c) for c in kernel.constants]
        size = layout.size if layout else product(self.shape(node))
        args = [
            *[self.flat(v) for v in inputs],
            *[self.tables[dtype] for dtype in kernel.pools()],
            *[relax.prim_value(start) for start in starts],
            *self.symbol_args,
        ]
        outputs = [relax.TensorType((size,), dtype)]
        if not kernel.scratch:
            return Value(self.builder.emit(relax.call_tir(function, relax.Tuple(args), outputs[0])), layout, dtype)
        outputs.append(relax.TensorType((kernel.scratch,), "int32"))
        results = self.builder.emit(relax.call_tir(function, relax.Tuple(args), outputs))
        return Value(self.builder.emit(relax.TupleGetItem(results, 0)), layout, dtype)

    def real(self, expr: relax.Expr, dtype: str) -> Value:
        """A tensor that is not quantized."""
        return Value(expr, None, dtype)

    def flat(self, value: Value) -> relax.Expr:
        dims = tuple(value.expr.ty.shape)
        return value.expr if len(dims) == 1 else self.shaped(value.expr, (product(dims),))

    def shaped(self, expr: relax.Expr, shape: tuple[Dim, ...]) -> relax.Expr:
        """The same buffer under another shape."""
        ty = relax.TensorType(shape, expr.ty.dtype)
        call = relax.call_pure_packed("vm.builtin.reshape", expr, relax.ShapeExpr(shape), ty_args=ty)
        return self.builder.emit(call)

    def arguments(self) -> tuple[list[relax.Var], relax.Var]:
        """Parameters of a function of the network: its inputs, and the constants."""
        inputs = [
            relax.Var(n.name, relax.TensorType(self.shape(n), str(n.meta["val"].dtype).removeprefix("torch.")))
            for n in self.program.placeholders()
        ]
        sizes = {dtype: tirx.Var(size_of(dtype), "int64") for dtype in POOLS}
        pools = [relax.TensorType((size,), dtype) for dtype, size in sizes.items()]
        return inputs, relax.Var("constants", relax.TupleType(pools))

    # --- what the emitters ask ---------------------------------------------------------------------

    def layout(self, node: fx.Node) -> Layout:
        return self.planned[node].layout

    def fill(self, node: fx.Node) -> int:
        return self.planned[node].fill

    def use(
        self,
        node: fx.Node,
        channels_last: bool,
        halo: Halo = NO_HALO,
        fill: int = 0,
        pitch: int = PITCH,
        tight: bool = False,
    ) -> Value:
        """The value of `node` in a layout of the asked kind, copied when it is in another.

        `halo` is the margin that must hold `fill`; `pitch` what the allocated channels must be a multiple of,
        unless it is `tight` and none are allocated beyond the logical ones.
        """
        value = self.values[node]
        layout = self._layout(value)
        channels_last = channels_last and len(layout.shape) > 2
        kind = layout.channels_last == channels_last or len(layout.shape) < 2
        roomy = layout.pitch % pitch == 0 and layout.pitch >= layout.channels
        roomy = roomy or (tight and layout.pitch == layout.channels)
        margin = all(a >= b for a, b in zip(layout.halo, halo, strict=True))
        if kind and roomy and margin and (halo == NO_HALO or value.fill == fill):
            return value
        target = Layout(layout.shape, channels_last, align(innermost(layout.shape, channels_last), PITCH), halo)
        return self.copy(node, value, target, fill)

    def dense(self, node: fx.Node) -> Value:
        """The value of `node` in row-major logical order."""
        value = self.values[node]
        layout = self._layout(value)
        flat = relabel(layout, layout.shape)
        if flat is not None and flat.pitch == dense(layout.shape).pitch:
            return Value(value.expr, dense(layout.shape), value.dtype)
        return self.copy(node, value, dense(layout.shape), 0)

    def _layout(self, value: Value) -> Layout:
        assert value.layout is not None
        return value.layout

    def copy(self, node: fx.Node, value: Value, layout: Layout, fill: int, dtype: str | None = None) -> Value:
        """`value` (of `node`) in `layout`, made once; extents of one are repeated to fit its shape."""
        isa = self.target.isa
        dtype = dtype or isa.storage
        before = self._layout(value)
        if (before, value.dtype) == (layout, dtype) and layout.halo == NO_HALO:
            return value
        key = (node, layout, fill, dtype)
        if key not in self.copies:
            take = identity(before.shape, layout.shape)
            kernel = self.kernels.gather(before, layout, take, (value.dtype, dtype), fill, isa, self.symbol_args)
            result = self.call(node, kernel, [value], layout, dtype)
            self.copies[key] = Value(result.expr, layout, dtype, fill)
        return self.copies[key]

    def gather(
        self,
        node: fx.Node,
        x: fx.Node,
        take: tuple[Take, ...],
        place: tuple[int, ...] | None = None,
        fill_value: int | None = None,
    ) -> None:
        """Define `node` as y[place + index] = x[take(index)] (see `qcompile.targets.cpu.copy.gather`)."""
        value, isa = self.values[x], self.target.isa
        kernel = self.kernels.gather(
            self._layout(value),
            self.layout(node),
            take,
            (isa.storage, isa.storage),
            self.fill(node),
            isa,
            self.symbol_args,
            place,
            fill_value,
        )
        self.define(node, kernel, [value])

    def define(self, node: fx.Node, kernel: Kernel, inputs: list[Value]) -> None:
        """`node` is computed by `kernel`, into its planned layout."""
        self.names[node.name] = kernel.name
        layout = self.layout(node)
        result = self.call(node, kernel, inputs, layout, self.target.isa.storage)
        self.values[node] = Value(result.expr, layout, result.dtype, self.fill(node))

    def define_real(self, node: fx.Node, kernel: Kernel, inputs: list[Value]) -> None:
        """`node` is a dense float tensor that `kernel` computes."""
        self.names[node.name] = kernel.name
        flat = self.call(node, kernel, inputs, None, "float32")
        self.values[node] = Value(self.shaped(flat.expr, self.shape(node)), None, "float32")

    def define_tuned(
        self,
        node: fx.Node,
        generator: Generator,
        shape: ConvShape,
        filters: Filters,
        numbers: Requantize,
        inputs: list[Value],
    ) -> None:
        """`node` is computed by a kernel of `generator`, with the config that is known to be best."""
        workload = Workload(node, generator, shape, filters, numbers, self.target.isa, self.symbol_args)
        self.workloads.setdefault(workload.key, workload)
        self.define(node, workload.kernel(workload.chosen(self.chosen)), inputs)

    def define_view(self, node: fx.Node, x: fx.Node) -> None:
        """`node` is `x` under another shape: the same bytes where the layouts allow it."""
        self.names[node.name] = "view"
        value, shape = self.values[x], self.shape(node)
        layout = relabel(self._layout(value), shape)
        if layout is None:
            value = self.dense(x)
            layout = dense(shape)
        self.values[node] = Value(value.expr, layout, value.dtype)

    def define_float(self, node: fx.Node, expr: Any) -> None:
        """`node` is computed in float by `expr`."""
        self.names[node.name] = "float"
        if is_tensor(node):
            self.values[node] = Value(expr, None, str(node.meta["val"].dtype).removeprefix("torch."))


def size_of(dtype: str) -> str:
    """What the number of constants of one type is called until it is known."""
    return f"{dtype}_constants"
