"""A qdq graph and the float graph it came from, run side by side on the samples that calibration kept.

What a layer reads in the quantized graph, and what it computes in the float one, is all that a pass needs in
order to mend the layer. Layers come in graph order, and each is mended before the next ones read it, so that
later layers make up for the errors of earlier ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from qcompile import ops
from qcompile.errors import CalibrationError
from qcompile.ir import Program, add_constant, constant, origin
from qcompile.ops.conv import argument, geometry

aten, qd = torch.ops.aten, torch.ops.quantized_decomposed
_QUANTIZES = (qd.quantize_per_tensor.default, qd.quantize_per_channel.default)
_DEQUANTIZES = (qd.dequantize_per_tensor.default, qd.dequantize_per_channel.default)


@dataclass
class Layer:
    """A convolution or linear layer of a qdq graph.

    Attributes:
        program: whose layer it is.
        node: its operator.
        inputs: what it reads in the quantized graph, one tensor per sample.
        outputs: what the operator computes in the float graph.
        originals: name of a node of the qdq graph -> what it was in float.
    """

    program: Program
    node: fx.Node
    inputs: list[Tensor]
    outputs: list[Tensor]
    originals: dict[str, Tensor]

    @property
    def original(self) -> Tensor:
        """Its float weight."""
        return self.originals[self._dequantize().name]

    @property
    def groups(self) -> int:
        return 1 if self.node.target is aten.linear.default else int(argument(self.node, 6, 1))

    def _dequantize(self) -> fx.Node:
        weight = self.node.args[1]
        assert isinstance(weight, fx.Node)
        return weight

    @property
    def q(self) -> Tensor:
        """The int8 weight; written in place it is changed."""
        return constant(self.program.graph_module, self._dequantize().args[0])  # type: ignore[arg-type]

    @property
    def scale(self) -> Tensor:
        """Of the weight, per output channel; written in place it is changed."""
        return constant(self.program.graph_module, self._dequantize().args[1])  # type: ignore[arg-type]

    @property
    def most(self) -> int:
        """The largest integer that the weight may hold."""
        return int(self._dequantize().args[5])  # type: ignore[arg-type]

    @property
    def bias(self) -> Tensor | None:
        node = argument(self.node, 2, None)
        return None if node is None else constant(self.program.graph_module, node)

    @property
    def input_scale(self) -> float:
        """Of the quantization of what it reads."""
        x: Any = self.node.args[0]
        return float(x.args[1])

    def set_bias(self, value: Tensor) -> None:
        """Give the layer a bias of its own."""
        set_bias(self.program, self.node, value, self.originals)

    def patches(self, x: Tensor) -> Tensor:
        """What each output of one sample is the weighted sum of: (groups, positions, taps), taps as in a row of
        the weight."""
        if self.node.target is aten.linear.default:
            return x.reshape(1, -1, x.shape[-1])
        kernel = tuple(self.original.shape[2:])
        stride, pads, dilation = geometry(self.node, kernel)
        x = functional.pad(x, [p for pair in reversed(pads) for p in pair])
        if len(kernel) == 1:
            x, kernel = x[:, :, None], (1, *kernel)
            stride, dilation = [1, *stride], [1, *dilation]
        columns = functional.unfold(x, kernel, tuple(dilation), 0, tuple(stride))  # (N, channels x taps, positions)
        return columns.unflatten(1, (self.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)

    def per_position(self, y: Tensor) -> Tensor:
        """An output of the operator as (groups, positions, channels of a group)."""
        if self.node.target is aten.linear.default:
            return y.reshape(1, -1, y.shape[-1])
        return y.flatten(2).unflatten(1, (self.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def set_bias(program: Program, layer: fx.Node, value: Tensor, originals: dict[str, Tensor]) -> None:
    """Give a layer a bias of its own; `originals` learns which bias it had in float."""
    old, weight = argument(layer, 2, None), layer.args[1]
    assert isinstance(weight, fx.Node)
    of_weight = origin(weight)
    made_of = origin(old) or (None if of_weight is None else of_weight.sibling("bias"))
    with program.graph.inserting_before(layer):
        node = add_constant(program.graph_module, f"{layer.name}_bias", value.to(torch.float32), made_of)
    given = torch.zeros_like(value, dtype=torch.float32) if old is None else constant(program.graph_module, old)
    originals[node.name] = given if old is None else originals.get(old.name, given)
    args = list(layer.args)
    args[2:3] = [node]
    layer.args = tuple(args)


def layers(
    program: Program, samples: list[list[Tensor]], originals: dict[str, Tensor], visit: Callable[[Layer], Any]
) -> Iterator[tuple[int, int]]:
    """Call `visit(layer)` for each layer with a known float weight, in order; yields (layers done, layers in all).

    Args:
        samples: inputs of the model.
        originals: name of a node of the qdq graph -> what it was in float.

    Raises:
        CalibrationError: there are layers, and no samples.
    """
    total = sum(is_layer(node, originals) for node in program.graph.nodes)
    if total and not samples:
        raise CalibrationError(
            "calibration kept no samples to compare layers on",
            where="QuantConfig(preset='fast')",
            remedy="use another preset, which keeps some (or none, and observer='mse'), or leave the pass out",
        )
    nodes = [node for node in program.graph.nodes if node.op != "output"]
    for done, _ in enumerate(Run(program, samples, originals).layers(nodes, visit), 1):
        yield done, total


def is_layer(node: fx.Node, originals: dict[str, Tensor]) -> bool:
    """Whether it has a weight of its own, of which the float one is known."""
    row = ops.find(node)
    if row is None or row.weight_arg is None:
        return False
    x, weight = node.args[:2]
    return (
        isinstance(x, fx.Node)
        and x.target in _DEQUANTIZES
        and isinstance(weight, fx.Node)
        and weight.name in originals
        and len(weight.users) == 1
    )


class Run:
    """The values of both graphs, a list with one per sample (constants: one for all), as long as they are needed."""

    def __init__(self, program: Program, samples: list[list[Tensor]], originals: dict[str, Tensor]) -> None:
        self._program, self._samples, self._originals = program, samples, originals
        self.quantized: dict[fx.Node, list[Any]] = {}
        self.float: dict[fx.Node, list[Any]] = {}
        self._last: dict[fx.Node, list[fx.Node]] = {}
        seen: set[fx.Node] = set()
        for node in reversed(program.graph.nodes):
            for used in node.all_input_nodes:
                if used not in seen:
                    seen.add(used)
                    self._last.setdefault(node, []).append(used)

    def layers(self, nodes: list[fx.Node], visit: Callable[[Layer], Any]) -> Iterator[Layer]:
        """Run `nodes`, those that come next, in both graphs; call `visit` for each layer among them, then yield it."""
        for node in nodes:
            outputs = self.step(node, True)
            self.set(node, True, outputs)
            if is_layer(node, self._originals):
                x: Any = node.args[0]
                layer = Layer(self._program, node, self.quantized[x], outputs, self._originals)
                visit(layer)
                self.enter_constants(node)
                yield layer
            self.set(node, False, self.step(node, False))
            self.forget(node)

    def again(self, nodes: list[fx.Node], inputs: dict[fx.Node, list[Any]]) -> None:
        """Run `nodes`, those that came last, in the quantized graph once more: they have changed. `inputs` is what they
        read of what came before."""
        self.quantized |= inputs
        for node in nodes:
            self.enter_constants(node)
            self.set(node, False, self.step(node, False))
            self.forget(node)

    def set(self, node: fx.Node, in_float: bool, values: list[Any]) -> None:
        (self.float if in_float else self.quantized)[node] = values

    def enter_constants(self, node: fx.Node) -> None:
        """Read anew what `node` reads of the program: the visit may have changed it."""
        for used in node.all_input_nodes:
            for constant_node in (used, *used.all_input_nodes):
                if constant_node.op == "get_attr":
                    self.quantized[constant_node] = self.step(constant_node, False)
                    self.float.setdefault(constant_node, self.quantized[constant_node])
            if used.target in _DEQUANTIZES and used.args[0].op == "get_attr":  # type: ignore[union-attr]
                self.quantized[used] = self.step(used, False)

    def step(self, node: fx.Node, in_float: bool) -> list[Any]:
        count = len(self._samples)
        if node.op == "placeholder":
            at = self._program.placeholders().index(node)
            return [sample[at] for sample in self._samples]
        if in_float and node.name in self._originals:
            return [self._originals[node.name]] * count
        if node.op == "get_attr":
            return [constant(self._program.graph_module, node)] * count
        values = self.float if in_float else self.quantized
        if in_float and node.target in (*_QUANTIZES, *_DEQUANTIZES):
            source: Any = node.args[0]
            return values[source]
        target: Any = node.target

        def one(i: int) -> Any:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda used: values[used][i])
            return target(*args, **kwargs)

        constant_inputs = all(used.op == "get_attr" for used in node.all_input_nodes)
        return [one(0)] * count if constant_inputs else [one(i) for i in range(count)]

    def forget(self, node: fx.Node) -> None:
        """Drop the values that `node` was the last to read."""
        for used in self._last.get(node, ()):
            self.quantized.pop(used, None)
            self.float.pop(used, None)
