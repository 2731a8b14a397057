"""Writer: the ONNX graph that grows node by node, and the values in it."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, fx

from qcompile.arith import QMAX, QMIN
from qcompile.errors import ExportError
from qcompile.ir import QPARAMS, Program, QParams, constant, is_constant, source, where

Activations = Literal["int8", "uint8"]
Name = str
"""Of a tensor in the ONNX graph."""


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by their names in the operator's schema, defaults filled in."""
    operator: Any = node.target
    schema = operator._schema.arguments
    given = {a.name: value for a, value in zip(schema, node.args, strict=False)}
    return {a.name: given.get(a.name, node.kwargs.get(a.name, a.default_value)) for a in schema}


class Writer:
    """The nodes and constants written so far.

    Attributes:
        program: the integer program.
        activations: the type that they have in ONNX; `offset`: what is added to an int8 value to get it.
        values: fx node -> the ONNX tensor that holds its value: int8, float or an index. A size is a tensor (1,).
        outputs: the names of the model's outputs.
    """

    def __init__(self, program: Program, activations: Activations = "int8") -> None:
        self.program, self.activations = program, activations
        self.offset = 128 if activations == "uint8" else 0
        self.values: dict[fx.Node, Name] = {}
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []
        self.outputs = [f"output{i}" for i in range(len(program.outputs()))]
        self._taken = {*self.outputs, *(spec.name for spec in program.inputs)}

    def fresh(self, base: str) -> Name:
        name, i = base, 0
        while name in self._taken:
            i += 1
            name = f"{base}_{i}"
        self._taken.add(name)
        return name

    def op(self, kind: str, *inputs: Name, at: fx.Node, name: str | None = None, **attributes: Any) -> Name:
        """One ONNX node; returns its output, named after the fx node `at`."""
        output = self.fresh(name or f"{at.name}_{kind}")
        path = where(at).replace(".", "/") or at.name
        self.nodes.append(helper.make_node(kind, list(inputs), [output], self.fresh(f"{path}/{kind}"), **attributes))
        return output

    def constant(self, value: Any, name: str, dtype: Any = None) -> Name:
        array = value.contiguous().numpy() if isinstance(value, Tensor) else np.asarray(value)
        taken = self.fresh(name)
        self.constants.append(numpy_helper.from_array(np.asarray(array, dtype), taken))
        return taken

    def error(self, node: fx.Node, what: str, remedy: str | None = None) -> ExportError:
        return ExportError(
            what,
            where=where(node) or node.name,
            source=source(node),
            remedy=remedy or "change this part of the model, or keep it out of what is exported",
        )

    # --- values -----------------------------------------------------------------------------------

    def stored(self, node: fx.Node) -> Name:
        """The value of `node` in the type that it has in the program."""
        if node not in self.values and is_constant(node):
            self.values[node] = self.constant(self.tensor(node), str(node.target))
        return self.values[node]

    def tensor(self, node: fx.Node) -> Tensor:
        """What a constant node holds."""
        return constant(self.program.graph_module, node)

    def qparams(self, node: fx.Node) -> QParams:
        found = node.meta.get(QPARAMS)
        if not isinstance(found, QParams):
            raise self.error(
                node,
                f"the scale of {node.name} is not known",
                "a pass that makes int8 nodes must set node.meta[qcompile.ir.QPARAMS]",
            )
        return found

    def real(self, node: fx.Node) -> Name:
        """The real values of `node`: of an int8 tensor, through a DequantizeLinear of its own."""
        if node.meta["val"].dtype is not torch.int8 or is_constant(node):
            return self.stored(node)
        return self.op("DequantizeLinear", self.stored(node), *self._numbers(node, self.qparams(node)), at=node)

    def quantized(self, real: Name, node: fx.Node) -> Name:
        """`real` as the int8 value of `node`."""
        return self.op("QuantizeLinear", real, *self._numbers(node, self.qparams(node)), at=node, name=node.name)

    def _numbers(self, node: fx.Node, p: QParams) -> tuple[Name, Name]:
        scale = self.constant(p.scale, f"{node.name}_scale", np.float32)
        return scale, self.levels(p.zero_point, f"{node.name}_zero_point")

    def levels(self, q: Any, name: str) -> Name:
        """int8 values of activations as a constant, in the type that activations are written in."""
        return self.constant(np.asarray(q, np.int32) + self.offset, name, self.activations)

    def scaled(self, real: Name, factor: float, node: fx.Node) -> Name:
        """`real` times a factor; itself where that is 1 but for rounding."""
        if abs(factor - 1) < 1e-5:
            return real
        return self.op("Mul", real, self.constant(factor, f"{node.name}_factor", np.float32), at=node)

    def clipped(self, real: Name, lo: int, hi: int, node: fx.Node) -> Name:
        """`real` between what the int8 values `lo` and `hi` stand for; quantization itself clips at -128 and 127."""
        p = self.qparams(node)
        if lo <= QMIN and hi >= QMAX:
            return real
        if lo == p.zero_point and hi >= QMAX:
            return self.op("Relu", real, at=node)
        bounds = [
            self.constant((bound - p.zero_point) * p.scale, f"{node.name}_{side}", np.float32)
            for side, bound in (("min", lo), ("max", hi))
        ]
        return self.op("Clip", real, *bounds, at=node)

    # --- sizes ------------------------------------------------------------------------------------

    def size(self, value: Any, node: fx.Node) -> Name:
        """A size as an int64 tensor (1,)."""
        if isinstance(value, fx.Node):
            return self.values[value]
        return self.constant([int(value)], f"{node.name}_size", np.int64)

    def sizes(self, values: Any, node: fx.Node) -> Name:
        """Sizes as one int64 tensor; several may be known at run time only."""
        if all(isinstance(value, int) for value in values):
            return self.constant(list(values), f"{node.name}_sizes", np.int64)
        return self.op("Concat", *(self.size(value, node) for value in values), at=node, axis=0)
