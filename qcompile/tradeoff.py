"""The choice of layers that costs least among those that leave little noise: a mixed-integer linear program.

Each layer g has a variable x_g, 1 in float and 0 in int8. All else follows from these. A layer in float takes time, and
so does a tensor that some hold as int8 and others read as float. Weights make noise where their layer is int8; an
activation does where the layer that computes it, or one that reads it, is int8. Each such thing is a `Term`: it is
there if one of its conditions holds, each of which asks that some layers be in float and others be int8:

    y >= sum_{g float} x_g + sum_{g int8} (1 - x_g) - (how many it asks for) + 1        for each condition
    minimize sum of cost * y        such that sum of noise * y <= budget

The solver (HiGHS, by scipy) proves its answer: nothing that leaves no more noise costs less. Branch and bound: Land and
Doig, *An Automatic Method of Solving Discrete Programming Problems* (1960).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import fx

from qcompile.costs import Costs
from qcompile.simulation import Rounding, Simulation, shares_scale

Left = frozenset[str]  # the names of the groups that are left in float

GAP = 1e-3  # how far, relative to its cost, the answer may be from the best one
_SECONDS = 10.0  # for one answer
_FAR_TOO_MUCH = 2.0  # times the budget; larger numbers only blur the solver's arithmetic


@dataclass(frozen=True)
class Term:
    """Something that costs time, or makes noise, if one of its conditions holds.

    Attributes:
        value: milliseconds, or noise.
        conditions: pairs of the layers that have to be in float and those that have to be int8.
    """

    value: float
    conditions: tuple[tuple[Left, Left], ...]

    def of(self, left: Collection[str]) -> float:
        """Its value where `left` is in float and all else int8, 0 if no condition holds."""
        holds = any(all(g in left for g in real) and not any(g in left for g in int8) for real, int8 in self.conditions)
        return self.value if holds else 0.0


class Tradeoff:
    """Between the time and the noise of choices of layers.

    Args:
        noise: of each rounding alone; independent noise adds up.
    """

    def __init__(self, simulation: Simulation, noise: Mapping[Rounding, float], costs: Costs) -> None:
        self.layers = tuple(simulation.groups)
        self._network = _Network(simulation)
        self.costs = tuple(_costs(self._network, costs))
        self.noises = tuple(_noises(self._network, noise))

    def cost(self, left: Collection[str]) -> float:
        """Milliseconds that a call takes longer than without any layer or conversion in float."""
        return sum(term.of(left) for term in self.costs)

    def noise(self, left: Collection[str]) -> float:
        """What the roundings that are left change the outputs by."""
        return sum(term.of(left) for term in self.noises)

    def cheapest(self, noise: float) -> Left:
        """The choice of least cost among those that leave at most so much noise, but for `GAP` (all layers, should the
        solver find none in time)."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        if noise <= 0:
            return frozenset(self.layers)
        matrix, least = self._conditions
        weights = np.minimum([t.value / noise for t in self.noises], _FAR_TOO_MUCH)
        first = len(self.layers) + len(self.costs)
        budget = np.concatenate([np.zeros(first), weights])
        most = max((t.value for t in self.costs), default=1.0) or 1.0
        objective = np.zeros(len(budget))
        objective[len(self.layers) : first] = [t.value / most for t in self.costs]
        binary = np.arange(len(budget)) < len(self.layers)
        found = milp(
            objective,
            integrality=binary.astype(int),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(matrix, least, np.inf), LinearConstraint(budget[None], -np.inf, 1.0)],
            options={"mip_rel_gap": GAP, "time_limit": _SECONDS},
        )
        if found.x is None:
            return frozenset(self.layers)
        return frozenset(name for name, x in zip(self.layers, found.x, strict=False) if x > 0.5)

    @cached_property
    def _conditions(self) -> tuple[object, np.ndarray]:
        """Matrix and lower bounds: a row says that its term's y is 1 if the condition holds."""
        from scipy.sparse import csr_array

        at = {name: i for i, name in enumerate(self.layers)}
        entries: list[tuple[int, int, float]] = []
        least: list[float] = []
        for column, term in enumerate((*self.costs, *self.noises), len(at)):
            for real, int8 in term.conditions:
                row = len(least)
                entries.append((row, column, 1.0))
                entries += [(row, at[g], -1.0) for g in sorted(real)] + [(row, at[g], 1.0) for g in sorted(int8)]
                least.append(1.0 - len(real))
        rows, columns, values = zip(*entries, strict=True)
        shape = len(least), len(at) + len(self.costs) + len(self.noises)
        return csr_array((values, (rows, columns)), shape=shape), np.array(least)


class _Network:
    """Who computes and who reads each activation that may be int8.

    Attributes:
        producer: tensor -> the layer that computes it, where one does.
        readers: tensor -> the layers that read it.
        elsewhere: the tensors that something else than a layer reads, always as float.
        moved: the tensors that hold values of another one, which were rounded there if their layer is int8.
    """

    def __init__(self, simulation: Simulation) -> None:
        groups = simulation.groups
        self.tensors = tuple(simulation.activations)
        self.producer = {g.tail: name for name, g in groups.items()}
        self.readers: dict[fx.Node, list[str]] = {tensor: [] for tensor in self.tensors}
        for name, group in groups.items():
            for tensor in dict.fromkeys(group.inputs):
                self.readers[tensor].append(name)
        members = {member for group in groups.values() for member in group.members}
        self.elsewhere = {t for t in self.tensors if any(user not in members for user in t.users)}
        self.moved = {group.tail for group in groups.values() if shares_scale(group)}

    def enters(self, tensor: fx.Node) -> list[tuple[Left, Left]]:
        """When `tensor`, which exists as float, is made int8: for one of its readers."""
        makers = frozenset({self.producer[tensor]} if tensor in self.producer else ())
        return [(makers, frozenset({reader})) for reader in self.readers[tensor]]

    def leaves(self, tensor: fx.Node) -> list[tuple[Left, Left]]:
        """When `tensor`, which exists as int8, is made float."""
        if tensor not in self.producer:
            return []
        maker = frozenset({self.producer[tensor]})
        always = [(frozenset[str](), maker)] if tensor in self.elsewhere else []
        return always or [(frozenset({reader}), maker) for reader in self.readers[tensor]]


def _costs(network: _Network, costs: Costs) -> Iterator[Term]:
    for name, value in costs.layers.items():
        yield Term(value, ((frozenset({name}), frozenset()),))
    for tensor in network.tensors:
        yield from _term(costs.quantize[tensor], network.enters(tensor))
        yield from _term(costs.dequantize[tensor], network.leaves(tensor))


def _noises(network: _Network, noise: Mapping[Rounding, float]) -> Iterator[Term]:
    for rounding, value in noise.items():
        if rounding.weights:
            yield Term(value, ((frozenset(), frozenset({rounding.node.name})),))
            continue
        tensor = rounding.node
        made = tensor in network.producer and tensor not in network.moved
        maker = [(frozenset[str](), frozenset({network.producer[tensor]}))] if made else []
        yield from _term(value, [*maker, *network.enters(tensor)])


def _term(value: float, conditions: Iterable[tuple[Left, Left]]) -> Iterator[Term]:
    conditions = tuple(conditions)
    if conditions and value > 0:
        yield Term(value, conditions)
