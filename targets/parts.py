"""A large batch is computed in parts: how many samples at a time, and the function that does them all.

A large batch leaves the caches between one operator and the next. Where every operator looks at the samples one by
one, the network may as well be called for a few of them, again and again: with the same bits, on values that are still
near. The weights are read anew for each part, so a part is as large as the caches of a few cores allow.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from tvm import relax

from qcompile.ir import Program, is_tensor
from qcompile.targets.constants import ALIGNMENT
from qcompile.targets.cpu.copy import joined
from qcompile.targets.layout import Dim, product
from qcompile.targets.plan import is_int8

if TYPE_CHECKING:
    from qcompile.targets.lowering import Lowering

q, aten = torch.ops.qcompile, torch.ops.aten

PART = "part"  # the function that computes one
BYTES = 8 << 20  # of the activations that an operator of a part reads and writes

_ELEMENTWISE = frozenset({q.add.default, q.mul.default})
_BY_SAMPLE = _ELEMENTWISE | {
    q.quantize.default,
    q.dequantize.default,
    q.conv2d.default,
    q.conv1d.default,
    q.linear.default,
    q.lookup.default,
    q.max_pool2d.default,
    q.avg_pool2d.default,
    q.adaptive_avg_pool2d.default,
    aten.reshape.default,
    aten.view.default,
    aten.flatten.using_ints,
}
Shapes = dict[fx.Node, tuple[Dim, ...]]


def part_of(program: Program, shapes: Shapes) -> int | None:
    """The size of a part, a divisor of the batch; None where the program computes the whole batch at once.

    `shapes`: logical ones, of every tensor.
    """
    inputs = program.placeholders()
    computed = [node for node in program.graph.nodes if node.op == "call_function"]
    if not inputs or not computed or not all(map(is_tensor, computed)):
        return None
    batch = shapes[inputs[0]][0] if shapes[inputs[0]] else None
    if not isinstance(batch, int) or not all(_holds_samples(shapes[node], batch) for node in (*inputs, *computed)):
        return None
    if not all(node.op == "call_function" for node in program.outputs()):
        return None
    if not all(_looks_at_samples(node, shapes) for node in computed):
        return None
    needs = max(_bytes(node, shapes) for node in computed)
    able = [size for size in range(1, batch) if batch % size == 0 and _aligned(inputs, shapes, size)]
    fitting = [size for size in able if size * needs <= BYTES]
    return None if batch * needs <= BYTES else max(fitting, default=min(able, default=None))


def _holds_samples(shape: tuple[Dim, ...], batch: int) -> bool:
    return len(shape) > 1 and all(isinstance(extent, int) for extent in shape) and shape[0] == batch


def _looks_at_samples(node: fx.Node, shapes: Shapes) -> bool:
    """Whether sample i of the result follows from sample i of the operands, which are not constants."""
    alike = all(op.op != "get_attr" and len(shapes[op]) == len(shapes[node]) for op in node.all_input_nodes)
    return node.target in _BY_SAMPLE and (alike or node.target not in _ELEMENTWISE)


def _bytes(node: fx.Node, shapes: Shapes) -> int:
    """Of the integer activations of one sample that `node` reads and writes."""
    values: list[Any] = [value for value in (node, *node.all_input_nodes) if value.op != "get_attr" and is_int8(value)]
    return sum(math.prod(shapes[value][1:]) for value in values)


def _aligned(inputs: list[fx.Node], shapes: Shapes, size: int) -> bool:
    """Whether each part of every input begins where kernels can read it."""
    return all(size * math.prod(shapes[node][1:]) * node.meta["val"].dtype.itemsize % ALIGNMENT == 0 for node in inputs)


def call_parts(low: Lowering, size: int) -> None:
    """The function "main", where there is `PART` for `size` samples: it calls that until the batch is done."""
    outputs = low.program.outputs()
    function, calls = low.builder.get().get_global_var(PART), low.calls
    inputs, tables = low.arguments()
    nodes = low.program.placeholders()
    count = low.shape(nodes[0])[0] // size
    results: list[list[relax.Expr]] = [[] for _ in outputs]  # of each output, its parts
    with low.builder.function("main", [*inputs, tables]):
        with low.builder.dataflow():
            for i in range(count):
                windows = [_window(low, node, x, i, size) for node, x in zip(nodes, inputs, strict=True)]
                result = low.builder.emit(relax.Call(function, [*windows, tables]))
                for k, parts in enumerate(results):
                    parts.append(result if len(results) == 1 else low.builder.emit(relax.TupleGetItem(result, k)))
            low.calls = calls * count
            whole = [_joined(low, node, parts) for node, parts in zip(outputs, results, strict=True)]
            answer = low.builder.emit_output(whole[0] if len(whole) == 1 else relax.Tuple(whole))
        low.builder.emit_func_output(answer)


def _window(low: Lowering, node: fx.Node, x: relax.Var, part: int, size: int) -> relax.Expr:
    """Part number `part`, of `size` samples, of the input `node`, where it lies."""
    shape = (size, *low.shape(node)[1:])
    first = part * math.prod(shape) * node.meta["val"].dtype.itemsize
    return low.builder.emit(relax.op.memory.view(x, shape, relative_byte_offset=relax.prim_value(first)))


def _joined(low: Lowering, node: fx.Node, parts: list[relax.Expr]) -> relax.Expr:
    """The output `node`, of which these are the parts."""
    shape, dtype = low.shape(node), str(parts[0].ty.dtype)
    kernel = joined(len(parts), product(shape) // len(parts), dtype)
    whole = low.call(node, kernel, [low.real(part, dtype) for part in parts], None, dtype)
    return low.shaped(whole.expr, shape)
