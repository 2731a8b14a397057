"""Lowering of real activations that have a layout of their own: how consumers get at them, and how they are made."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import fx
from tvm import relax

from qcompile.targets.cpu.copy import moved
from qcompile.targets.function import Kernel
from qcompile.targets.layout import NO_HALO, Layout, align, dense, innermost
from qcompile.targets.real_plan import Halo

if TYPE_CHECKING:
    from qcompile.targets.lowering import Lowering, Value


def layout_of(low: Lowering, node: fx.Node) -> Layout:
    """Of a real value; one without a planned layout is in logical order."""
    return low.values[node].layout or dense(low.shape(node))


def use_real(
    low: Lowering, node: fx.Node, channels_last: bool, halo: Halo, dtype: str | None, pitch: int | None = None
) -> Value:
    """The value of `node` in a layout of the asked kind with at least this `halo`, its channels allocated in multiples
    of `pitch` (None: whole vectors), and stored as `dtype` (None: in any way), copied where it is otherwise."""
    value, layout, pitch = low.values[node], layout_of(low, node), pitch or low.target.isa.lanes
    channels_last = channels_last and len(layout.shape) > 2
    kind = layout.channels_last == channels_last and (channels_last or layout.halo == NO_HALO)
    margin = all(a >= b for a, b in zip(layout.halo, halo, strict=True))
    if kind and margin and layout.pitch % pitch == 0 and dtype in (None, value.dtype):
        return replace(value, layout=layout)
    wanted = Layout(layout.shape, channels_last, align(innermost(layout.shape, channels_last), pitch), halo)
    return _moved(low, node, wanted, dtype or value.dtype)


def real_tensor(low: Lowering, node: fx.Node) -> relax.Expr:
    """The value of `node` as float operators take it: in logical order and shape."""
    if low.values[node].layout is None:
        return low.values[node].expr
    return low.shaped(_moved(low, node, dense(low.shape(node)), "float32").expr, low.shape(node))


def define_real(low: Lowering, node: fx.Node, kernel: Kernel, inputs: list[Value]) -> None:
    """`node` is computed by `kernel`, into its planned layout."""
    low.names[node.name] = kernel.name
    planned = low.planned_real[node]
    low.values[node] = low.call(node, kernel, inputs, planned.layout, planned.dtype)


def _moved(low: Lowering, node: fx.Node, layout: Layout, dtype: str) -> Value:
    """The real value of `node` in `layout` and stored as `dtype`, made once."""
    key = (node, layout, dtype)
    if key not in low.copies:
        value = low.values[node]
        kernel = moved(layout_of(low, node), layout, (value.dtype, dtype), low.symbol_args)
        low.copies[key] = low.call(node, kernel, [value], layout, dtype)
    return low.copies[key]
