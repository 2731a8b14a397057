"""Integer graph -> Relax module: one generated kernel per operator, called in graph order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tvm
from torch import fx
from tvm import relax, tirx

from qcompile.ir import Program, is_tensor
from qcompile.ops.real import OPS
from qcompile.targets.base import Target
from qcompile.targets.constants import ALIGNMENT, POOLS
from qcompile.targets.cuda.launch import Entry
from qcompile.targets.float_ops import FloatOps
from qcompile.targets.layout import dense
from qcompile.targets.lowering import Lowering, Value, size_of
from qcompile.targets.nvidia import Gpu
from qcompile.targets.parts import PART, call_parts, part_of
from qcompile.targets.plan import is_int8, plan
from qcompile.targets.real_lower import real_tensor
from qcompile.targets.real_plan import plan_real
from qcompile.targets.requests import refuse_float
from qcompile.targets.workload import Chosen, Workload

q = torch.ops.qcompile
GIVES_FLOATS = frozenset({q.dequantize.default, q.linear_dynamic.default, q.linear_weight_only.default, *OPS})


@dataclass
class Lowered:
    """What `build` needs: the module, its constants in order, and which kernel computes which node.

    `calls`: (node, function of the module) of every kernel call, in order; a node may need several.
    `workloads`: the kernels that can be tuned, layers of one shape once. `entries`: of the device code that they call,
    on a GPU. `alignments`: of each input in bytes, as the kernels of a CPU that read it ask for.
    """

    module: tvm.IRModule
    constants: dict[str, np.ndarray]
    kernels: dict[str, str]
    calls: list[tuple[str, str]]
    workloads: list[Workload]
    entries: list[Entry]
    alignments: tuple[int, ...]


def lower(
    program: Program,
    target: Target,
    emitters: dict[Any, Callable[[Lowering, fx.Node], None]],
    chosen: Chosen | None = None,
) -> Lowered:
    """Lower an integer program with the emitters of the target's processor; `chosen`: what tuning found.

    Raises:
        BuildError: an operator or a shape that cannot be lowered; names the place.
    """
    low = Lowering(program, target, chosen=chosen or {})
    refuse_float(program, target)
    for node in program.placeholders():
        for size in node.meta["val"].shape:
            if not isinstance(size, int):
                low.symbols.setdefault(size.node.expr, tirx.Var(str(size.node.expr), "int64"))
    for node in program.graph.nodes:
        if is_tensor(node):
            low.shapes[node] = tuple(low.dim(s, node) for s in node.meta["val"].shape)
    # The caches of a GPU hold a batch, and many small launches would cost more than they save.
    whole, part = low.shapes, None if isinstance(target.isa, Gpu) else part_of(program, low.shapes)
    if part is None:
        _network(low, emitters, "main")
    else:
        low.shapes = {node: shape if node.op == "get_attr" else (part, *shape[1:]) for node, shape in whole.items()}
        _network(low, emitters, PART)
        low.shapes = whole
        call_parts(low, part)
    constants = {dtype: low.pools[dtype].data() for dtype in POOLS}
    module = low.builder.get()
    for function in ("main",) if part is None else ("main", PART):
        module = relax.transform.BindSymbolicVars({size_of(d): constants[d].size for d in POOLS}, function)(module)
    alignments = () if isinstance(target.isa, Gpu) else tuple(_alignment(node) for node in program.placeholders())
    workloads, entries = list(low.workloads.values()), list(low.entries.values())
    return Lowered(module, constants, low.names, low.calls, workloads, entries, alignments)


def _alignment(node: fx.Node) -> int:
    """Of an input, in bytes: most kernels load whole vectors, and what quantizes takes elements wherever they lie."""
    users = {user.target for user in node.users}
    return int(node.meta["val"].dtype.itemsize) if users == {q.quantize.default} else ALIGNMENT


def _network(low: Lowering, emitters: dict[Any, Callable[[Lowering, fx.Node], None]], name: str) -> None:
    """The function `name`: the whole graph, for the shapes that `low` has."""
    program, target = low.program, low.target
    low.planned = plan(program.graph, low.shapes, whole_words=target.isa.whole_words)
    low.planned_real = plan_real(program.graph, low.shapes, target.isa.lanes)
    inputs, tables = low.arguments()
    float_ops = FloatOps(low)
    # What follows them is the same in every call, so that a graph of launches may refer to it.
    with low.builder.function(name, [*inputs, tables], {"num_input": len(inputs)}):
        with low.builder.dataflow():
            for i, dtype in enumerate(POOLS):
                low.tables[dtype] = low.builder.emit(relax.TupleGetItem(tables, i))
            for node, var in zip(program.placeholders(), inputs, strict=True):
                _input(low, node, var)
            for node in program.graph.nodes:
                if node.op != "call_function":
                    continue
                if node.target in emitters and (is_int8(node) or node.target in GIVES_FLOATS):
                    emitters[node.target](low, node)
                elif is_int8(node):
                    raise low.error(node, "no kernel for this operator")
                elif not isinstance(node.meta.get("val"), (torch.SymInt, int)):
                    low.define_float(node, float_ops.emit(node))
            outputs = [_output(low, n) for n in program.outputs()]
            result = low.builder.emit_output(outputs[0] if len(outputs) == 1 else relax.Tuple(outputs))
        low.builder.emit_func_output(result)


def _input(low: Lowering, node: fx.Node, var: relax.Var) -> None:
    dtype = str(var.ty.dtype)
    if dtype != "int8":
        low.values[node] = Value(var, None, dtype)
        return
    value = Value(low.flat(Value(var, None, dtype)), dense(low.shape(node)), dtype)
    planned = low.planned[node]
    low.values[node] = low.copy(node, value, planned.layout, planned.fill)


def _output(low: Lowering, node: fx.Node) -> relax.Expr:
    if node.op == "get_attr":  # a copy: the caller may write to it
        dtype = str(node.meta["val"].dtype).removeprefix("torch.")
        held = low.real(relax.const(low.tensor(node), dtype), dtype)
        return low.shaped(
            low.call(node, low.kernels.copied(low.shape(node), dtype), [held], None, dtype).expr, low.shape(node)
        )
    value = low.values[node]
    if node in low.planned_real:
        return real_tensor(low, node)
    if value.layout is None:
        return (
            value.expr if len(value.expr.ty.shape) == len(low.shape(node)) else low.shaped(value.expr, low.shape(node))
        )
    plain = low.copy(node, value, dense(low.shape(node)), 0, "int8")
    return low.shaped(plain.expr, low.shape(node))
