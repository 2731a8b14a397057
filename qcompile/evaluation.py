"""evaluate(): a compiled model against the float model it came from: quality, speed, storage."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.errors import InputError
from qcompile.runtime import Model

CALLS = 5  # per block of the timing


@dataclass(frozen=True)
class Evaluation:
    """How a compiled model compares with its float model.

    Attributes:
        samples: how many were compared.
        sqnr: signal to quantization noise ratio of the outputs in dB,
            10 log10(sum y^2 / sum (y - y_int8)^2); infinite when they are equal.
        agreement: the part of the samples for which both have the same largest output.
        float_accuracy, int8_accuracy: the part whose largest output is the label; None without labels.
        float_ms, int8_ms: median milliseconds of a call, measured in turns; None when not measured.
        float_bytes: of the float model's parameters and buffers.
        int8_bytes: of the artifact.
    """

    samples: int
    sqnr: float
    agreement: float
    float_accuracy: float | None
    int8_accuracy: float | None
    float_ms: float | None
    int8_ms: float | None
    float_bytes: int
    int8_bytes: int

    @property
    def speedup(self) -> float | None:
        """How many times faster the compiled model is; None when not measured."""
        return None if self.float_ms is None or self.int8_ms is None else self.float_ms / self.int8_ms

    @property
    def compression(self) -> float:
        """How many times smaller the artifact is than the float weights."""
        return self.float_bytes / self.int8_bytes


@torch.no_grad()
def evaluate(
    compiled: Model, model: nn.Module, data: Iterable[Any], *, labels: bool = False, blocks: int = 10
) -> Evaluation:
    """Compare `compiled` with `model` on `data`.

    Args:
        compiled: a classifier (or any model with one output) from `qcompile.compile` or `qcompile.load`.
        model: the float model, in eval mode.
        data: batches of inputs, each a tensor or a tuple of tensors; read once. The first is also timed.
        labels: each batch is (inputs, class indices), and accuracy is wanted.
        blocks: how many times each model is timed, in turns; 0 for no timing.

    Raises:
        InputError: there is no data, or a model returns something else than one tensor.
    """
    comparison = _Comparison()
    first: tuple[Tensor, ...] = ()
    for batch in data:
        inputs, wanted = batch if labels else (batch, None)
        inputs = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        first = first or inputs
        comparison.add(model(*inputs), compiled(*inputs), wanted)
    if not comparison.samples:
        raise InputError("there is no data to evaluate on", remedy="pass at least one batch")
    times = interleave((lambda: model(*first), lambda: compiled(*first)), blocks) if blocks else [None, None]
    tensors = [*model.parameters(), *model.buffers()]
    return Evaluation(
        samples=comparison.samples,
        sqnr=comparison.sqnr,
        agreement=comparison.agreeing / comparison.samples,
        float_accuracy=comparison.correct[0] / comparison.samples if labels else None,
        int8_accuracy=comparison.correct[1] / comparison.samples if labels else None,
        float_ms=times[0],
        int8_ms=times[1],
        float_bytes=sum(t.numel() * t.element_size() for t in tensors),
        int8_bytes=len(compiled.artifact.to_bytes()),
    )


class _Comparison:
    """Sums over the batches."""

    def __init__(self) -> None:
        self.samples = self.agreeing = 0
        self.correct = [0, 0]
        self.signal = self.noise = 0.0

    def add(self, expected: Any, actual: Any, wanted: Tensor | None) -> None:
        if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
            raise InputError("evaluate compares models with one output", remedy="wrap the model to return one tensor")
        self.samples += len(expected)
        self.signal += float(expected.double().square().sum())
        self.noise += float((expected.double() - actual.double()).square().sum())
        classes = [y.flatten(1).argmax(1) for y in (expected, actual)]
        self.agreeing += int((classes[0] == classes[1]).sum())
        if wanted is not None:
            self.correct = [n + int((c == wanted).sum()) for n, c in zip(self.correct, classes, strict=True)]

    @property
    def sqnr(self) -> float:
        return 10 * math.log10(self.signal / self.noise) if self.noise and self.signal else math.inf


def interleave(calls: Sequence[Callable[[], object]], blocks: int) -> list[float]:
    """Median milliseconds of each of `calls`, measured in turns so that all see the same machine."""
    times: list[list[float]] = [[] for _ in calls]
    for block in range(blocks + 1):
        for call, taken in zip(calls, times, strict=True):
            for _ in range(CALLS):
                start = time.perf_counter()
                call()
                if block:  # the first block warms up
                    taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]
