"""The ratios of a run as a picture: a row for each workload, a mark for each engine, a panel for each thread count."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks import table
from benchmarks.engines import OURS, UNRESTRICTED
from benchmarks.results import Report, Run, Workload

MARKS = "ooD^vsP<>X"
COLOURS = ("#d1495b", "#e8a4ad", "#00798c", "#edae49", "#3b5ba5", "#8fb339", "#7d5ba6", "#00798c", "#3b5ba5", "#7d5ba6")


def draw(report: Report, path: Path) -> None:
    """Write the picture; the same report gives the same bytes."""
    mpl.rcParams["svg.hashsalt"] = "qcompile"
    threads = sorted({run.threads for workload in report.workloads for run in workload.runs})
    height = 1.4 + 0.42 * len(report.workloads)
    figure = Figure(figsize=(11, height), layout="constrained")
    panels = figure.subplots(1, len(threads), sharey=True, squeeze=False)[0]
    for panel, count in zip(panels, threads, strict=True):
        rows = [(w, run) for w in report.workloads for run in w.runs if run.threads == count]
        _panel(panel, rows)
        panel.set_title(table.threads(count))
        panel.set_xlabel("speed relative to the best peer (log scale)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def _panel(panel: Axes, rows: list[tuple[Workload, Run]]) -> None:
    for index, engine in enumerate(UNRESTRICTED):
        found = [(run.engines[engine].speed, y) for y, (_, run) in enumerate(rows) if engine in run.engines]
        points = [(speed, y) for speed, y in found if speed]
        speeds, heights = [speed for speed, _ in points], [y for _, y in points]
        ours = engine == OURS
        panel.scatter(
            speeds,
            heights,
            s=90 if ours else 40,
            marker=MARKS[index],
            facecolors="none" if engine.endswith("float") else COLOURS[index],
            edgecolors=COLOURS[index],
            zorder=4 if ours else 3,
            label=engine,
        )
    panel.axvline(1.0, color="#888888", linewidth=1, zorder=1)
    panel.set_xscale("log")
    panel.set_xlim(left=min(0.08, panel.get_xlim()[0]), right=2.5)
    ticks = (0.1, 0.2, 0.5, 1.0, 2.0)
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_yticks(range(len(rows)), [workload.name for workload, _ in rows])
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.grid(axis="both", color="#e4e4e4", zorder=0)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
