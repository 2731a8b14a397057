"""The HTML page of an evaluation or a diagnosis: one file, no network, light and dark.

All text goes through the template's escaping; what is drawn here are numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from qcompile.evaluation.diagnosis import CAUSES, Diagnosis, LayerRow

if TYPE_CHECKING:
    from qcompile.evaluation.results import Evaluation

WIDTH, HEIGHT, TOP = 960, 240, 60.0  # of the chart; dB at its top
BAR = 24  # height of a histogram
CONFUSIONS = 10


@cache
def _template() -> Template:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"db": decibels, "percent": percent}
    return environment.get_template("report.html")


def page(*, diagnosis: Diagnosis | None, evaluation: Evaluation | None = None) -> str:
    """The whole page as text."""
    from qcompile.evaluation import results

    tables: dict[str, Any] = {"quality": [], "shifts": [], "confusions": []}
    if evaluation is not None:
        tables["quality"] = results.rows(evaluation.quality)
        tables["shifts"] = results.robustness(evaluation) if evaluation.shifts else []
        tables["confusions"] = _confusions(evaluation)
    return _template().render(
        evaluation=evaluation,
        diagnosis=diagnosis,
        numerics="" if evaluation is None else evaluation.numerics,
        tiles=_tiles(evaluation, diagnosis),
        chart=Chart.of(diagnosis) if diagnosis is not None else None,
        layers=[Drawn.of(row) for row in diagnosis.rows] if diagnosis is not None else [],
        causes=CAUSES,
        **tables,
    )


def decibels(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f} dB" if math.isfinite(value) else ("exact" if value > 0 else "lost")


def percent(value: float) -> str:
    """Two digits, and never 0 for what is not."""
    return (
        ""
        if value == 0
        else f"{value:.0%}"
        if value >= 0.1
        else f"{value:.1%}"
        if value >= 1e-2
        else f"{value:.2%}"
        if value >= 1e-4
        else "< 0.01%"
    )


def _tiles(evaluation: Evaluation | None, diagnosis: Diagnosis | None) -> list[tuple[str, str, str]]:
    """(figure, what it is, detail)."""
    tiles: list[tuple[str, str, str]] = []
    if evaluation is not None:
        if evaluation.int8_accuracy is not None:
            tiles.append((f"{evaluation.int8_accuracy:.1%}", "accuracy", f"float {evaluation.float_accuracy:.1%}"))
        if evaluation.agreement is not None:
            tiles.append((f"{evaluation.agreement:.1%}", "same answer as float", f"{evaluation.samples} samples"))
        if evaluation.sqnr is not None:
            worst = evaluation.quality.worst.name if len(evaluation.outputs) > 1 else "of the output"
            tiles.append((decibels(evaluation.sqnr), "SQNR", worst))
        if evaluation.speedup is not None:
            detail = f"{evaluation.float_ms:.2f} ms to {evaluation.int8_ms:.2f} ms"
            tiles.append((f"{evaluation.speedup:.1f} x", "faster", detail))
        sizes = f"{evaluation.float_bytes / 1e6:.2f} MB to {evaluation.int8_bytes / 1e6:.2f} MB"
        tiles.append((f"{evaluation.compression:.1f} x", "smaller", sizes))
    elif diagnosis is not None:
        lowest = min(row.accumulated for row in diagnosis.rows)
        tiles.append((str(len(diagnosis.rows)), "layers", f"{diagnosis.samples} samples"))
        tiles.append((decibels(lowest), "lowest accumulated SQNR", f"broken below {diagnosis.threshold:g} dB"))
        tiles.append((decibels(diagnosis.rows[0].isolated), "lowest isolated SQNR", diagnosis.rows[0].name))
    return tiles


def _confusions(evaluation: Evaluation) -> list[tuple[int, int, int, int]]:
    """(label, answer, times in int8, times in float) of the most frequent mistakes of the int8 network."""
    ours, theirs = evaluation.quality.int8_scores, evaluation.quality.float_scores
    if ours is None or theirs is None:
        return []
    before = {(label, answer): count for label, answer, count in theirs.confusion}
    mistakes = [(label, answer, n) for label, answer, n in ours.confusion if label != answer][:CONFUSIONS]
    return [(label, answer, n, before.get((label, answer), 0)) for label, answer, n in mistakes]


@dataclass(frozen=True)
class Drawn:
    """A layer with its pictures: SVG paths, and the parts of its own noise in per cent."""

    row: LayerRow
    inside: str
    beyond: str
    zero: float | None
    weights: str
    parts: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, row: LayerRow) -> Drawn:
        top = max(row.values, default=0)
        last = len(row.values) - 1
        noises = {part: 10.0 ** (-getattr(row, part) / 10) for part in CAUSES}
        total = sum(noises.values())
        shares = tuple((part, 100 * noise / total) for part, noise in noises.items()) if 0 < total < math.inf else ()
        zero = None if row.zero_point is None else 1 + (row.zero_point + 128.5) / 256 * (last - 1)
        return cls(
            row=row,
            inside=bars([0, *row.values[1:-1], 0], top),
            beyond=bars([n if at in (0, last) else 0 for at, n in enumerate(row.values)], top),
            zero=zero,
            weights=bars([0, *row.weights, 0], max(row.weights, default=0)),
            parts=shares,
        )


def bars(counts: Sequence[int], top: int) -> str:
    """A bar of width 1 for each count, as one SVG path; the square root tells small counts from none."""
    path = ""
    for at, count in enumerate(counts):
        if count:
            height = max(1.0, BAR * math.sqrt(count / top))
            path += f"M{at} {BAR}V{BAR - height:.1f}h1V{BAR}"
    return path


@dataclass(frozen=True)
class Chart:
    """Both SQNRs of every layer in the order of execution: (x, y, layer) points, lines, and the grid's dB."""

    accumulated: tuple[tuple[float, float, LayerRow], ...]
    isolated: tuple[tuple[float, float, LayerRow], ...]
    line: str
    grid: tuple[tuple[float, int], ...]
    threshold: float
    first: float | None
    width: int = WIDTH
    height: int = HEIGHT

    @classmethod
    def of(cls, diagnosis: Diagnosis) -> Chart:
        rows = diagnosis.in_order
        step = WIDTH / max(len(rows), 2)

        def points(part: str) -> tuple[tuple[float, float, LayerRow], ...]:
            return tuple((round((row.position + 0.5) * step, 1), _y(getattr(row, part)), row) for row in rows)

        accumulated = points("accumulated")
        return cls(
            accumulated=accumulated,
            isolated=points("isolated"),
            line=" ".join(f"{x},{y}" for x, y, _ in accumulated),
            grid=tuple((_y(value), value) for value in range(0, int(TOP) + 1, 10)),
            threshold=_y(diagnosis.threshold),
            first=next((x for x, _, row in accumulated if row.node == diagnosis.first_node), None),
        )


def _y(value: float) -> float:
    """Height in the chart; what is beyond it lies on its edge."""
    return round(HEIGHT * (1 - max(0.0, min(TOP, value)) / TOP), 1)
