"""A qdq graph as one that can be trained, and back.

    quantize_per_tensor, dequantize_per_tensor   <->   fake_quantize(x, scale, zero_point)
    dequantize_per_channel(int8)                 <->   fake_quantize_weight(float weight, scale)
    the bias of a layer                          <->   fake_quantize_bias(bias, input scale, weight scale)

The weights, biases and scales of the training graph are parameters of a module; the functions are those of
`qcompile.fakequant`. Everything else is the same in both graphs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompile.fakequant import (
    fake_quantize,
    fake_quantize_bias,
    fake_quantize_weight,
    integers,
    learned_scale,
    same_scale,
)
from qcompile.ir import ORIGIN, Origin, Program, constant, copy_meta
from qcompile.ops.row import Output
from qcompile.qdq import Lifted, is_dequantize, is_quantize, lift_weights, params
from qcompile.sites import Group, place, read
from qcompile.weights import by_channel

_NEAR_HALF = 0.49  # how far from its integer a weight may begin, in steps


def to_training(program: Program, originals: dict[str, Tensor], learned: bool, module: nn.Module) -> fx.Graph:
    """The training graph of a qdq program; puts what it reads into `module`.

    Args:
        originals: name of a dequantized weight -> its float values, where they are known.
        learned: whether scales are trained. One is only where something trainable lies before it.
    """
    builder = _Builder(program, originals, learned, module)
    for node in program.graph.nodes:
        builder.add(node)
    return builder.graph


class _Builder:
    """Builds the training graph node by node, in the order of the qdq graph."""

    def __init__(self, program: Program, originals: dict[str, Tensor], learned: bool, module: nn.Module) -> None:
        self.old, self.originals, self.learned, self.module = program.graph_module, originals, learned, module
        self.graph = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}  # old node -> new node
        self.grid: dict[fx.Node, tuple[Any, ...]] = {}  # old quantize node -> scale, zero point, smallest, largest
        self.trained: set[fx.Node] = set()  # new nodes whose values training changes
        self.registered: dict[tuple[Any, ...], fx.Node] = {}
        self.weights = lift_weights(program)
        groups = list(read(program.graph, is_dequantize, is_quantize))
        self.groups = {g.tail: g for g in groups}
        self.roots = {g.root: g for g in groups}

    def add(self, node: fx.Node) -> None:
        if is_quantize(node):
            self.new[node] = self.activation(node)
        elif is_dequantize(node):
            self.new[node] = self.new[node.args[0]]  # type: ignore[index]
        elif node.op != "get_attr":  # those are registered where they are read
            bias = self.bias(node, self.roots[node]) if node in self.roots else {}
            self.new[node] = self.mark(self.graph.node_copy(node, lambda n: bias[n] if n in bias else self.value(n)))

    def value(self, node: fx.Node) -> fx.Node:
        if node not in self.new:
            lifted, held = self.weights.get(node), constant(self.old, node)
            self.new[node] = self.constant(node, held) if lifted is None else self.weight(node, lifted)
        return self.new[node]

    def call(self, like: fx.Node, function: Any, *args: Any) -> fx.Node:
        new = self.graph.call_function(function, args)
        new.meta["val"] = like.meta["val"]
        return self.mark(copy_meta(new, like))

    def mark(self, new: fx.Node) -> fx.Node:
        if any(used in self.trained for used in new.all_input_nodes):
            self.trained.add(new)
        return new

    # --- what is quantized -----------------------------------------------------------------------

    def activation(self, q: fx.Node) -> fx.Node:
        tensor: Any = q.args[0]
        scale, zero_point, *bounds = q.args[1:5]
        x, group = self.value(tensor), self.groups.get(tensor)
        before: Any = group.operands[0].args[0] if group is not None else None
        if group is not None and group.row.output is Output.SHARED and params(before) == params(q):
            self.grid[q] = self.grid[before]
            return self.call(tensor, same_scale, x, *self.grid[q])
        path = f"activations.{place(tensor)}"
        step = self.scale(f"{path}.", torch.tensor(scale, dtype=torch.float32), x in self.trained)
        zero = self.register(f"{path}.zero_point", torch.tensor(zero_point, dtype=torch.int32), None)
        self.grid[q] = step, zero, *bounds
        return self.call(tensor, fake_quantize, x, *self.grid[q])

    def weight(self, node: fx.Node, lifted: Lifted) -> fx.Node:
        q, scale, known = lifted.weight.q, lifted.weight.scale, self.originals.get(lifted.name)
        # Calls of one layer whose weights were chosen apart (passes.round_weights) begin, and are trained, apart.
        chosen = q.numpy().tobytes(), scale.numpy().tobytes()
        weight = self.constant(node, q if known is None else known, _begin(q, scale, known, lifted.most), chosen)
        step = self.scale(f"{weight.target}_", scale, weight in self.trained)
        return self.call(node, fake_quantize_weight, weight, step, lifted.most)

    def bias(self, node: fx.Node, group: Group) -> dict[fx.Node, fx.Node]:
        """The bias of a layer, where it has one -> rounded as in the layer's accumulator."""
        at, weight_at = group.row.bias_arg, group.row.weight_arg
        bias: Any = node.args[at] if at is not None and len(node.args) > at else None
        if bias is None or weight_at is None:
            return {}
        weight: Any = self.value(node.args[weight_at])  # type: ignore[arg-type]
        step = self.grid[group.operands[0].args[0]][0]  # type: ignore[index]
        return {bias: self.call(bias, fake_quantize_bias, self.value(bias), step, weight.args[1])}

    # --- what is registered ----------------------------------------------------------------------

    def scale(self, path: str, value: Tensor, trainable: bool) -> fx.Node:
        """The scale of a grid; `path` as far as the scale's own name."""
        calibrated = self.register(f"{path}scale", value, None)
        log_ratio = self.register(f"{path}log_ratio", torch.zeros_like(value), trainable and self.learned)
        return self.mark(self.graph.call_function(learned_scale, (calibrated, log_ratio)))

    def constant(self, node: fx.Node, held: Tensor, value: Tensor | None = None, of: Any = None) -> fx.Node:
        """What `node` holds, as a parameter if it is one in the model; registered once, however many layers read it.

        Args:
            value: what to begin with, if not with that.
            of: what `value` depends on besides.
        """
        origin: Origin | None = node.meta.get(ORIGIN)
        key = held.data_ptr(), tuple(held.shape), of
        if key not in self.registered:
            path, trainable = (f"constants.{node.target}", None) if origin is None else (origin.path, origin.trainable)
            self.registered[key] = self.register(path, held if value is None else value, trainable)
            self.registered[key].meta["val"] = node.meta["val"]
        return self.registered[key]

    def register(self, path: str, value: Tensor, trainable: bool | None) -> fx.Node:
        """The get_attr node of a new parameter, or (trainable None) buffer, called `path` or nearly so."""
        owner, found = self.module, list[str]()
        *folders, leaf = path.split(".")
        for folder in folders:
            while not isinstance(getattr(owner, folder, nn.Module()), nn.Module):
                folder += "_"
            if not hasattr(owner, folder):
                owner.add_module(folder, nn.Module())
            owner = getattr(owner, folder)
            found.append(folder)
        fresh, i = leaf, 0
        while hasattr(owner, fresh):
            i += 1
            fresh = f"{leaf}_{i}"
        value = value.detach().clone().contiguous()
        if trainable is None:
            owner.register_buffer(fresh, value)
        else:
            owner.register_parameter(fresh, nn.Parameter(value, requires_grad=trainable))
        node = self.graph.create_node("get_attr", ".".join((*found, fresh)))
        if trainable:
            self.trained.add(node)
        return node


def _begin(q: Tensor, scale: Tensor, known: Tensor | None, most: int) -> Tensor:
    """The float weight that training begins with: the known one, moved where needed so that it rounds to `q`."""
    step = by_channel(scale, q)
    if known is None:
        return q * step
    near = (known / step).clamp(q - _NEAR_HALF, q + _NEAR_HALF) * step
    return torch.where(integers(known, step, -most, most) == q, known, near)
