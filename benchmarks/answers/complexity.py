"""What there is to compute: operators after each pass, kernels, multiply-accumulates, and bytes moved."""

from __future__ import annotations

from typing import Any

from benchmarks.answers import builds
from benchmarks.answers.builds import JOINED, ORIGINAL, Build, Original, key
from benchmarks.answers.jobs import Job
from benchmarks.answers.networks import NAMES
from benchmarks.figures import COUNT, MEGABYTES, MILLIONS, TEXT, TIMES, Figures, span

MEGA = 1e6
AFTER = {  # heading -> the pass behind which operators are counted
    "as captured": "captured",
    "canonicalize": "after canonicalize",
    "fold_batchnorm": "after fold_batchnorm",
    "fuse_requantize": "after fuse_requantize",
    "fold_padding": "after fold_padding",
}


def jobs(options: Any) -> dict[str, Job]:
    found: dict[str, Job] = {}
    for name in NAMES:
        found |= builds.original_job(name, options.folder) | builds.job(name, JOINED, options.folder)
    return found


def figures(found: dict[str, Any], options: Any) -> dict[str, Figures]:
    operators: list[list[Any]] = []
    work: list[list[Any]] = []
    for name in NAMES:
        source: Original = found[key(name, ORIGINAL)]
        build: Build = found[key(name, JOINED)]
        operators.append([name, *(build.operators[point] for point in AFTER.values()), build.kernels])
        parts = []
        for before, after in zip((source.facts["activations"], source.facts["constants"]), build.moved, strict=True):
            parts += [before / MEGA, after / MEGA, before / after]
        work.append([name, source.facts["parameters"] / MEGA, source.facts["macs"] / MEGA, *parts])
    moved = ("activations in float", "in int8", "fewer", "weights in float", "as int8", "fewer bytes")
    formats = (MEGABYTES, MEGABYTES, TIMES) * 2
    return {
        "operators": Figures({"network": TEXT, **dict.fromkeys((*AFTER, "kernels"), COUNT)}, operators),
        "work": Figures(
            {"network": TEXT, "parameters": MILLIONS, "multiply-accumulates": MILLIONS}
            | dict(zip(moved, formats, strict=True)),
            work,
        ),
    }


def answer(figures: dict[str, Figures]) -> str:
    operators, work = figures["operators"], figures["work"]
    left = [row[-1] / row[1] for row in operators.rows]
    return (
        "Multiply-accumulates stay as many as they were, of numbers a quarter as wide. The operators become "
        f"{span(left, '{:.0%}')} as many kernels, and what these read and write of activations is "
        f"{span(work.column('fewer'), '{:.1f}')} times less than what the float operators do one by one."
    )
