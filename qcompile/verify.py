"""What is legal at each stage, as data, and the verifier that the manager runs after every pass."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile import ops
from qcompile.arith import INT32_MAX, QMAX, QMIN, largest_accumulator
from qcompile.ir import Program, Stage, constant, is_constant
from qcompile.observers import Observer
from qcompile.qdq import NAMESPACE, is_dequantize


@dataclass(frozen=True)
class Legal:
    """What the nodes of one stage may be.

    Attributes:
        namespaces: operator libraries that only some stages have; every other one (aten, a user's
            own) is legal everywhere.
        observers: whether observer modules are.
    """

    namespaces: frozenset[str]
    observers: bool = False


LEGAL = {
    Stage.FLOAT: Legal(frozenset()),
    Stage.OBSERVED: Legal(frozenset(), observers=True),
    Stage.QDQ: Legal(frozenset({NAMESPACE})),
    Stage.INTEGER: Legal(frozenset({"qcompile"})),
}
_STAGED = frozenset().union(*(legal.namespaces for legal in LEGAL.values()))

_POSITIVE = ("scale", "inv_scale", "ratio")  # arguments of operators that quantize: numbers with a reciprocal
_ZERO_POINTS = {torch.uint8: (0, 255)}  # by the type of a node's values or operand; int8's otherwise

Interface = tuple[tuple[torch.dtype, tuple[int | None, ...]], ...]


class IllegalGraph(Exception):
    """A node is not legal; the manager turns it into a PassError that names the pass."""

    def __init__(self, reason: str, node: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.reason, self.node = reason, node


def interface(program: Program) -> Interface:
    """Type and shape of each output, None for a dynamic size: what no pass may change."""
    values = [n.meta["val"] for n in program.outputs()]
    return tuple(
        (v.dtype, tuple(size if isinstance(size, int) else None for size in v.shape))
        for v in values
        if isinstance(v, Tensor)
    )


def verify(program: Program) -> None:
    """Check every node against the program's stage.

    Raises:
        IllegalGraph: with the first node that is not legal, and why.
    """
    legal = LEGAL[program.stage]
    if len(program.placeholders()) != len(program.inputs):
        raise IllegalGraph(f"the graph has {len(program.placeholders())} inputs, not {len(program.inputs)}")
    for node in program.graph.nodes:
        reason = _objection(program, node, legal)
        if reason:
            raise IllegalGraph(f"{reason} (stage {program.stage.value})", node)


def _objection(program: Program, node: fx.Node, legal: Legal) -> str | None:
    if node.op in ("placeholder", "output"):
        return None
    if node.op == "get_attr":
        value = getattr(program.graph_module, str(node.target), None)
        if not isinstance(value, Tensor):
            return f"the constant {node.target} is not a tensor of the graph module"
        return f"the constant {node.target} holds NaN" if bool(torch.isnan(value).any()) else None
    if node.op == "call_module":
        module = program.graph_module.get_submodule(str(node.target))
        return None if legal.observers and isinstance(module, Observer) else f"a call of module {node.target}"
    if node.op != "call_function":
        return f"a {node.op} node"
    if not isinstance(node.target, torch._ops.OpOverload):
        return None if _is_scalar_code(node) else f"{node.target} is not an ATen operator"
    if node.target.namespace in _STAGED - legal.namespaces:
        return f"{node.target} belongs to another stage"
    if node.target.namespace in legal.namespaces:
        return _bad_quantization(node) or _bad_weights(program, node)
    return _mixes_int8(node) if program.stage is Stage.INTEGER else None


def _bad_quantization(node: fx.Node) -> str | None:
    """Scales are positive and finite, zero points are integers of the type, and dequantize undoes its quantize."""
    given = _given(node)
    low, high = _ZERO_POINTS.get(given.get("dtype"), (QMIN, QMAX))  # type: ignore[arg-type]
    for name, value in given.items():
        if name in _POSITIVE and isinstance(value, (int, float)) and not 0 < value < math.inf:
            return f"{name} is {value}, and must be positive and finite"
        if name.endswith("zero_point") and isinstance(value, int) and not low <= value <= high:
            return f"{name} is {value}, and must be from {low} to {high}"
    if is_dequantize(node) and node.args[1:] != (before := node.args[0].args[1:]):  # type: ignore[union-attr]
        return f"it takes {node.args[1:]}, and the quantize in front of it {before}"
    return None


def _bad_weights(program: Program, node: fx.Node) -> str | None:
    """Weights are from -127 to 127, and no int8 input takes their sum of products and the bias out of int32."""
    given = _given(node)
    weight, bias = (_constant(program, given.get(name)) for name in ("weight", "bias"))
    if weight is None or bias is None or weight.dtype is not torch.int8:
        return None
    if bool((weight < -QMAX).any()):
        return f"weight holds {QMIN}, and must be from {-QMAX} to {QMAX}"
    if "group_size" in given:  # its sums are float
        return None
    summed = bias if bias.dtype is torch.int32 else torch.zeros(len(weight))  # a float bias joins behind the sum
    largest = largest_accumulator(weight, summed, given.get("x_zero_point", 0))
    return f"an int32 accumulator could reach {largest}, more than {INT32_MAX}" if largest > INT32_MAX else None


def _given(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by name, without those left to their defaults."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    return {a.name: value for a, value in zip(schema.arguments, node.args, strict=False)} | node.kwargs


def _constant(program: Program, node: Any) -> Tensor | None:
    return constant(program.graph_module, node) if isinstance(node, fx.Node) and is_constant(node) else None


def _is_scalar_code(node: fx.Node) -> bool:
    """`getitem`, and arithmetic on sizes: functions of Python's operator, math and builtins, or torch.sym_*."""
    module = getattr(node.target, "__module__", "")
    named_sym = str(getattr(node.target, "__name__", "")).startswith("sym_")
    return node.target is operator.getitem or module in ("_operator", "math", "builtins") or named_sym


def _mixes_int8(node: fx.Node) -> str | None:
    """Only a shape operator may take int8 tensors as ATen: it moves values and computes none."""
    takes: Any = [n for n in node.all_input_nodes if not is_constant(n) and isinstance(n.meta.get("val"), Tensor)]
    if not any(n.meta["val"].dtype is torch.int8 for n in takes) or node.target is torch.ops.aten.sym_size.int:
        return None
    row = ops.find(node)
    return (
        None
        if row is not None and row.schema is None
        else f"{node.target} computes on int8 values as if they were real"
    )
