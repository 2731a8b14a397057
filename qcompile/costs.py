"""What leaving a layer in float costs, in milliseconds of a call: measured here, or estimated for another machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qcompile.ir import Program, shape_of
from qcompile.profiling import multiply_accumulates
from qcompile.sites import COVERS, Group

_BYTES = 4.0  # a float has four times the bytes of an int8: the cost of an operator without a float kernel of our own
_LEAST = 1e-3  # of the whole network: below this a difference of two measurements says nothing
_GIGAHERTZ = 1e6  # cycles in a millisecond, where nothing can be measured


def measured(
    groups: Mapping[str, Group], integer: tuple[Program, Mapping[str, float]], real: tuple[Program, Mapping[str, float]]
) -> dict[str, float]:
    """Group -> milliseconds that it is slower in float, from the times of nodes (milliseconds) of two programs: with
    every layer quantized, and with none."""
    int8, float32 = (_by_operator(program, times) for program, times in (integer, real))
    least = _LEAST * sum(integer[1].values())
    costs = {}
    for name, group in groups.items():
        before = int8.get(name, 0.0)
        after = sum(float32.get(member.name, 0.0) for member in group.members) or _BYTES * before
        costs[name] = max(after - before, least)
    return costs


def estimated(groups: Mapping[str, Group], program: Program, lanes: int) -> dict[str, float]:
    """The same without a machine: one product a lane and cycle in float and four in int8, at 1 GHz.

    Args:
        program: the integer program.
        lanes: 32-bit lanes of a vector.
    """
    nodes = {covered: node for node in program.graph.nodes for covered in node.meta.get(COVERS, ())}
    sizes = _smallest(program)
    costs = {}
    for name in groups:
        macs = multiply_accumulates(nodes[name], sizes) if name in nodes else 0
        costs[name] = max(macs * (1 - 1 / _BYTES), 1.0) / lanes / _GIGAHERTZ
    return costs


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
