"""What is measured of outputs, added up over batches: SQNR, agreement, scores, and metrics of the user's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import InputError
from qcompile.evaluation.scores import Confusion, Scores, check_labels, has_classes

Metric = Callable[[Any, Tensor | None], float]
"""Called with the outputs of a batch, nested as the model nests them, and its labels (None without labels); returns
a number, of which the mean over all samples is taken."""


class Powers:
    """Signal and noise of one tensor, in float64."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0

    def add(self, expected: Tensor, error: Tensor) -> None:
        """Where `expected` is not finite (a mask of infinities), nothing is counted."""
        finite = torch.isfinite(expected)
        if not finite.all():
            expected, error = expected[finite], error[finite]
        self.signal += float(expected.double().square().sum())
        self.noise += float(error.double().square().sum())

    @property
    def sqnr(self) -> float:
        """10 log10(signal / noise), dB; infinite without noise, minus infinite where all is noise (or not finite)."""
        if self.noise == 0.0:
            return math.inf
        if self.signal == 0.0 or not math.isfinite(self.noise):
            return -math.inf
        return 10.0 * math.log10(self.signal / self.noise)


@dataclass(frozen=True)
class OutputQuality:
    """How one output of the int8 network follows that of the float network.

    Attributes:
        name: its place in what the model returns: "output", "0", "boxes.1".
        sqnr: signal to quantization noise ratio in dB, 10 log10(sum y^2 / sum (y - y_int8)^2); infinite when they
            are equal. None for whole numbers.
        agreement: the part of the answers that are the same: the largest score along dimension 1; of whole
            numbers, the elements. None where there are no classes.
    """

    name: str
    sqnr: float | None
    agreement: float | None


@dataclass(frozen=True)
class Quality:
    """The int8 network beside the float network, on the same inputs.

    Attributes:
        outputs: each output of the model.
        float_scores, int8_scores: against the labels; None without labels.
        metrics: name -> (float, int8) of the metrics that the caller gave.
    """

    outputs: tuple[OutputQuality, ...]
    float_scores: Scores | None
    int8_scores: Scores | None
    metrics: Mapping[str, tuple[float, float]]

    @property
    def worst(self) -> OutputQuality:
        """The output with the lowest SQNR."""
        return min(self.outputs, key=lambda o: math.inf if o.sqnr is None else o.sqnr)


def leaves(structure: Any, value: Any, path: str = "") -> dict[str, Any]:
    """The flat outputs by their place, of `value` that nests as `Program.output_structure` says."""
    if structure is None:
        return {}
    if isinstance(structure, int):
        return {path or "output": value}
    ((kind, inner),) = structure.items()
    found: dict[str, Any] = {}
    parts: Iterable[tuple[Any, Any]] = inner.items() if kind == "dict" else enumerate(inner)
    for key, part in parts:
        below = f"{path}.{key}" if path else str(key)
        by_name = kind == "dict" and not isinstance(value, Mapping)
        found |= leaves(part, getattr(value, key) if by_name else value[key], below)
    return found


class Meter:
    """Takes outputs of both networks, batch by batch."""

    def __init__(self, structure: Any, labelled: str | None, metrics: Mapping[str, Metric]) -> None:
        """`labelled`: the output that labels are for; "" for the first."""
        self._structure, self._labelled, self._metrics = structure, labelled, metrics
        self._powers: dict[str, Powers] = {}
        self._same: dict[str, list[int]] = {}  # output -> [answers, equal answers]
        self._confusions = Confusion(), Confusion()
        self._totals = {name: [0.0, 0.0] for name in metrics}
        self._names: list[str] = []
        self._samples = 0

    def add(self, expected: Any, actual: Any, labels: Tensor | None, place: str, samples: int) -> None:
        """One batch of `samples`: outputs of the float and of the int8 network."""
        ours, theirs = (self._tensors(value, place) for value in (actual, expected))
        self._names = list(theirs)
        for name, y in theirs.items():
            self._compare(name, y, ours[name], place)
        if labels is not None:
            name = self._labelled or next(iter(theirs))
            if name not in theirs:
                raise InputError(
                    f"the model has no output {name!r}", where="labels", remedy=f"name one of {', '.join(theirs)}"
                )
            check_labels(labels, theirs[name], name, place)
            for confusion, y in zip(self._confusions, (theirs[name], ours[name]), strict=True):
                confusion.add(labels, y.argmax(1), y.shape[1])
        for name, metric in self._metrics.items():
            for side, value in enumerate((expected, actual)):
                self._totals[name][side] += samples * _measure(
                    name, metric, value, labels, place, ("float", "int8")[side]
                )
        self._samples += samples

    def _tensors(self, value: Any, place: str) -> dict[str, Tensor]:
        try:
            found = leaves(self._structure, value)
        except (TypeError, KeyError, IndexError, AttributeError) as error:
            raise InputError(
                f"the model returns a {type(value).__name__}, which does not nest as the compiled model's outputs do",
                where=place,
                remedy="give the model that was compiled",
            ) from error
        for name, tensor in found.items():
            if not isinstance(tensor, Tensor):
                raise InputError(
                    f"the output {name!r} is a {type(tensor).__name__}, no tensor",
                    where=place,
                    remedy="give the model that was compiled",
                )
        return found

    def _compare(self, name: str, y: Tensor, ours: Tensor, place: str) -> None:
        if y.shape != ours.shape:
            raise InputError(
                f"the output {name!r} has shape {tuple(y.shape)} in float and {tuple(ours.shape)} in int8",
                where=place,
                remedy="give the model that was compiled",
            )
        if y.is_floating_point():
            if torch.isnan(y).any():
                raise InputError(
                    f"the output {name!r} of the float model holds NaN",
                    where=place,
                    remedy="look for a division by zero or a missing value in this batch",
                )
            self._powers.setdefault(name, Powers()).add(y, ours - y)
            if not has_classes(y):
                return
            y, ours = y.argmax(1), ours.argmax(1)
        counts = self._same.setdefault(name, [0, 0])
        counts[0] += y.numel()
        counts[1] += int((y == ours).sum())

    def quality(self) -> Quality:
        """What all batches say."""
        outputs = []
        for name in self._names:
            answers, equal = self._same.get(name, (0, 0))
            sqnr = self._powers[name].sqnr if name in self._powers else None
            outputs.append(OutputQuality(name, sqnr, equal / answers if answers else None))
        labelled = self._labelled is not None
        theirs, ours = (confusion.scores() if labelled else None for confusion in self._confusions)
        metrics = {name: (a / self._samples, b / self._samples) for name, (a, b) in self._totals.items()}
        return Quality(tuple(outputs), theirs, ours, metrics)


def _measure(name: str, metric: Metric, outputs: Any, labels: Tensor | None, place: str, side: str) -> float:
    where = f"metric {name!r}, {place}, the {side} model"
    try:
        value = float(metric(outputs, labels))
    except Exception as error:
        raise InputError(
            f"the metric {name!r} raised {type(error).__name__}: {error}",
            where=where,
            remedy="it is called with the outputs of a batch and its labels (or None), and returns a number",
        ) from error
    if not math.isfinite(value):
        raise InputError(
            f"the metric {name!r} is {value}",
            where=where,
            remedy="let it return a finite number for every batch, or look for what is wrong with this batch",
        )
    return value
