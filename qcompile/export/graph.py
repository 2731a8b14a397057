"""A whole ONNX model, from a program: inputs, one writer per node, outputs."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, ValueInfoProto, checker, helper
from torch import fx

from qcompile import __version__, ops
from qcompile.export.floats import FLOATS, dtype_of, name_of
from qcompile.export.moves import MOVES
from qcompile.export.products import PRODUCTS
from qcompile.export.rows import ROWS
from qcompile.export.writer import Activations, Name, Writer
from qcompile.ir import Program, shape_of

OPSET, IR_VERSION = 17, 8
_OTHERWISE = "write it with other operators, or export the part of the model without it"
_STATIC = "quantize it with activations='static' to export it"
_REMEDIES = {f"qcompile.{name}.default": _STATIC for name in ("linear_dynamic", "linear_weight_only")}
_SIZES = {operator.mul: "Mul", operator.add: "Add", operator.sub: "Sub", operator.floordiv: "Div"}


def write(program: Program, activations: Activations) -> ModelProto:
    """The ONNX model of an integer program.

    Raises:
        ExportError: an operator has no counterpart.
    """
    writer = Writer(program, activations)
    for spec, node in zip(program.inputs, program.placeholders(), strict=True):
        writer.values[node] = spec.name
    for node in program.graph.nodes:
        if node.op == "call_function":
            writer.values[node] = _write(writer, node)
    for name, node in zip(writer.outputs, program.outputs(), strict=True):
        writer.nodes.append(helper.make_node("Identity", [writer.stored(node)], [name]))
    symbols = _symbols(program)
    inputs = [_info(s.name, n, symbols) for s, n in zip(program.inputs, program.placeholders(), strict=True)]
    outputs = [_info(name, n, symbols) for name, n in zip(writer.outputs, program.outputs(), strict=True)]
    model = helper.make_model(
        helper.make_graph(writer.nodes, "qcompile", inputs, outputs, writer.constants),
        producer_name="qcompile",
        producer_version=__version__,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    checker.check_model(model, full_check=True)
    return model


def _write(w: Writer, node: fx.Node) -> Name:
    """Write one node; returns the tensor with its value."""
    if getattr(node.target, "namespace", "") == "qcompile":
        name = str(node.target).removeprefix("qcompile.").removesuffix(".default")
        how = ROWS.get(name) or PRODUCTS.get(name)
    elif node.target is torch.ops.aten.sym_size.int:
        return _size_of(w, node)
    elif node.target is operator.getitem and node.args[1] == 0:
        return w.stored(node.args[0])  # type: ignore[arg-type]
    elif node.target in _SIZES:
        return w.op(_SIZES[node.target], *(w.size(value, node) for value in node.args), at=node, name=node.name)
    else:
        row = ops.find(node)
        how = MOVES.get(row.name) if row is not None and row.schema is None else FLOATS.get(name_of(node))
    if how is None:
        raise w.error(
            node,
            f"{node.target} has no counterpart in the ONNX export",
            _REMEDIES.get(str(node.target), _OTHERWISE),
        )
    return how(w, node)


def _size_of(w: Writer, node: fx.Node) -> Name:
    x: Any = node.args[0]
    dim: Any = node.args[1]
    index = w.constant([dim % len(shape_of(x))], f"{node.name}_dim", np.int64)
    return w.op("Gather", w.op("Shape", w.stored(x), at=node), index, at=node, name=node.name, axis=0)


def _info(name: Name, node: fx.Node, symbols: dict[str, str]) -> ValueInfoProto:
    """What the model says of an input or output: its type and shape."""
    shape = [size if isinstance(size, int) else symbols.get(str(size), str(size)) for size in shape_of(node)]
    return helper.make_tensor_value_info(name, dtype_of(node.meta["val"]), shape)


def _symbols(program: Program) -> dict[str, str]:
    """The graph's symbols -> the names of the dimensions."""
    found = {}
    for spec, node in zip(program.inputs, program.placeholders(), strict=True):
        for size, symbol in zip(spec.shape, shape_of(node), strict=True):
            if not isinstance(size, int):
                found[str(symbol)] = size[0]
    return found
