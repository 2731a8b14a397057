"""What tests of kernels for GPUs found, as one table: a row for each operator and network, a column for each target.

Tests that run in other processes hand over what they found in the properties of their reports.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

_CELL, _BITS = "gpu cell", "gpu bits"


def name(item: pytest.Item) -> None:
    """Say in which row and column the result of a test stands."""
    callspec = getattr(item, "callspec", None)
    parameters = dict(callspec.params) if callspec else {}
    target = str(parameters.pop("target", "cuda"))
    words = [str(getattr(value, "name", value)) for value in parameters.values()]
    said = getattr(item, "originalname", item.name).removeprefix("test_").replace("_", " ")
    item.user_properties.append((_CELL, [", ".join(words) or said, target, said]))


def record(item: Any, wrong: int, total: int) -> None:
    """Add to what a test compared: `wrong` of `total` elements are not the reference's."""
    item.user_properties.append((_BITS, [wrong, total]))


def table(reports: Iterable[Any]) -> str:
    """The table of the reports of tests that `name` was told of; "" where there are none."""
    cells: dict[str, dict[str, str]] = {}
    skipped: dict[str, None] = {}
    columns: dict[str, None] = {}
    for report in reports:
        found = [value for key, value in report.user_properties if key == _CELL]
        if not found or (report.when != "call" and report.passed):
            continue
        row, target, said = found[0]
        if report.skipped:
            skipped[_skipped(report)] = None
            continue
        columns[target] = None
        row = row if target not in cells.get(row, {}) else f"{row}: {said}"
        cells.setdefault(row, {})[target] = _cell(report)
    if not cells and not skipped:
        return ""
    shown = Table("", *sorted(columns), title="Elements that are not the reference's", title_justify="left")
    for row, results in cells.items():
        shown.add_row(row, *(results.get(target, "") for target in sorted(columns)))
    out = io.StringIO()
    Console(file=out, width=60 + 30 * len(columns)).print(shown)
    return out.getvalue() + "".join(f"not run: {reason}\n" for reason in skipped)


def _cell(report: Any) -> str:
    bits = [value for key, value in report.user_properties if key == _BITS]
    wrong, total = (sum(part) for part in zip(*bits, strict=True)) if bits else (0, 0)
    if report.failed and not wrong:
        crash = getattr(report.longrepr, "reprcrash", None)
        return f"error: {(crash.message if crash else str(report.longrepr)).splitlines()[0]}"
    return f"{wrong} wrong of {total:,}" if bits else "passed"


def _skipped(report: Any) -> str:
    return str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr).removeprefix("Skipped: ")
