"""What leaving layers in float costs, in milliseconds of a call: measured here, or estimated for another machine.

Two things cost: the layers themselves, and the conversions wherever int8 meets float. For small layers, conversions
are most of it, which is why layers beside each other are cheaper than the same number of them here and there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from qcompile.ir import Program, shape_of
from qcompile.profiling import multiply_accumulates
from qcompile.sites import COVERS, Group, is_shape

_BYTES = 4.0  # a float has four times the bytes of an int8: the cost of an operator without a float kernel of our own
_LEAST = 1e-3  # of the whole network: below this a difference of two measurements says nothing
_GIGAHERTZ = 1e6  # cycles in a millisecond, where nothing can be measured
_QUANTIZE, _DEQUANTIZE = torch.ops.qcompile.quantize.default, torch.ops.qcompile.dequantize.default

Timed = tuple[Program, Mapping[str, float]]
"""An integer program, and the milliseconds of its nodes."""


@dataclass(frozen=True)
class Costs:
    """Milliseconds.

    Attributes:
        layers: group -> how much slower it is in float than in int8.
        quantize, dequantize: tensor -> of its conversion from float to int8, and from int8 to float.
    """

    layers: Mapping[str, float]
    quantize: Mapping[fx.Node, float]
    dequantize: Mapping[fx.Node, float]


def measured(
    groups: Mapping[str, Group], tensors: Collection[fx.Node], integer: Timed, real: Timed, half: Timed
) -> Costs:
    """Costs from the times of three programs: with every layer quantized, with none, and with every second one, which
    has many conversions."""
    int8, float32 = (_by_operator(program, times) for program, times in (integer, real))
    least = _LEAST * sum(integer[1].values())
    layers = {}
    for name, group in groups.items():
        before = int8.get(name, 0.0)
        after = sum(float32.get(member.name, 0.0) for member in group.members) or _BYTES * before
        layers[name] = max(after - before, least)
    sizes = _smallest(integer[0])
    conversions = []
    for target in (_QUANTIZE, _DEQUANTIZE):
        seen = [
            (_elements(node, sizes), times[node.name])
            for program, times in (half, integer)
            for node in program.graph.nodes
            if node.target is target and node.name in times
        ]
        line = _line(seen)
        conversions.append({tensor: line(_elements(tensor, sizes)) for tensor in tensors})
    return Costs(layers, *conversions)


def estimated(groups: Mapping[str, Group], tensors: Collection[fx.Node], program: Program, lanes: int) -> Costs:
    """The same without a machine, at 1 GHz: one product a lane and cycle in float and four in int8, and one conversion.
    Operators without products are not ours in float: one element a cycle.

    Args:
        program: with every layer quantized.
        lanes: 32-bit lanes of a vector.
    """
    nodes = {covered: node for node in program.graph.nodes for covered in node.meta.get(COVERS, ())}
    sizes = _smallest(program)
    layers = {}
    for name, group in groups.items():
        macs = multiply_accumulates(nodes[name], sizes) if name in nodes else 0
        read = 0 if is_shape(group.row) else sum(_elements(tensor, sizes) for tensor in group.inputs)
        layers[name] = max(macs * (1 - 1 / _BYTES) / lanes if macs else read, 1 / lanes) / _GIGAHERTZ
    conversions = {tensor: _elements(tensor, sizes) / lanes / _GIGAHERTZ for tensor in tensors}
    return Costs(layers, conversions, conversions)


def every_second(groups: Iterable[str]) -> frozenset[str]:
    """Half of the groups, with int8 neighbours."""
    return frozenset(list(groups)[::2])


def _line(seen: Sequence[tuple[int, float]]) -> Callable[[int], float]:
    """Milliseconds of a number of elements: a time per call and one per element, both at least 0, by least squares of
    the relative error."""
    from scipy.optimize import nnls

    seen = [(elements, time) for elements, time in seen if time > 0]
    if not seen:
        return lambda elements: 0.0
    elements, times = (np.array(column, float) for column in zip(*seen, strict=True))
    scale = elements.max()
    (fixed, slope), _ = nnls(np.stack([1 / times, elements / scale / times], 1), np.ones(len(seen)))
    return lambda elements: float(fixed + slope * elements / scale)


def _elements(node: fx.Node, sizes: Mapping[Any, int]) -> int:
    return math.prod(s if isinstance(s, int) else int(s.node.expr.subs(sizes)) for s in shape_of(node))


def _smallest(program: Program) -> dict[Any, int]:
    """The dynamic dimensions at their smallest."""
    pairs = [
        (size, dim)
        for spec, node in zip(program.inputs, program.placeholders(), strict=True)
        for size, dim in zip(shape_of(node), spec.shape, strict=True)
    ]
    return {size.node.expr: dim[1] for size, dim in pairs if not isinstance(dim, int) and not isinstance(size, int)}


def _by_operator(program: Program, times: Mapping[str, float]) -> dict[str, float]:
    """Times of nodes -> of the operators of the model that they cover, each at the first one."""
    found: dict[str, float] = {}
    for node in program.graph.nodes:
        covers: Sequence[str] = node.meta.get(COVERS, ())
        if covers and node.name in times:
            found[covers[0]] = found.get(covers[0], 0.0) + times[node.name]
    return found
