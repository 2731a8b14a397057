"""Every layer of an integer program against the float graph it was made of.

Let f be a layer's operator in the float graph and g the integer one, y = f(x) the float values, Q the rounding to an
int8 grid, and x' what g reads when the integer program runs from the model's input. Then

    accumulated error   g(x') - y          what the network has lost up to and with this layer
    isolated error      g(Q(x)) - y        what this layer loses alone: its inputs are as good as int8 can hold them

and the isolated error is a sum of three, each the fault of something else:

    inputs    f(Q(x)) - y                  the grids of its inputs
    output    Q(f(Q(x))) - f(Q(x))         its own output's grid
    operator  g(Q(x)) - Q(f(Q(x)))         its int8 weights and int32 bias (or table, or multiplier)

All are added up as powers over elements, samples and batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.arith import inverse_scale
from qcompile.evaluation.quality import Powers
from qcompile.ir import Program, QParams, constant
from qcompile.sites import COVERS, HOLDS, Held, is_computed

BINS = 64  # of a histogram, over the integer grid; one more on either side for what lies beyond
_RESHAPES = (torch.ops.aten.unsqueeze.default, torch.ops.aten.squeeze.dim)
_PARTS = ("accumulated", "isolated", "inputs", "output", "operator")


@dataclass
class Sums:
    """What the batches add up to, for one layer.

    Attributes:
        powers: name of an error, as above -> its power.
        histogram: how many float outputs lie in each part of the layer's grid: below it, `BINS` parts, above it.
    """

    powers: dict[str, Powers] = field(default_factory=lambda: {name: Powers() for name in _PARTS})
    histogram: Tensor = field(default_factory=lambda: torch.zeros(BINS + 2, dtype=torch.int64))


def layers(program: Program) -> list[fx.Node]:
    """The nodes that may lose something: integer operators, quantizations, and operators that stayed float. What
    only moves int8 values loses nothing."""
    stayed_float = {row.node for row in program.ledger.rows if row.kind == "float"}

    def is_layer(node: fx.Node) -> bool:
        if HOLDS in node.meta:
            return getattr(node.target, "namespace", "") == "qcompile"
        value = node.meta.get("val")
        computes = COVERS in node.meta or (node.name in stayed_float and is_computed(node))
        return computes and isinstance(value, Tensor) and value.is_floating_point()

    return [node for node in program.graph.nodes if is_layer(node)]


def reads(node: fx.Node, of: set[fx.Node]) -> list[fx.Node]:
    """The layers among `of` whose values `node` reads, directly or through what only moves values."""
    found: dict[fx.Node, None] = {}
    for used in node.all_input_nodes:
        found |= dict.fromkeys([used] if used in of else reads(used, of))
    return list(found)


class Comparison:
    """Runs both graphs on batch after batch, and adds up.

    Memory: the float values of all layers for one batch, and both graphs' weights.
    """

    def __init__(self, program: Program, float_program: Program) -> None:
        self._program, self._float = program, float_program
        self._float_nodes = {node.name: node for node in float_program.graph.nodes}
        self.sums = {node: Sums() for node in layers(program)}
        self._last_use = Counter[fx.Node]()
        for node in program.graph.nodes:
            self._last_use.update(node.all_input_nodes)
        self._kept = {
            real_name(n) for layer in self.sums for n in (layer, *layer.all_input_nodes) if n.op != "get_attr"
        }

    @torch.no_grad()
    def add(self, inputs: list[Tensor]) -> None:
        """One batch of flat inputs."""
        real = _Recorder(self._float, self._kept).record(inputs)
        uses, values = Counter(self._last_use), dict[fx.Node, Any]()
        for node in self._program.graph.nodes:
            if node.op == "output":
                break
            values[node] = self._step(node, values, inputs)
            if node in self.sums:
                self._compare(node, values, real)
            for used in node.all_input_nodes:
                uses[used] -= 1
                if not uses[used] and used.op != "placeholder":
                    values.pop(used, None)

    def _step(self, node: fx.Node, values: dict[fx.Node, Any], inputs: list[Tensor]) -> Any:
        if node.op == "placeholder":
            return inputs[self._program.placeholders().index(node)]
        if node.op == "get_attr":
            return constant(self._program.graph_module, node)
        return _call(node, values.__getitem__)

    def _compare(self, node: fx.Node, values: dict[fx.Node, Any], real: dict[str, Any]) -> None:
        expected, sums = real[real_name(node)], self.sums[node]
        if HOLDS not in node.meta:
            expected = expected.reshape(values[node].shape)  # a convolution of one dimension became one of two
        held: Held | None = node.meta.get(HOLDS)
        if held is None:  # between floats: what it loses of exact inputs is due to its weights and its arithmetic
            alone = _call(node, lambda used: _exact(used, values, real)) if COVERS in node.meta else expected
            sums.powers["accumulated"].add(expected, values[node] - expected)
            for part in ("isolated", "operator"):
                sums.powers[part].add(expected, alone - expected)
            return
        params = held.qparams
        sums.histogram += histogram(expected, params)
        sums.powers["accumulated"].add(expected, _dequantize(values[node], params) - expected)

        def isolated(used: fx.Node) -> Any:
            if HOLDS in used.meta:
                return _quantize(real[real_name(used)], used.meta[HOLDS].qparams, used)
            return _exact(used, values, real)

        alone = _dequantize(_call(node, isolated), params)
        ideal = self._of_quantized_inputs(node, real)
        on_grid = _dequantize(_quantize(ideal, params, node), params)
        errors = {"isolated": alone - expected, "inputs": ideal - expected}
        errors |= {"output": on_grid - ideal, "operator": alone - on_grid}
        for name, error in errors.items():
            sums.powers[name].add(expected, error)

    def _of_quantized_inputs(self, node: fx.Node, real: dict[str, Any]) -> Tensor:
        """f(Q(x))."""
        known = {name: value for name, value in real.items() if not isinstance(value, Tensor)}
        for used in node.all_input_nodes:
            if HOLDS in used.meta:
                held: Held = used.meta[HOLDS]
                q = _quantize(real[held.node], held.qparams, used)
                known[held.node] = _dequantize(q, held.qparams)
            elif real_name(used) in real:
                known[real_name(used)] = real[real_name(used)]

        def value(needed: fx.Node) -> Any:
            if needed.name not in known:
                at = needed.op == "get_attr"
                known[needed.name] = constant(self._float.graph_module, needed) if at else _call(needed, value)
            return known[needed.name]

        return value(self._float_nodes[real_name(node)])


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the values of some nodes, and every value that is no tensor."""

    def __init__(self, program: Program, wanted: set[str]) -> None:
        super().__init__(program.graph_module)
        self._wanted, self._kept = wanted, dict[str, Any]()

    def record(self, inputs: list[Tensor]) -> dict[str, Any]:
        self.run(*inputs)
        return self._kept

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._wanted or not isinstance(value, (Tensor, tuple, list)):
            self._kept[n.name] = value
        return value


def real_name(node: fx.Node) -> str:
    """The name of the float graph's node whose value `node` stands for."""
    held: Held | None = node.meta.get(HOLDS)
    if held is not None:
        return held.node
    covers = node.meta.get(COVERS)
    if covers:
        return str(covers[-1])
    source: Any = node.args[0] if node.target is torch.ops.qcompile.dequantize.default else node
    return node.name if source is node else real_name(source)


def _exact(used: fx.Node, values: dict[fx.Node, Any], real: dict[str, Any]) -> Any:
    """What a node holds when all before it is exact."""
    source = used
    while source.target in _RESHAPES and real_name(source) not in real:
        source = source.args[0]  # type: ignore[assignment]
    known = None if used.op == "get_attr" else real.get(real_name(source))
    if known is None:
        return values[used]
    return known.reshape(values[used].shape) if isinstance(known, Tensor) else known


def _call(node: fx.Node, value: Any) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    target: Any = node.target
    return target(*args, **kwargs)


def _quantize(x: Tensor, params: QParams, like: fx.Node) -> Tensor:
    """On the grid of `params`, as `arith.quantize` does it for int8; in the type of the node `like`."""
    low, high = params.qmin - params.zero_point, params.qmax - params.zero_point
    steps = (x * inverse_scale(params.scale)).clamp(low, high).round().nan_to_num(0.0)
    return (steps + params.zero_point).to(like.meta["val"].dtype)


def _dequantize(q: Tensor, params: QParams) -> Tensor:
    return (q.to(torch.float32) - params.zero_point) * params.scale


def histogram(x: Tensor, params: QParams) -> Tensor:
    """Counts of `x` below the grid of `params`, in `BINS` equal parts of it, and above it: int64, (BINS + 2,).

    A value is beyond the grid when it is more than half a step away: then int8 saturates.
    """
    position = x.to(torch.float64) / params.scale + params.zero_point - (params.qmin - 0.5)
    position = position.nan_to_num(0.0)
    whole = params.qmax - params.qmin + 1
    part = (position * (BINS / whole)).floor().clamp(-1, BINS)
    return torch.bincount(part.to(torch.int64).flatten() + 1, minlength=BINS + 2)


def weight_codes(program: Program, node: fx.Node) -> Tensor | None:
    """The int8 weights of an operator; None where it has none."""
    schema: Any = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    if HOLDS not in node.meta or "weight" not in names:
        return None
    weight: Any = node.args[names.index("weight")]
    return constant(program.graph_module, weight)


def saturation(counts: Iterable[int]) -> Iterator[float]:
    """The part of the values that lie below the grid, and above it."""
    each = list(counts)
    total = max(sum(each), 1)
    yield each[0] / total
    yield each[-1] / total
