"""What joining operators into one kernel brings, and joining models into one."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.answers import builds
from benchmarks.answers.apart import PIPELINES
from benchmarks.answers.builds import JOINED, ORIGINAL, Build, key
from benchmarks.answers.jobs import Job
from benchmarks.answers.networks import DIGITS, LITE0, NAMES
from benchmarks.figures import COUNT, DECIBELS, MEGABYTES, TEXT, TIMES, Figures, span
from benchmarks.interleave import Measurement, Racer, interleave

MEGA = 1e6
TOGETHER = ("normalizing", "second", "pair")
NORMALIZED, ENSEMBLE = "normalization into the network", "two networks into one"


def jobs(options: Any) -> dict[str, Job]:
    found: dict[str, Job] = {}
    for name in NAMES:
        found |= builds.original_job(name, options.folder)
        for form in PIPELINES:
            found |= builds.job(name, form, options.folder)
    return found | {name: Job(builds.together, (name, options.folder)) for name in TOGETHER}


def timed(found: dict[str, Any], options: Any) -> dict[str, Any]:
    """Times of one thread, as parts of that of the joined form."""
    joined: dict[str, float] = {}
    for name in NAMES:
        racers = {form: Racer("qcompile", found[key(name, form)].path) for form in PIPELINES}
        measured = _race(racers, found[key(name, ORIGINAL)].x, options)
        joined |= {key(name, form): _ratio([measured[form]], measured[JOINED]) for form in PIPELINES}
    alone: Build = found[key(LITE0, JOINED)]
    racers = {
        "apart": Racer("qcompile, normalizing in NumPy", alone.path),
        "one": Racer("qcompile", found["normalizing"].path),
    }
    normalized = _race(racers, found[key(LITE0, ORIGINAL)].pixels, options)
    first: Build = found[key(DIGITS, JOINED)]
    paths = {"first": first.path, "second": found["second"].path, "one": found["pair"].path}
    pair = _race(
        {name: Racer("qcompile", path) for name, path in paths.items()}, found[key(DIGITS, ORIGINAL)].x, options
    )
    models = {
        NORMALIZED: _ratio([normalized["apart"]], normalized["one"]),
        ENSEMBLE: _ratio([pair["first"], pair["second"]], pair["one"]),
    }
    return {"joined": joined, "models": models}


def _race(racers: dict[str, Racer], x: Any, options: Any) -> dict[str, Measurement]:
    measured, failed = interleave(racers, 1, x, **options.race)
    if failed:
        raise SystemExit(f"cannot be measured: {failed}")
    return measured


def _ratio(slow: list[Measurement], fast: Measurement) -> float:
    """Of the sum of times of `slow` to that of `fast`: the median over the rounds in which none was disturbed."""
    rounds = list(zip(fast.blocks, *(m.blocks for m in slow), strict=True))
    clean = [blocks for blocks in rounds if not any(b.disturbed for b in blocks)]
    return statistics.median(sum(b.seconds for b in rest) / one.seconds for one, *rest in clean or rounds)


def figures(found: dict[str, Any], options: Any) -> dict[str, Figures]:
    rows: list[list[Any]] = []
    for name in NAMES:
        for form in PIPELINES:
            build: Build = found[key(name, form)]
            rows.append(
                [name, form, build.kernels, build.moved[0] / MEGA, found["joined"][key(name, form)], build.sqnr]
            )
    alone, first = found[key(LITE0, JOINED)], found[key(DIGITS, JOINED)]
    models = [
        [NORMALIZED, alone.kernels, found["normalizing"].kernels, found["models"][NORMALIZED]],
        [ENSEMBLE, first.kernels + found["second"].kernels, found["pair"].kernels, found["models"][ENSEMBLE]],
    ]
    columns = {
        "network": TEXT,
        "form": TEXT,
        "kernels": COUNT,
        "activations moved": MEGABYTES,
        "time": TIMES,
        "SQNR": DECIBELS,
    }
    together = {"joined": TEXT, "kernels apart": COUNT, "kernels as one": COUNT, "time apart / as one": TIMES}
    return {"fusion": Figures(columns, rows), "models": Figures(together, models)}


def answer(figures: dict[str, Figures]) -> str:
    fusion, models = figures["fusion"], figures["models"]
    _, relu, norms = PIPELINES
    names = dict.fromkeys(row[0] for row in fusion.rows)
    time = {form: span([fusion.at("time", name, form) for name in names], "{:.2f}") for form in PIPELINES}
    sqnr = {form: [fusion.at("SQNR", name, form) for name in names] for form in PIPELINES}
    changes = {
        form: span([after - before for before, after in zip(sqnr[JOINED], sqnr[form], strict=True)], "{:+.1f} dB")
        for form in (relu, norms)
    }
    whole = {row[0]: row[-1] for row in models.rows}
    return (
        f"With adds and clamps in kernels of their own a call takes {time[relu]} times as long, with batch norms as "
        f"well {time[norms]} times; the SQNR changes by {changes[relu]}, and by {changes[norms]}, since what exists "
        "between kernels is rounded to int8. Two small networks called one after the other take "
        f"{whole[ENSEMBLE]:.2f} times as long as both in one file; a normalization in NumPy and the network behind it, "
        f"{whole[NORMALIZED]:.2f} times as long as both in one."
    )
