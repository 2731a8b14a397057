"""evaluate(): a compiled model against the float model it came from: quality, robustness, speed, storage, layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from qcompile.compiled import CompiledModel
from qcompile.errors import ConfigError, InputError
from qcompile.evaluation import shifts
from qcompile.evaluation.diagnosis import Diagnosis, finish, start
from qcompile.evaluation.feed import Piece, pieces, runnable
from qcompile.evaluation.layers import Comparison
from qcompile.evaluation.quality import Meter, Metric
from qcompile.evaluation.results import Evaluation
from qcompile.evaluation.shifts import Shift
from qcompile.evaluation.timing import file_size, interleave
from qcompile.passes.base import Progress
from qcompile.runtime import Model

CLEAN = ""  # the name of no shift


@torch.no_grad()
def evaluate(
    compiled: Model,
    model: nn.Module | ExportedProgram,
    data: Iterable[Any],
    *,
    labels: bool | str = False,
    robustness: bool | Mapping[str, Shift] = False,
    metric: Metric | Mapping[str, Metric] | None = None,
    layers: int = 0,
    blocks: int = 10,
    progress: Progress | None = None,
) -> Evaluation:
    """Compare `compiled` with `model` on `data`.

    Args:
        compiled: from `qcompile.compile` or `qcompile.load`.
        model: the float model, in eval mode.
        data: batches as calibration takes them, read once. The first is also timed.
        labels: each batch is a pair (inputs, class indices), and accuracy, precision, recall and F1 are wanted.
            Of a model with several outputs, the name of the one that has the scores; True is the first.
        robustness: compare under shifts of the inputs, too: True for noise, and for images blur, brightness and
            contrast; or a mapping of names to functions of one input. Each shift costs as much as `data` itself.
        metric: a function of (outputs, labels or None) of a batch, or several by name; averaged over the samples.
        layers: also compare every layer, on the first so many samples; see `qcompile.diagnose`.
        blocks: how many times each model is timed, in turns; 0 for no timing.
        progress: called with (step, done, total or None) after each batch.

    Raises:
        InputError: there is no data; or a batch, its labels, a metric or a shift is wrong, and the error says which.
        ConfigError: an option is out of its range. DeviceError: the model was compiled for another machine.
    """
    if not isinstance(compiled, Model):
        raise InputError(
            f"the compiled model is a {type(compiled).__name__}",
            remedy="pass what qcompile.compile or qcompile.load returned",
        )
    if labels == "":
        remedy = "give True, or the name of the output that they are for"
        raise ConfigError("labels is ''", where="labels", remedy=remedy)
    for name, value in (("layers", layers), ("blocks", blocks)):
        if not isinstance(value, int) or value < 0:
            raise ConfigError(f"{name} is {value!r}", where=name, remedy="give a whole number, 0 or more")
    network = runnable(model)
    run = _Run(compiled, labels, robustness, _metrics(metric))
    diagnosing = _Layers(compiled, model, layers)
    first: Piece | None = None
    samples = 0
    for piece in pieces(data, compiled.inputs, network, labels=bool(labels), progress=progress):
        first = first or piece
        run.add(piece, network)
        diagnosing.add(piece)
        samples += piece.samples
    assert first is not None  # a feed without data raises
    float_ms, int8_ms = _times(compiled, network, first, blocks) if blocks else (None, None)
    qualities = {name: meter.quality() for name, meter in run.meters.items()}
    return Evaluation(
        samples=samples,
        quality=qualities.pop(CLEAN),
        shifts=qualities,
        float_ms=float_ms,
        int8_ms=int8_ms,
        float_bytes=file_size(model),
        int8_bytes=len(compiled.artifact.to_bytes()),
        target=compiled.target,
        coverage=compiled.coverage,
        diagnosis=diagnosing.diagnosis(),
        notes=tuple(note for note in (run.note, diagnosing.note) if note),
    )


def _metrics(metric: Metric | Mapping[str, Metric] | None) -> dict[str, Metric]:
    if metric is None:
        return {}
    named = dict(metric) if isinstance(metric, Mapping) else {getattr(metric, "__name__", "metric"): metric}
    if not all(map(callable, named.values())):
        raise ConfigError(
            f"metric is {metric!r}", where="metric", remedy="give a function of (outputs, labels), or a dict of some"
        )
    return named


def _times(compiled: Model, network: nn.Module, piece: Piece, blocks: int) -> list[float]:
    flat = piece.flat
    calls: list[Callable[[], object]] = [
        lambda: network(*piece.positional, **piece.named),
        lambda: compiled(*flat),
    ]
    return interleave(calls, blocks)


class _Run:
    """Both models on every piece, and on its shifts. `note` says what was left out, and why."""

    def __init__(
        self,
        compiled: Model,
        labels: bool | str,
        robustness: bool | Mapping[str, Shift],
        metrics: dict[str, Metric],
    ) -> None:
        self._compiled, self._metrics = compiled, metrics
        self._labelled = None if labels is False else "" if labels is True else labels
        self._shifts = shifts.resolve(robustness)
        self.note: str | None = None
        self.meters = {CLEAN: self._meter()}

    def _meter(self) -> Meter:
        return Meter(self._compiled.artifact.output_structure, self._labelled, self._metrics)

    def add(self, piece: Piece, network: nn.Module) -> None:
        if self._shifts is None:
            self._shifts, self.note = shifts.usual(piece.flat)
        self._compare(CLEAN, piece, network)
        for name, shift in self._shifts.items():
            self.meters.setdefault(name, self._meter())
            self._compare(name, shifts.shifted(piece, name, shift), network)

    def _compare(self, name: str, piece: Piece, network: nn.Module) -> None:
        expected = network(*piece.positional, **piece.named)
        place = f"{piece.place}, shift {name!r}" if name else piece.place
        self.meters[name].add(expected, self._compiled(*piece.flat), piece.labels, place, piece.samples)


class _Layers:
    """The comparison of layers on the first samples, where it is wanted and possible. `note` says why not."""

    def __init__(self, compiled: Model, model: nn.Module | ExportedProgram, wanted: int) -> None:
        self._compiled, self._model, self._left = compiled, model, wanted
        self._comparison: Comparison | None = None
        self._samples = 0
        self.note: str | None = None
        if not wanted:
            self.note = "layers were not compared: they were not asked for (layers=16, or --calibration)"
        elif not isinstance(compiled, CompiledModel):
            self._left = 0
            self.note = (
                "layers were not compared: a model from a file holds machine code and no layers; "
                "evaluate what qcompile.compile returned"
            )
        elif compiled.recipe is None:
            self._left = 0
            self.note = (
                "layers were not compared: the model was trained as int8 or quantized elsewhere, "
                "so its layers have no float counterparts"
            )

    def add(self, piece: Piece) -> None:
        if self._left <= 0:
            return
        assert isinstance(self._compiled, CompiledModel)
        self._comparison = self._comparison or start(self._compiled, self._model, piece)
        self._comparison.add(list(piece.flat))
        self._samples += piece.samples
        self._left -= piece.samples

    def diagnosis(self) -> Diagnosis | None:
        if self._comparison is None:
            return None
        assert isinstance(self._compiled, CompiledModel)
        return finish(self._compiled.program, self._comparison, self._samples)
