"""Every row, taken through its own `fuse` from a float module, stays close to that module.

The quantization here is the plainest there is (range of the very input), so what is tested is that
`fuse` reads the ATen arguments as ATen means them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from qcompile import arith, ir, ops
from qcompile.ir import QParams
from qcompile.ops import Example, QValue, Site, Weight

SEED = 2026


class All(nn.Module):
    """Every example of a row side by side, so that one export serves them all."""

    def __init__(self, examples: list[Example]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(example.module for example in examples)
        self.counts = [len(example.inputs) for example in examples]

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        rest = iter(inputs)
        pairs = zip(self.parts, self.counts, strict=True)
        return [part(*itertools.islice(rest, count)) for part, count in pairs]


def captured(module: nn.Module, inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    """The ATen graph of `module` with constants as get_attr and shapes in meta."""
    exported = torch.export.export(module.eval(), inputs).run_decompositions({})
    graph_module = exported.module()
    assert isinstance(graph_module, fx.GraphModule)
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module":  # the guard on input shapes
            graph_module.graph.erase_node(node)
        elif node.op == "get_attr":
            node.meta["val"] = ir.fake_mode(graph_module).from_tensor(
                ir.constant(graph_module, node), static_shapes=True
            )
    graph_module.recompile()
    return graph_module


def quantized_to(values: Tensor) -> QParams:
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    scale = arith.float32((high - low) / 255)
    return QParams(scale, max(-128, min(127, round(-128 - low / scale))))


def quantized_weight(weight: Tensor) -> Weight:
    scale = (weight.abs().flatten(1).amax(1) / 127).to(torch.float32)
    q = torch.round(weight / scale.reshape(-1, *[1] * (weight.dim() - 1))).to(torch.int8)
    return Weight(q, scale)


class IntegerInterpreter(fx.Interpreter):
    """Runs the float graph, and at the nodes of one row the integer operator on quantized values.

    `errors`: for each such node the largest difference, in units of the output's scale.
    """

    def __init__(self, graph_module: fx.GraphModule, row: ops.Row) -> None:
        super().__init__(graph_module)
        self.graph_module, self.row = graph_module, row
        self.errors: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        if n.op == "call_function" and ops.match(n)[0] is self.row:
            self.errors[n.name] = self._error(n, result)
        return result

    def _error(self, node: fx.Node, real: Tensor) -> float:
        shared = self.row.output is ops.Output.SHARED
        operands = self.row.operands(node)
        inputs = tuple(QValue(n, quantized_to(self.env[n])) for n in operands)
        output = inputs[0].qparams if shared else quantized_to(real)
        weight = bias = None
        if self.row.weight_arg is not None:
            weight = quantized_weight(self.env[node.args[self.row.weight_arg]])  # type: ignore[index]
            bias = self.env.get(node.args[self.row.bias_arg]) if len(node.args) > self.row.bias_arg else None  # type: ignore[arg-type,operator,index]
        constants: dict[fx.Node, Tensor] = {}

        def constant(name: str, value: Tensor) -> fx.Node:
            with self.graph_module.graph.inserting_before(node):
                added = self.graph_module.graph.create_node("get_attr", name, name=f"{name}_{len(constants)}")
            constants[added] = value
            return added

        site = Site(node, inputs, output, -128, 127, weight, bias, None, constant)
        target, args, kwargs = self.row.fuse(site)
        quantized = {x.node: self._quantize(self.env[x.node], x.qparams) for x in inputs}
        read: Callable[[fx.Node], Any] = lambda n: quantized.get(n, constants.get(n, self.env.get(n)))  # noqa: E731
        q = target(*fx.node.map_arg(args, read), **fx.node.map_arg(kwargs, read))
        # The reference is float on the values that the integer operator really saw.
        seen = {x.node: arith.dequantize(quantized[x.node], x.qparams.scale, x.qparams.zero_point) for x in inputs}
        if weight is not None:
            spread = weight.scale.reshape(-1, *[1] * (weight.q.dim() - 1))
            seen[node.args[self.row.weight_arg]] = weight.q * spread  # type: ignore[index]
        exact = node.target(  # type: ignore[operator]
            *fx.node.map_arg(node.args, lambda n: seen.get(n, self.env.get(n))),
            **fx.node.map_arg(node.kwargs, lambda n: seen.get(n, self.env.get(n))),
        )
        low, high = ((edge - output.zero_point) * output.scale for edge in (-128, 127))
        error = arith.dequantize(q, output.scale, output.zero_point) - exact.clamp(low, high)
        return float(error.abs().max()) / output.scale

    @staticmethod
    def _quantize(x: Tensor, qparams: QParams) -> Tensor:
        return arith.quantize(x, arith.inverse_scale(qparams.scale), qparams.zero_point)


@pytest.mark.parametrize("row", [row for row in ops.ROWS if row.aten], ids=lambda row: row.name)
def test_what_a_row_fuses_is_within_half_a_step_of_float(row: ops.Row) -> None:
    examples = list(row.examples(torch.Generator().manual_seed(SEED)))
    assert examples
    inputs = tuple(itertools.chain.from_iterable(example.inputs for example in examples))
    interpreter = IntegerInterpreter(captured(All(examples), inputs), row)
    with torch.no_grad():
        interpreter.run(*inputs)
    assert len(interpreter.errors) >= len(examples), "the row does not take all of its examples"
    # Half a step of rounding; the bias of a weighted row is rounded too, to half a step of the accumulator.
    assert {name: error for name, error in interpreter.errors.items() if error > 0.52} == {}
