"""Measure what quantization does, and write it into `docs/answers.json` and `docs/answers.md`.

    python -m benchmarks.answers [--sections speed ...] [--seeds 5] [--rounds 8] [--page-only]

What is timed runs alone, in turns (see `benchmarks.interleave`), after all else was computed on all cores. Figures of
sections that are not asked for stay as they are.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.answers import jobs
from benchmarks.answers.jobs import Job
from benchmarks.answers.page import SECTIONS, Answers, written
from benchmarks.machine import machine

JSON, PAGE = Path("docs/answers.json"), Path("docs/answers.md")
PACKAGES = ("apache-tvm", "qcompile", "torch")


@dataclass(frozen=True)
class Options:
    """Attributes:
    seeds: of networks that are trained here; figures are means over them.
    folder: for files that are raced.
    race: how long, as `benchmarks.interleave` takes it.
    """

    seeds: tuple[int, ...]
    folder: Path
    race: dict[str, Any]


def measured(names: list[str], options: Options, console: Console) -> dict[str, dict[str, Any]]:
    """The figures of the sections called `names`."""
    sections = {name: SECTIONS[name] for name in names}
    todo: dict[str, Job] = {}
    for section in sections.values():
        todo |= section.jobs(options)
    found = jobs.run(todo, console)
    figures = {}
    for name, section in sections.items():
        if hasattr(section, "timed"):
            with console.status(f"timing: {name}"):
                found |= section.timed(found, options)
        figures[name] = section.figures(found, options)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=8, help="undisturbed blocks wanted of each model")
    parser.add_argument("--seconds", type=float, default=0.1, help="length of a block")
    parser.add_argument("--page-only", action="store_true", help="measure nothing, write the page from the JSON file")
    asked = parser.parse_args()
    console = Console(width=140, highlight=False)
    if not asked.page_only:
        os.environ["PYTHONWARNINGS"] = "ignore"  # of the processes: exporters announce their successors
        race = {"rounds": asked.rounds, "max_rounds": 2 * asked.rounds, "seconds": asked.seconds}
        with tempfile.TemporaryDirectory() as folder:
            options = Options(tuple(range(asked.seeds)), Path(folder), race)
            found = measured(asked.sections, options, console)
        figures = (Answers.load(JSON).figures if JSON.exists() else {}) | found
        versions = {package: version(package) for package in PACKAGES}
        Answers(machine(), versions, {name: figures[name] for name in SECTIONS if name in figures}).save(JSON)
    answers = Answers.load(JSON)
    for name, figures in answers.figures.items():
        console.rule(name)
        for title, table in figures.items():
            console.print(table.rich(title))
        console.print(SECTIONS[name].answer(figures), markup=False)
    PAGE.write_text(written(PAGE.read_text(), answers))
    console.print(f"written: {JSON}, {PAGE}")


if __name__ == "__main__":
    main()
