"""Mixed precision: which layers to leave in float so that accuracy drops no more than it may, at the least latency.

Every rounding is tried alone, all else in float: what it changes the outputs by is its noise. Alone, because noise of
independent roundings adds up, so that the noise of any choice of layers is known from these; with all others
quantized, one layer's would be lost in the others'. For any noise, the choice that costs least is then found exactly.
The metric says how little noise is needed, and each layer is given up again if the metric can do without.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from qcompile.choices import Choice, Choices
from qcompile.costs import Costs, Timed, estimated, every_second, measured
from qcompile.device import lacks
from qcompile.errors import AccuracyWarning, ConfigError
from qcompile.inputs import arrange
from qcompile.ir import where
from qcompile.metrics import Checked
from qcompile.ops.real import BFLOAT16, FLOAT32
from qcompile.passes.base import Progress
from qcompile.quantizer import QuantizedModel, call
from qcompile.simulation import Rounding, Simulation
from qcompile.stages import Stages
from qcompile.targets import Target
from qcompile.tradeoff import GAP, Left, Tradeoff

_SAMPLES = 16  # inputs that each rounding is tried on
_BLOCKS = 10  # in which models are timed in turns
_STEPS, _RATIO = 100, 2**-0.25  # of noise: each step has so much of the last one's, and the last of all has none
_EXCHANGES = 3  # at most
_FINALISTS = 3  # of the compiled models that do, which are timed in turns
_FASTER = 0.98  # of the time of the choice that should be faster: below this another one is believed to be

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


class _Found(NamedTuple):
    """A compiled model, the layers that are in float in it, and its metric."""

    model: Any
    left: Left
    metric: float


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
        int8 = self._finished(frozenset())
        if self._meets(int8.metric):
            (time,) = self._milliseconds(int8.model)
            return int8.model, Choices((), self.max_drop, self.float_metric, int8.metric, int8.metric, time, time)
        found, noise, costs = int8, dict[Rounding, float](), Costs({}, {}, {})
        if self.groups:
            costs, noise = self._costs(int8.model), self._noise()
            found = self._least(Tradeoff(self.simulation, noise, costs))
        times = self._milliseconds(int8.model, found.model)
        bfloat16 = {row.node for row in found.model.coverage if row.kind == BFLOAT16}
        rows = [self._row(name, found.left, bfloat16, noise, costs.layers[name]) for name in found.left]
        rows.sort(key=lambda row: (-row.gain, -row.noise, row.layer, row.operators))
        choices = Choices(tuple(rows), self.max_drop, self.float_metric, int8.metric, found.metric, times[0], times[1])
        if not choices.met:
            warnings.warn(
                f"the metric drops by {choices.drop:.4g}, not by at most {self.max_drop:g}, "
                f"whichever of the {len(self.groups)} layers that could stay float do; "
                f"it is {self.float_metric:.4g} of the float model, and {found.metric:.4g} at best",
                AccuracyWarning,
                stacklevel=4,
            )
        return found.model, choices

    # --- metrics -----------------------------------------------------------------------------------

    def _watched(self, *args: Any, **kwargs: Any) -> Any:
        """The float model as it was captured; its first inputs are kept."""
        if len(self.seen) < _SAMPLES:
            flat = arrange(args, kwargs, self.stages.captured.inputs)
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

    def _finished(self, left: Left) -> _Found:
        """The metric is that of the integer program in eager PyTorch, for another machine."""
        quantized = self.stages.integer(self._operators(left))
        model = self.finish(quantized)
        value = self.metric(model if self.runs else quantized, f"the compiled model with {len(left)} layers in float")
        return _Found(model, left, value)

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

    def _costs(self, int8: Any) -> Costs:
        tensors = self.simulation.activations
        if not self.runs:
            return estimated(self.groups, tensors, int8.program, self.target.isa.lanes)
        timed: list[Timed] = []
        for left in (frozenset[str](), frozenset(self.groups), every_second(self.groups)):
            self.report("time of each layer", len(timed), 3)
            model = self.finish(self.stages.integer(self._operators(left))) if left else int8
            times: dict[str, float] = {}
            for row in model.profile(*self.seen[0]).rows:
                times[row.node] = times.get(row.node, 0.0) + 1e3 * row.seconds
            timed.append((model.program, times))
        self.report("time of each layer", 3, 3)
        return measured(self.groups, tensors, *timed)

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

    def _least(self, tradeoff: Tradeoff) -> _Found:
        """The fastest that was found of those that do; the best that was tried if none does."""
        step = _Steps(tradeoff)
        at, more = self._first(step), 1
        best = self._finished(step[at])
        while not self._meets(best.metric) and at < len(step) - 1:  # compiled it may be a little worse than simulated
            at, more = min(len(step) - 1, at + more), 2 * more
            best = max(best, self._finished(step[at]), key=lambda found: found.metric)
        if not self._meets(best.metric):
            return best
        found, cheaper = [best], self._cheaper(best.left, tradeoff)
        low, high = 0, len(cheaper)  # the last one that does; to begin with, the very last
        middle = high - 1
        while low < high:
            tried = self._finished(cheaper[middle])
            if self._meets(tried.metric):
                found, low = [*found, tried][-_FINALISTS:], middle + 1
            else:
                high = middle
            middle = (low + high) // 2
        return self._fastest(found)

    def _fastest(self, found: list[_Found]) -> _Found:
        """The last of `found`, which should be the fastest, unless another one is when they are called in turns."""
        times = self._milliseconds(*(f.model for f in found)) if len(found) > 1 else []
        best = found[-1]
        for candidate, time in zip(found, times, strict=False):
            if time is not None and time < _FASTER * times[-1]:  # type: ignore[operator]
                best, times[-1] = candidate, time / _FASTER  # type: ignore[call-overload]
        return best

    def _first(self, steps: Sequence[Left]) -> int:
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

    def _cheaper(self, left: Left, tradeoff: Tradeoff) -> list[Left]:
        """Ever cheaper choices than `left` that still do, as far as the simulation can tell: without layers that can be
        spared; then others that leave no more noise than what is left, without layers that these can spare."""
        least = min(self.float_metric - self.max_drop, self._simulated(left))
        found = self._spared(left, least, tradeoff)
        for _ in range(_EXCHANGES):
            now = found[-1] if found else left
            other = tradeoff.cheapest(tradeoff.noise(now) * (1 + GAP))
            if tradeoff.cost(other) >= (1 - GAP) * tradeoff.cost(now) or self._simulated(other) < least:
                break
            found += [other, *self._spared(other, least, tradeoff)]
        return found

    def _spared(self, left: Left, least: float, tradeoff: Tradeoff) -> list[Left]:
        """Ever smaller parts of `left` with a metric of at least `least`: without half of the layers, if it can do
        without them all, else without quarters, and so on; those that cost most are tried together. A layer whose
        conversions would cost more than it saves is kept."""
        found: list[Left] = []
        dear: set[str] = set()  # kept for their conversions, which may be another matter once others are given up

        def spare(names: list[str]) -> None:
            now = found[-1] if found else left
            smaller = now.difference(names)
            saves = tradeoff.cost(smaller) < tradeoff.cost(now)
            if saves and self._simulated(smaller) >= least:
                found.append(smaller)
            elif len(names) > 1:
                half = len(names) // 2
                spare(names[:half])
                spare(names[half:])
            elif not saves:
                dear.update(names)
            self.report("layers that are needed", len(found[-1] if found else left), len(left))

        saves = {name: tradeoff.cost(left) - tradeoff.cost(left - {name}) for name in left}
        names = sorted(left, key=lambda name: (-saves[name], name))
        while names:
            dear.clear()
            before = len(found)
            spare(names)
            names = [name for name in names if name in dear] if len(found) > before else []
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


class _Steps(Sequence[Left]):
    """The cheapest choices for ever less noise; the last one leaves none."""

    def __init__(self, tradeoff: Tradeoff) -> None:
        self._tradeoff, self._known = tradeoff, dict[int, Left]()

    def __len__(self) -> int:
        return _STEPS

    def __getitem__(self, at: Any) -> Any:
        if at not in self._known:
            noise = 0.0 if at == _STEPS - 1 else self._tradeoff.noise(()) * _RATIO ** (at + 1)
            self._known[at] = self._tradeoff.cheapest(noise)
        return self._known[at]
