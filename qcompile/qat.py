"""QatModel: a quantized model as a module that can be trained, and the qdq program that it becomes again."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompile.config import QuantConfig
from qcompile.errors import ExportError, InputError, QuantizationError
from qcompile.fakequant import (
    fake_quantize,
    fake_quantize_bias,
    fake_quantize_weight,
    integers,
    learned_scale,
    same_scale,
)
from qcompile.inputs import arrange, unflatten
from qcompile.ir import InputSpec, Program, add_constant, copy_meta, finish
from qcompile.observers import TINY
from qcompile.passes.base import Pass
from qcompile.qdq import DEQUANTIZE, QUANTIZE, WEIGHT
from qcompile.traininggraph import to_training
from qcompile.weights import by_channel

_TO_GRID = (fake_quantize, same_scale)
_LARGEST_SCALE = 1e30  # the product of two must stay within float32
_REMEDY_DIVERGED = "training diverged: load an earlier state_dict, and train on with a smaller learning rate"


class QatModel(nn.Module):
    """What `qcompile.prepare_qat` returns: called, trained and moved as any module; saved by its `state_dict`.

    Its output is that of the integer model that `qcompile.compile` makes of it, but for float rounding: where a value
    lies half way between two int8 steps, float sums may fall to the other side. It is the same in training and in
    evaluation mode. Batch norms are part of the weights, and dropout is gone.

    Parameters have their names in the float model ("conv1.weight"); what a batch norm became is in those of the layer
    before it. Each weight has a `_log_ratio` beside it, and each int8 activation has one under "activations.": the
    logarithm of a learned scale over the calibrated one.
    """

    config: QuantConfig
    rest: tuple[Pass, ...]

    def __init__(
        self,
        program: Program,
        originals: dict[str, Tensor],
        *,
        learned: bool,
        config: QuantConfig,
        rest: tuple[Pass, ...],
    ) -> None:
        super().__init__()
        self.config, self.rest = config, rest
        self._program = replace(program, graph_module=fx.GraphModule(nn.Module(), fx.Graph()))  # all but the graph
        self._graph = to_training(program, originals, learned, self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs for positional or keyword inputs, nested as the model nests them.

        Raises:
            InputError: an input is missing, is no tensor, or has another shape than the model takes.
        """
        specs = self._program.inputs
        flat = arrange(args, kwargs, specs)
        for spec, value in zip(specs, flat, strict=True):
            _check_shape(spec, value)
        run = fx.Interpreter(self, graph=self._graph)
        run.extra_traceback = False  # it would add the node to an error's text
        return unflatten(self._program.output_structure, run.run(*flat))

    def __deepcopy__(self, memo: dict[int, Any]) -> QatModel:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(deepcopy(self.__dict__, memo))
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ExportError(
            "a model that is being trained is saved by its state_dict; as a whole it cannot be pickled",
            where="torch.save, pickle or copy.copy of a QatModel",
            remedy="torch.save(model.state_dict(), path); later call prepare_qat as before, and load_state_dict",
        )

    def scales(self) -> Iterator[nn.Parameter]:
        """The parameters that are scales: for an optimizer's group of their own."""
        return (p for name, p in self.named_parameters() if name.endswith("log_ratio"))

    def freeze(self) -> Program:
        """A new qdq program with the weights and scales as they are now.

        Raises:
            QuantizationError: a weight or scale is not finite, or a scale is too small or large; names it.
        """
        graph_module = fx.GraphModule(nn.Module(), fx.Graph())
        builder = _Freezer(deepcopy(self).cpu(), graph_module)
        with torch.no_grad():
            for node in self._graph.nodes:
                builder.add(node)
        copied = deepcopy(self._program)  # passes add to its ledger and properties
        program = replace(copied, graph_module=graph_module)
        finish(program)
        return program


def _check_shape(spec: InputSpec, value: Tensor) -> None:
    fits = value.dim() == len(spec.shape) and all(
        size == want if isinstance(want, int) else want[1] <= size <= want[2]
        for size, want in zip(value.shape, spec.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(w) if isinstance(w, int) else f"{w[0]}: {w[1]} to {w[2]}" for w in spec.shape)
        raise InputError(
            f"input {spec.name!r} has shape {tuple(value.shape)}, and the model takes ({wanted})",
            where=f"input {spec.name}",
            remedy="give batches of that size, or make the batch dynamic: prepare_qat(dynamic_shapes=...)",
        )


class _Freezer:
    """Builds the qdq graph of a trained module, node by node, in the order of its training graph."""

    def __init__(self, module: nn.Module, graph_module: fx.GraphModule) -> None:
        self.module, self.graph_module, self.graph = module, graph_module, graph_module.graph
        self.new: dict[fx.Node, fx.Node] = {}

    def add(self, node: fx.Node) -> None:
        if node.target in _TO_GRID:
            self.new[node] = self.activation(node)
        elif node.target is fake_quantize_weight:
            self.new[node] = self.weight(node)
        elif node.target is fake_quantize_bias:
            self.new[node] = self.value(node.args[0])  # type: ignore[arg-type]
        elif node.op != "get_attr" and node.target is not learned_scale:
            self.new[node] = self.graph.node_copy(node, self.value)

    def value(self, node: fx.Node) -> fx.Node:
        if node not in self.new:
            self.new[node] = add_constant(self.graph_module, str(node.target), self.tensor(node))
        return self.new[node]

    def tensor(self, node: fx.Node) -> Tensor:
        """What a get_attr node of the training graph holds."""
        path, _, leaf = str(node.target).rpartition(".")
        value = getattr(self.module.get_submodule(path), leaf).detach()
        is_mask = path.startswith("constants")  # or may be one, with -inf
        if value.is_floating_point() and not is_mask and not bool(torch.isfinite(value).all()):
            raise QuantizationError(
                f"the trained {leaf!r} is not finite", where=path or "the model", remedy=_REMEDY_DIVERGED
            )
        return value

    def scale(self, node: fx.Node) -> Tensor:
        calibrated, log_ratio = node.args
        value = learned_scale(self.tensor(calibrated), self.tensor(log_ratio))  # type: ignore[arg-type]
        if not bool(((value >= TINY) & (value <= _LARGEST_SCALE)).all()):
            path, _, leaf = str(calibrated.target).rpartition(".")  # type: ignore[union-attr]
            raise QuantizationError(
                f"the trained {leaf!r} is {value.min():g} to {value.max():g}", where=path, remedy=_REMEDY_DIVERGED
            )
        return value

    def activation(self, node: fx.Node) -> fx.Node:
        x, scale, zero_point, qmin, qmax = node.args
        bounds = float(self.scale(scale)), int(self.tensor(zero_point)), qmin, qmax, torch.int8  # type: ignore[arg-type]
        q = self.graph.call_function(QUANTIZE, (self.value(x), *bounds))  # type: ignore[arg-type]
        return copy_meta(self.graph.call_function(DEQUANTIZE, (copy_meta(q, node), *bounds)), node)

    def weight(self, node: fx.Node) -> fx.Node:
        weight, scale_node, most = node.args
        name, value, scale = str(weight.target), self.tensor(weight), self.scale(scale_node)  # type: ignore[union-attr, arg-type]
        q = integers(value, by_channel(scale, value), -most, most).to(torch.int8)  # type: ignore[operator]
        constants = {"q": q, "scale": scale, "zero_point": torch.zeros(len(q), dtype=torch.int64)}
        nodes = [add_constant(self.graph_module, f"{name}_{leaf}", value) for leaf, value in constants.items()]
        return copy_meta(self.graph.call_function(WEIGHT, (*nodes, 0, -most, most, torch.int8)), node)  # type: ignore[operator]
