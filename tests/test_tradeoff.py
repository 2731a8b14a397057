"""The choice of layers that costs least for its noise: against every choice there is, and against the programs."""

from __future__ import annotations

import itertools
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from passing import randn
from torch import Tensor, fx, nn

from qcompile.costs import Costs, measured
from qcompile.quantizer import prepared
from qcompile.simulation import Rounding, Simulation
from qcompile.stages import Stages
from qcompile.targets import get
from qcompile.targets.capability import objection
from qcompile.tradeoff import GAP, Left, Tradeoff

q = torch.ops.qcompile


class Branches(nn.Module):
    """A residual sum, a value with three readers, pooling, and an operator that always stays float."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.stem, self.body, self.skip = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.tail, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6 * 25, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x).relu()
        y = self.body(x) + x + self.skip(x)
        z = nn.functional.max_pool2d(self.tail(y), 2)
        return self.head(z.flatten(1)), torch.cumsum(y, 1)


@cache
def simulated() -> tuple[Stages, Simulation]:
    calibration = [randn(4, 3, 12, 12, seed=s) for s in range(5)]
    stages = Stages(*prepared(Branches().eval(), None, calibration, None, None, None, objection(get("native")), None))
    return stages, Simulation(stages)


def tradeoff(generator: np.random.Generator | None = None, conversions: float = 0.0) -> Tradeoff:
    """With random costs and noise; or with costs of conversions only."""
    simulation = simulated()[1]

    def some(keys: Any, fixed: float) -> dict[Any, float]:
        return {key: fixed if generator is None else float(generator.exponential()) for key in keys}

    tensors = list(simulation.activations)
    costs = Costs(some(simulation.groups, 0.0), some(tensors, conversions), some(tensors, conversions))
    return Tradeoff(simulation, some(simulation.roundings(), 1.0), costs)


def every_choice(names: Any) -> list[Left]:
    return [frozenset(c) for n in range(len(names) + 1) for c in itertools.combinations(names, n)]


@pytest.mark.parametrize("seed", range(4))
def test_nothing_that_leaves_no_more_noise_costs_less(seed: int) -> None:
    made = tradeoff(np.random.default_rng(seed))
    choices = [(made.cost(c), made.noise(c)) for c in every_choice(made.layers)]
    assert len(choices) >= 2**7
    for part in (0.9, 0.5, 0.2, 0.05, 0.0):
        budget = part * made.noise(())
        found = made.cheapest(budget)
        assert made.noise(found) <= budget * (1 + 1e-5)
        assert made.cost(found) <= (1 + GAP) * min(cost for cost, noise in choices if noise <= budget) + 1e-9


def test_the_conversions_of_a_choice_are_those_of_its_program() -> None:
    """Pooling and flattening go with the linear layer: between floats the passes would keep them float anyway."""
    stages, simulation = simulated()
    made = tradeoff(conversions=1.0)
    generator = torch.Generator().manual_seed(2)
    light = {name for name, group in simulation.groups.items() if group.row.weight_arg is None}
    assert len(light) >= 2
    for _ in range(16):
        left = {n for n in made.layers if n not in light and torch.rand(1, generator=generator) < 0.5}
        left |= light if "linear" in left else set()
        operators = frozenset(m.name for name in left for m in simulation.groups[name].members)
        kinds = [node.target for node in stages.integer(operators).program.graph.nodes]
        assert made.cost(left) == sum(kind in (q.quantize.default, q.dequantize.default) for kind in kinds)


def test_a_rounding_makes_noise_until_all_layers_around_it_are_in_float() -> None:
    simulation = simulated()[1]
    tensor = next(iter(simulation.groups.values())).tail
    readers = {name for name, group in simulation.groups.items() if tensor in group.inputs}
    maker = next(name for name, group in simulation.groups.items() if group.tail is tensor)
    assert len(readers) >= 2
    costs = Costs(dict.fromkeys(simulation.groups, 1.0), *[dict.fromkeys(simulation.activations, 0.0)] * 2)
    made = Tradeoff(simulation, {Rounding(tensor, False): 3.0}, costs)
    around = readers | {maker}
    assert made.noise(around) == 0.0
    assert all(made.noise(around - {name}) == 3.0 for name in around)
    assert made.cheapest(1.0) == around


def test_the_time_of_a_conversion_follows_its_size() -> None:
    """Of measurements that lie on a line, the line is found."""
    simulation = simulated()[1]
    program = _conversions([(100,), (300,), (1000,)])
    times = {n.name: 0.5 + 0.002 * n.meta["val"].numel() for n in program.graph.nodes if n.op == "call_function"}
    costs = measured(
        simulation.groups, list(simulation.activations), (program, times), (program, times), (program, times)
    )
    for tensor, time in costs.quantize.items():
        assert time == pytest.approx(0.5 + 0.002 * tensor.meta["val"].numel(), rel=1e-6)


def _conversions(shapes: list[tuple[int, ...]]) -> Any:
    graph = fx.Graph()
    for i, shape in enumerate(shapes):
        x = graph.placeholder(f"x{i}")
        x.meta["val"] = torch.empty(shape)
        node = graph.call_function(q.quantize.default, (x, 1.0, 0))
        node.meta["val"] = torch.empty(shape, dtype=torch.int8)
    return SimpleNamespace(graph=graph, inputs=[], placeholders=lambda: [])
