"""A table of numbers, with how each column is written: for the terminal, for the page, and for sentences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import rich.table

from benchmarks import table

PER_CENT, POINTS, DECIBELS, TIMES = "{:.1%}", "{:+.1f}", "{:.1f} dB", "{:.2f} x"
COUNT, MILLISECONDS, MEGABYTES, MILLIONS, TEXT = "{:,}", "{:.3g}", "{:.2f} MB", "{:.2f} M", "{}"


@dataclass(frozen=True)
class Figures:
    """Attributes:
    columns: heading -> format of its cells.
    rows: cells in the order of the columns; None where there is nothing to say.
    notes: why there is nothing to say.
    """

    columns: dict[str, str]
    rows: list[list[Any]]
    notes: list[str] = field(default_factory=list)

    def at(self, column: str, *key: Any) -> Any:
        """The cell of `column` in the row that begins with `key`."""
        (row,) = (row for row in self.rows if row[: len(key)] == list(key))
        return row[list(self.columns).index(column)]

    def column(self, column: str) -> list[Any]:
        """The cells of `column` that have something to say."""
        at = list(self.columns).index(column)
        return [row[at] for row in self.rows if row[at] is not None]

    def cells(self) -> list[list[str]]:
        """Every cell as it is written."""
        formats = self.columns.values()
        return [
            ["" if cell is None else form.format(cell) for form, cell in zip(formats, row, strict=True)]
            for row in self.rows
        ]

    def markdown(self) -> str:
        return table.markdown(list(self.columns), self.cells()) + "".join(f"\n{note}\n" for note in self.notes)

    def rich(self, title: str) -> rich.table.Table:
        shown = rich.table.Table(*self.columns, title=title, title_justify="left")
        for row in self.cells():
            shown.add_row(*row)
        shown.caption = "\n".join(self.notes) or None
        return shown


def mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def span(values: Any, form: str) -> str:
    """The smallest and the largest as text: "1.20 x to 3.40 x", or one of them where both read alike."""
    values = list(values)
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def trainings(seeds: Any) -> str:
    """How many networks a mean is over."""
    count = len(seeds)
    return "one training" if count == 1 else f"means over {count} trainings"
