"""Evaluation: the result of evaluate(), as a table, JSON and a page."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qcompile.artifact import CoverageRow, numerics
from qcompile.evaluation import files
from qcompile.evaluation.diagnosis import Diagnosis
from qcompile.evaluation.quality import OutputQuality, Quality

WORST = 10  # layers in the printed form


@dataclass(frozen=True)
class Evaluation:
    """How a compiled model compares with its float model. Prints as tables.

    What has int8 in its name is of the compiled model, whatever its `numerics` are.

    Attributes:
        samples: how many were compared.
        quality: on the data as it is.
        shifts: name of a shift of the inputs -> the same under that shift; empty without robustness.
        float_ms, int8_ms: median milliseconds of a call, measured in turns; None when not measured.
        float_bytes: of the file that torch.save makes of the float model's weights.
        int8_bytes: of the .qcm file.
        target: the target whose machine code ran.
        coverage: the ledger: what became of every operator.
        diagnosis: the layers; None when they were not compared.
        notes: what was left out, and why.
    """

    samples: int
    quality: Quality
    shifts: Mapping[str, Quality]
    float_ms: float | None
    int8_ms: float | None
    float_bytes: int
    int8_bytes: int
    target: str
    coverage: tuple[CoverageRow, ...]
    diagnosis: Diagnosis | None
    notes: tuple[str, ...]

    @property
    def numerics(self) -> str:
        """What the compiled model computes in: "int8", or without any int8 "weight-only", "bfloat16" or "float32"."""
        return numerics(self.coverage)

    @property
    def outputs(self) -> tuple[OutputQuality, ...]:
        """Each output of the model."""
        return self.quality.outputs

    @property
    def sqnr(self) -> float | None:
        """Signal to quantization noise ratio in dB, of the worst output; None when all hold whole numbers."""
        return self.quality.worst.sqnr

    @property
    def agreement(self) -> float | None:
        """The part of the answers that both networks give alike, of the output with the fewest; None without any."""
        return min((o.agreement for o in self.outputs if o.agreement is not None), default=None)

    @property
    def float_accuracy(self) -> float | None:
        """The part of the float network's answers that are the label; None without labels."""
        return None if self.quality.float_scores is None else self.quality.float_scores.accuracy

    @property
    def int8_accuracy(self) -> float | None:
        """The part of the int8 network's answers that are the label; None without labels."""
        return None if self.quality.int8_scores is None else self.quality.int8_scores.accuracy

    @property
    def speedup(self) -> float | None:
        """How many times faster the compiled model is; None when not measured."""
        return None if self.float_ms is None or self.int8_ms is None else self.float_ms / self.int8_ms

    @property
    def compression(self) -> float:
        """How many times smaller the .qcm file is than the float weights' file."""
        return self.float_bytes / self.int8_bytes

    def tables(self) -> list[Table]:
        """Quality with speed and storage, robustness where it was measured, the worst layers where known."""
        result = [self._summary()]
        if self.shifts:
            result.append(self._robustness())
        if self.diagnosis is not None:
            result.append(self.diagnosis.table(WORST))
        return result

    def _summary(self) -> Table:
        title = f"{self.target} on {self.samples} samples"
        table = Table("", "float", self.numerics, "", title=title, title_justify="left")
        for label, *cells in rows(self.quality):
            table.add_row(escape(label), *cells)
        if self.speedup is not None:
            table.add_row("a call", f"{self.float_ms:.3f} ms", f"{self.int8_ms:.3f} ms", f"{self.speedup:.2f} x faster")
        sizes = [f"{size / 1e6:.2f} MB" for size in (self.float_bytes, self.int8_bytes)]
        table.add_row("file", *sizes, f"{self.compression:.2f} x smaller")
        return table

    def _robustness(self) -> Table:
        columns = robustness(self)
        table = Table(*(escape(name) for name in columns[0]), title="Shifted inputs", title_justify="left")
        for row in columns[1:]:
            table.add_row(*map(escape, row))
        return table

    def __str__(self) -> str:
        out = io.StringIO()
        console = Console(file=out, width=140)
        for table in self.tables():
            console.print(table)
        for note in self.notes:
            console.print(f"note: {note}", markup=False, highlight=False)
        return out.getvalue()

    def to_json(self) -> str:
        """Every number, as a JSON object; infinities as "inf" and "-inf"."""
        coverage = [row._asdict() for row in self.coverage]
        return files.to_json(self, coverage=coverage, speedup=self.speedup, compression=self.compression)

    def html(self, path: str | Path) -> None:
        """Write one HTML page that needs nothing else. Raises ConfigError when it cannot be written."""
        from qcompile.evaluation.page import page

        files.write(path, page(evaluation=self, diagnosis=self.diagnosis))

    def save(self, path: str | Path) -> None:
        """Write a .json or .html file, by its suffix. Raises ConfigError for any other."""
        files.save(self, path)


def rows(quality: Quality) -> list[tuple[str, str, str, str]]:
    """What was measured of the outputs: (what, of the float model, of the int8 one, of both)."""
    found: list[tuple[str, str, str, str]] = []
    for output in quality.outputs:
        of = f" of {output.name}" if len(quality.outputs) > 1 else ""
        if output.sqnr is not None:
            found.append((f"SQNR{of}", "", "", f"{output.sqnr:.1f} dB"))
        if output.agreement is not None:
            found.append((f"same answer{of}", "", "", f"{output.agreement:.2%}"))
    if quality.float_scores is not None and quality.int8_scores is not None:
        for name in ("accuracy", "precision", "recall", "f1"):
            pair = [getattr(scores, name) for scores in (quality.float_scores, quality.int8_scores)]
            label = "F1" if name == "f1" else name
            found.append((label, *(f"{value:.2%}" for value in pair), f"{100 * (pair[1] - pair[0]):+.2f} points"))  # type: ignore[arg-type]
    for name, (ours, theirs) in quality.metrics.items():
        found.append((name, f"{ours:.4g}", f"{theirs:.4g}", f"{theirs - ours:+.3g}"))
    return found


def robustness(evaluation: Evaluation) -> list[list[str]]:
    """A header and a row for each shift, "none" first."""
    every = {"none": evaluation.quality, **evaluation.shifts}
    header: list[str] = []
    result: list[list[str]] = []
    for name, quality in every.items():
        cells = {"shift": name}
        for label, ours, theirs, both in rows(quality):
            cells[label] = f"{ours} / {theirs}" if ours else both
        header = header or list(cells)
        result.append([cells[column] for column in header])
    return [header, *result]
