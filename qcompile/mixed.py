"""Mixed precision: which layers to leave in float so that accuracy drops no more than it may, at the least latency.

Every rounding is tried alone, all else in float: what it changes the outputs by is its noise. Alone, because noise of
independent roundings adds up, so that the noise of any choice of layers is known from these; with all others
quantized, one layer's would be lost in the others'. Layers are then chosen by noise removed for millisecond spent, the
metric says how many of them are needed, and each is given up again if the metric can do without.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from qcompile.choices import Choice, Choices
from qcompile.costs import estimated, measured
from qcompile.device import lacks
from qcompile.errors import AccuracyWarning, ConfigError
from qcompile.inputs import flatten
from qcompile.ir import where
from qcompile.metrics import Checked
from qcompile.ops.real import BFLOAT16, FLOAT32
from qcompile.passes.base import Progress
from qcompile.quantizer import QuantizedModel, call
from qcompile.ranking import Left, ranked
from qcompile.simulation import Rounding, Simulation
from qcompile.stages import Stages
from qcompile.targets import Target

_SAMPLES = 16  # inputs that each rounding is tried on
_BLOCKS = 10  # in which two models are timed in turns

Finish = Callable[[QuantizedModel], Any]
"""An integer program -> a compiled model."""


def search(
    stages: Stages,
    metric: Checked,
    max_drop: float,
    target: Target,
    finish: Finish,
    progress: Progress | None,
) -> tuple[Any, Choices]:
    """The compiled model with the fewest milliseconds spent on layers in float, and what they are.

    Args:
        finish: compiles an integer program for `target`.

    Warns:
        AccuracyWarning: the metric drops by more than `max_drop`; the model is the best that was found.
    """
    return _Search(stages, metric, max_drop, target, finish, progress).result()


def check(max_drop: float | None, metric: Any, evaluation: Any, strict: bool) -> None:
    """Refuse settings of a search that contradict each other.

    Raises:
        ConfigError: names the setting.
    """
    if max_drop is None:
        given = [name for name, value in (("metric", metric), ("evaluation", evaluation)) if value is not None]
        if given:
            raise ConfigError(
                f"{given[0]} is given, but not how much accuracy may drop",
                where=given[0],
                remedy="pass max_accuracy_drop too, or leave it out",
            )
        return
    number = isinstance(max_drop, (int, float)) and not isinstance(max_drop, bool)
    if not number or not math.isfinite(max_drop) or max_drop < 0:
        raise ConfigError(
            f"max_accuracy_drop is {max_drop!r}",
            where="max_accuracy_drop",
            remedy="give how much lower than the float model's the metric may be, such as 0.01",
        )
    if metric is not None and (not callable(metric) or evaluation is not None):
        raise ConfigError(
            "both a metric and evaluation data are given" if callable(metric) else f"the metric is {metric!r}",
            where="metric",
            remedy="pass metric=a function of predict that has its own data, or evaluation= for the default metric",
        )
    if strict:
        raise ConfigError(
            "strict=True leaves no layer to choose", where="strict", remedy="leave strict or max_accuracy_drop out"
        )


class _Search:
    def __init__(
        self,
        stages: Stages,
        metric: Checked,
        max_drop: float,
        target: Target,
        finish: Finish,
        progress: Progress | None,
    ) -> None:
        self.stages, self.metric, self.max_drop = stages, metric, max_drop
        self.target, self.finish = target, finish
        self.runs = not lacks(target.machine, target.features)
        self.report = progress or (lambda step, done, total: None)
        self.simulation = Simulation(stages)
        self.groups = self.simulation.groups
        self.seen: list[list[Tensor]] = []
        self.known: dict[Left, float] = {}
        self.float_metric = metric(self._watched, "the float model")
        if not self.seen:
            raise ConfigError(
                "the metric did not call predict",
                where="metric",
                remedy="metric(predict) measures the model that predict(*inputs) stands for",
            )

    def result(self) -> tuple[Any, Choices]:
        int8, int8_metric = self._finished(frozenset())
        if self._meets(int8_metric):
            (time,) = self._milliseconds(int8)
            return int8, Choices((), self.max_drop, self.float_metric, int8_metric, int8_metric, time, time)
        costs = self._costs(int8) if self.groups else {}
        noise = self._noise()
        steps = ranked(self.simulation, noise, costs)
        model, left, reached = self._least(steps, costs) if steps else (int8, frozenset(), int8_metric)
        times = self._milliseconds(int8, model)
        bfloat16 = {row.node for row in model.coverage if row.kind == BFLOAT16}
        rows = [self._row(name, left, bfloat16, noise, costs[name]) for name in left]
        rows.sort(key=lambda row: (-row.gain, -row.noise, row.layer, row.operators))
        choices = Choices(tuple(rows), self.max_drop, self.float_metric, int8_metric, reached, times[0], times[1])
        if not choices.met:
            warnings.warn(
                f"the metric drops by {choices.drop:.4g}, not by at most {self.max_drop:g}, whatever stays float; "
                f"it is {self.float_metric:.4g} of the float model, and {reached:.4g} at best",
                AccuracyWarning,
                stacklevel=4,
            )
        return model, choices

    # --- metrics -----------------------------------------------------------------------------------

    def _watched(self, *args: Any, **kwargs: Any) -> Any:
        """The float model as it was captured; its first inputs are kept."""
        if len(self.seen) < _SAMPLES:
            flat = flatten((args, kwargs), [spec.name for spec in self.stages.captured.inputs])
            if flat is not None and all(isinstance(x, Tensor) for x in flat):
                self.seen.append([x.detach().clone() for x in flat])
        return call(self.stages.captured, self.stages.captured, args, kwargs)

    def _simulated(self, left: Left) -> float:
        """The metric where `left` is in float and all else is rounded as int8 is."""
        if left not in self.known:

            def predict(*args: Any, **kwargs: Any) -> Any:
                run = lambda *flat: self.simulation.run(left, flat)  # noqa: E731
                return call(self.stages.float, run, args, kwargs)

            self.known[left] = self.metric(predict, f"the model with {len(left)} layers in float")
        return self.known[left]

    def _finished(self, left: Left) -> tuple[Any, float]:
        """The compiled model, and its metric (of the integer program in eager PyTorch, for another machine)."""
        quantized = self.stages.integer(self._operators(left))
        model = self.finish(quantized)
        value = self.metric(model if self.runs else quantized, f"the compiled model with {len(left)} layers in float")
        return model, value

    def _meets(self, metric: float) -> bool:
        return self.float_metric - metric <= self.max_drop

    def _operators(self, left: Left) -> frozenset[str]:
        return frozenset(m.name for name in left for m in self.groups[name].members)

    # --- time --------------------------------------------------------------------------------------

    def _milliseconds(self, *models: Any) -> list[float] | list[None]:
        """Of a call of each, measured in turns; Nones where this machine cannot run them."""
        if not self.runs:
            return [None] * len(models)
        from qcompile.evaluation.timing import interleave  # which imports the compiler

        calls = [partial(model, *self.seen[0]) for model in models]
        return interleave(calls, _BLOCKS)

    def _costs(self, int8: Any) -> dict[str, float]:
        if not self.runs:
            return estimated(self.groups, int8.program, self.target.isa.lanes)
        real = self.finish(self.stages.integer(self._operators(frozenset(self.groups))))
        pairs = []
        for done, model in enumerate((int8, real)):
            self.report("time of each layer", done, 2)
            times: dict[str, float] = {}
            for row in model.profile(*self.seen[0]).rows:
                times[row.node] = times.get(row.node, 0.0) + 1e3 * row.seconds
            pairs.append((model.program, times))
        self.report("time of each layer", 2, 2)
        return measured(self.groups, *pairs)

    # --- the choice --------------------------------------------------------------------------------

    def _noise(self) -> dict[Rounding, float]:
        roundings = list(self.simulation.roundings())
        found = dict.fromkeys(roundings, 0.0)
        for done, sample in enumerate(self.seen):
            clean = self.simulation.clean(sample)
            for rounding in roundings:
                found[rounding] += self.simulation.noise(rounding, clean)
            self.report("noise of each layer", done + 1, len(self.seen))
        return found

    def _least(self, steps: list[Left], costs: Mapping[str, float]) -> tuple[Any, Left, float]:
        """The first of `steps` that does, less what can be spared of it; the best that was tried if none does."""
        at, more = self._first(steps), 1
        best = (*self._finished(steps[at]), steps[at])
        while not self._meets(best[1]) and at < len(steps) - 1:  # compiled it may be a little worse than simulated
            at, more = min(len(steps) - 1, at + more), 2 * more
            best = max(best, (*self._finished(steps[at]), steps[at]), key=lambda tried: tried[1])
        if self._meets(best[1]):
            smaller = self._pruned(best[2], costs)
            low, high = 0, len(smaller)  # the last one that does; to begin with, the very last
            middle = high - 1
            while low < high:
                tried = (*self._finished(smaller[middle]), smaller[middle])
                if self._meets(tried[1]):
                    best, low = tried, middle + 1
                else:
                    high = middle
                middle = (low + high) // 2
        model, reached, left = best
        return model, left, reached

    def _first(self, steps: list[Left]) -> int:
        """The first step that meets the target, if the metric only rises from step to step; by bisection, after a
        gallop because few steps usually do."""
        high = 0
        while high < len(steps) - 1 and not self._meets(self._simulated(steps[high])):
            self.report("layers needed", high + 1, None)
            high = min(2 * high + 1, len(steps) - 1)
        low = (high - 1) // 2 + 1 if high else 0
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._meets(self._simulated(steps[middle])) else (middle + 1, high)
        return high

    def _pruned(self, left: Left, costs: Mapping[str, float]) -> list[Left]:
        """Ever smaller parts of `left` that still do, as far as the simulation can tell: without half of the layers,
        if it can do without them all, else without quarters, and so on; those that cost most are tried together."""
        least = min(self.float_metric - self.max_drop, self._simulated(left))
        found: list[Left] = []

        def spare(names: list[str]) -> None:
            now = found[-1] if found else left
            if self._simulated(now.difference(names)) >= least:
                found.append(now.difference(names))
            elif len(names) > 1:
                half = len(names) // 2
                spare(names[:half])
                spare(names[half:])
            self.report("layers that are needed", len(found[-1] if found else left), len(left))

        spare(sorted(left, key=lambda name: (-costs[name], name)))
        return found

    def _row(
        self, name: str, left: Left, bfloat16: Collection[str], noise: Mapping[Rounding, float], cost: float
    ) -> Choice:
        group = self.groups[name]
        nodes = (*group.members, *group.inputs)
        own = sum(value for rounding, value in noise.items() if rounding.node in nodes)
        total = sum(noise.values())
        gain = self._simulated(left) - self._simulated(left - {name})
        numerics = BFLOAT16 if group.root.name in bfloat16 else FLOAT32
        operators = tuple(m.name for m in group.members)
        return Choice(where(group.root), operators, numerics, gain, own / total if total else 0.0, cost)
