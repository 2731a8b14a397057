"""What a search is held to: a metric, one number of a model, the larger the better; and how far it may drop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from qcompile.batches import Batches
from qcompile.errors import ConfigError, QcompileError
from qcompile.ir import Program
from qcompile.passes.calibrate import check_batch

Predict = Callable[..., Any]
Metric = Callable[[Predict], float]
"""Called with a function that stands for the model (tensors in and out, nested as the model nests them); returns one
number, the larger the better."""

_REMEDY = "metric(predict) calls predict as the model is called, and returns one finite number, the larger the better"


def check(max_drop: float | None, metric: Any, evaluation: Any, strict: bool) -> None:
    """Refuse settings of a search that contradict each other, and a search without its solver.

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
    try:
        import scipy.optimize  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "choosing layers needs scipy", where="max_accuracy_drop", remedy="pip install 'qcompile[mixed]'"
        ) from error


class Checked:
    """`metric`, and what it does wrong as errors that say of which model it was asked.

    Raises:
        ConfigError: it raised, or returned no finite number.
    """

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def __call__(self, predict: Predict, what: str) -> float:
        place = f"metric, of {what}"
        try:
            value: Any = self._metric(predict)
        except QcompileError:
            raise  # already says what was wrong and where
        except Exception as error:
            raise ConfigError(
                f"the metric raised {type(error).__name__}: {error}", where=place, remedy=_REMEDY
            ) from error
        try:
            number = math.nan if isinstance(value, str) else float(value)
        except (TypeError, ValueError, RuntimeError):
            number = math.nan
        if not math.isfinite(number):
            raise ConfigError(f"the metric returned {_shown(value)}", where=place, remedy=_REMEDY)
        return number


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"a {type(value).__name__}"


class Agreement:
    """The part of the held-out samples for which a model has the same largest output as the float model, which is the
    one that is asked first. For classifiers: models with one output (N, classes, ...).

    Args:
        data: batches of inputs as calibration takes them; kept in memory.
        program: whose inputs they are.

    Raises:
        ConfigError: there are no data, or the model is no classifier. CalibrationError: a batch is malformed.
    """

    def __init__(self, data: Iterable[Any] | None, program: Program) -> None:
        if data is None:
            raise ConfigError(
                "there are no held-out data to judge layers by",
                where="evaluation",
                remedy="pass evaluation=an iterable of inputs that calibration does not use, or a metric of your own",
            )
        pieces = (check_batch(program.inputs, b, f"evaluation batch {i}") for i, b in enumerate(Batches(data)))
        self._inputs = [[x.clone() for x in inputs] for piece in pieces for inputs in piece]  # memory may come again
        if not self._inputs:
            raise ConfigError(
                "the held-out data are empty",
                where="evaluation",
                remedy="pass at least one batch; a generator that was read before is empty, so make a new one",
            )
        self._expected: list[Tensor] = []

    def __call__(self, predict: Predict) -> float:
        found = [_classes(predict(*inputs)) for inputs in self._inputs]
        self._expected = self._expected or found
        return float((torch.cat(found) == torch.cat(self._expected)).double().mean())


def _classes(output: Any) -> Tensor:
    if not isinstance(output, Tensor) or output.dim() < 2 or output.shape[1] < 2:
        raise ConfigError(
            "the model is no classifier, so that there is no top label to compare",
            where="metric",
            remedy="pass metric=a function of predict that returns one number, the larger the better",
        )
    return output.argmax(1).flatten()
