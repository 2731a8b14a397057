"""How fast int8 is, beside the same network in float: compiled by this project, by inductor, and in eager PyTorch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from benchmarks.answers import builds
from benchmarks.answers.builds import FLOAT32, JOINED, ORIGINAL, Build, Original, key
from benchmarks.answers.jobs import Job
from benchmarks.answers.networks import NAMES
from benchmarks.figures import COUNT, MILLISECONDS, TEXT, TIMES, Figures, span
from benchmarks.interleave import Racer, interleave, ratio

INT8, OURS, INDUCTOR, EAGER = "qcompile", "qcompile float32", "inductor float", "pytorch float"
FLOATS = (OURS, INDUCTOR, EAGER)
THREADS = sorted({1, min(2, os.cpu_count() or 1)})


def jobs(options: Any) -> dict[str, Job]:
    found: dict[str, Job] = {}
    for name in NAMES:
        found |= builds.original_job(name, options.folder)
        found |= builds.job(name, JOINED, options.folder) | builds.job(name, FLOAT32, options.folder)
    return found


def timed(found: dict[str, Any], options: Any) -> dict[str, Any]:
    """Rows of the table, and why a cell is empty."""
    rows: list[list[Any]] = []
    notes: list[str] = []
    for name in NAMES:
        source: Original = found[key(name, ORIGINAL)]
        int8, float32 = (found[key(name, form)] for form in (JOINED, FLOAT32))
        racers = _racers(source, int8, float32)
        if isinstance(source.inductor, str):
            notes.append(f"{name}, {INDUCTOR}: {source.inductor}")
        for threads in THREADS:
            measured, failed = interleave(racers, threads, source.x, **options.race)
            if INT8 in failed:
                raise SystemExit(f"{name}, {INT8}: {failed[INT8]}")
            ours = measured[INT8]
            times = [ratio(measured[other], ours)[0] if other in measured else None for other in FLOATS]
            rows.append([name, threads, ours.milliseconds(), *times])
            notes += [f"{name}, {engine}: {reason}" for engine, reason in failed.items()]
    return {"speed": (rows, notes)}


def _racers(source: Original, int8: Build, float32: Build) -> dict[str, Racer]:
    found = {INT8: int8.path, OURS: float32.path, EAGER: source.exported}
    found |= {INDUCTOR: source.inductor} if isinstance(source.inductor, Path) else {}
    return {engine: Racer("qcompile" if engine == OURS else engine, path) for engine, path in found.items()}


def figures(found: dict[str, Any], options: Any) -> dict[str, Figures]:
    columns = {"network": TEXT, "threads": COUNT, "int8, ms": MILLISECONDS, **dict.fromkeys(FLOATS, TIMES)}
    return {"speed": Figures(columns, *found["speed"])}


def answer(figures: dict[str, Figures]) -> str:
    table = figures["speed"]
    times = {engine: span(found, "{:.1f}") for engine in FLOATS if (found := table.column(engine))}
    where = {OURS: "compiled by qcompile in float32", INDUCTOR: "compiled by inductor", EAGER: "in eager PyTorch"}
    compared = ", ".join(f"{found} times as long {where[engine]}" for engine, found in times.items())
    return f"A call in float takes {compared}, as a call of the int8 network."
