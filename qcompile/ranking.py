"""In which order layers are worth leaving in float: by the noise that goes away for each millisecond.

A rounding of an activation goes away only when the layer that computes it and those that read it are all in float, so
such sets of layers are candidates too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import fx

from qcompile.simulation import Rounding, Simulation, shares_scale
from qcompile.sites import Group

Left = frozenset[str]  # the names of the groups that are left in float


def ranked(simulation: Simulation, noise: Mapping[Rounding, float], costs: Mapping[str, float]) -> list[Left]:
    """Growing choices of layers, from one to all: each adds the layer, or the layers around one activation, that
    remove most noise for a millisecond."""
    groups = simulation.groups
    weights = {r.node.name: value for r, value in noise.items() if r.weights}
    tensors = {r.node: value for r, value in noise.items() if not r.weights}
    producers = {g.tail: name for name, g in groups.items()}
    readers: dict[fx.Node, list[str]] = {tensor: [] for tensor in tensors}
    for name, group in groups.items():
        for tensor in group.inputs:
            readers[tensor].append(name)
    around = {tensor: _around(tensor, groups, producers, readers) for tensor in tensors}
    candidates = [*(frozenset({name}) for name in groups), *around.values()]
    candidates = list(dict.fromkeys(c for c in candidates if c))

    def remaining(left: Collection[str]) -> float:
        total = sum(value for name, value in weights.items() if name not in left)
        for tensor, value in tensors.items():
            producer = producers.get(tensor)
            made = producer is not None and producer not in left
            if made and shares_scale(groups[producer]):  # type: ignore[index]
                continue  # rounded already
            if made or any(name not in left for name in readers[tensor]):
                total += value
        return total

    left: Left = frozenset()
    steps = []
    now = remaining(left)
    while len(left) < len(groups):
        best: tuple[float, Left, float] | None = None
        for candidate in candidates:
            new = candidate - left
            if new:
                then = remaining(left | new)
                worth = (now - then) / sum(costs[name] for name in sorted(new))
                if best is None or worth > best[0]:
                    best = worth, new, then
        assert best is not None
        left, now = left | best[1], best[2]
        steps.append(left)
    return steps


def _around(
    tensor: fx.Node,
    groups: Mapping[str, Group],
    producers: Mapping[fx.Node, str],
    readers: Mapping[fx.Node, list[str]],
) -> Left:
    """The groups that must be in float so that the values of `tensor` are never rounded: those that make and read it,
    and, through operators that only move values, those that make and read the same values under another name."""
    found: set[str] = set()
    todo, seen = [tensor], {tensor}
    while todo:
        at = todo.pop()
        near = [*readers[at], *([producers[at]] if at in producers else [])]
        for name in near:
            found.add(name)
            group = groups[name]
            if shares_scale(group):
                for other in (group.operands[0], group.tail):
                    if other not in seen and other in readers:
                        seen.add(other)
                        todo.append(other)
    return frozenset(found)
