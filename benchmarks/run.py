"""`make bench`: this project and its peers, side by side in one run.

    python -m benchmarks.run [--models resnet50 ...] [--batches 1 16] [--engines ...] [--threads 1 2]
                             [--rounds 12] [--starts 9] [--output results.json]

All engines get the same float weights, calibration data and inputs. Per workload: every engine
prepares the model in a process of its own; then their calls are measured in turns, on each number of
threads; then their cold starts, in turns. An engine that fails is shown with the reason, and the
others go on. What `--output` holds of other workloads stays, if it is of this machine, these versions and settings.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import table
from benchmarks.child import Failed, ask, missing
from benchmarks.cold import cold_starts
from benchmarks.engines import ENGINES, UNRESTRICTED
from benchmarks.interleave import Measurement, Racer, interleave, ratio
from benchmarks.machine import commit, machine
from benchmarks.models import MODELS
from benchmarks.peak import dot_product_peak
from benchmarks.results import Prepared, Report, Run, Timed, Workload

console = Console(width=110, highlight=False)


def measure(workload: Workload, engines: list[str], folder: Path, options: argparse.Namespace) -> None:
    """Fill in `workload`: what each engine costs, and all runs."""
    written = ask(Path(sys.executable), "benchmarks.source", workload.model, str(workload.batch), str(folder))
    workload.macs = written["macs"]
    answers = prepare(workload, engines, folder)
    paths = {engine: Path(answer["path"]) for engine, answer in answers.items()}
    x = folder / "input.npy"
    racers = {engine: Racer(engine, path) for engine, path in paths.items()}
    for threads in options.threads:
        found, failed = interleave(
            racers, threads, x, rounds=options.rounds, max_rounds=2 * options.rounds, seconds=options.seconds
        )
        workload.runs.append(as_run(workload.macs, threads, found, failed, options.target))
        show(f"{table.title(workload, workload.runs[-1])}", table.TIMES, table.time_rows(workload.runs[-1]))
        for engine, reason in failed.items():
            console.print(f"  {engine} failed: {reason}", markup=False, soft_wrap=True)
    starts, failed = cold_starts(paths, max(options.threads), x, options.starts)
    workload.absent |= failed
    for engine, shown in starts.items():
        seconds, peak_bytes = shown.median()
        figures = {key: value for key, value in answers[engine].items() if key != "path"}
        workload.prepared[engine] = Prepared(**figures, cold_s=seconds, peak_bytes=peak_bytes, loads_torch=shown.torch)
    show(workload.name, table.COSTS, table.cost_rows(workload))


def prepare(workload: Workload, engines: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Each engine's answer; where it has none, `workload.absent` gets the reason."""
    answers = {}
    for engine in engines:
        reason = ENGINES[engine].objection(workload.model)
        if reason is None:
            try:
                answers[engine] = ask(ENGINES[engine].python, "benchmarks.prepare", engine, str(folder))
                console.print(f"{workload.name}: {engine} prepared in {answers[engine]['prepare_s']:.1f} s")
                continue
            except Failed as failed:
                reason = f"failed: {failed}"
        workload.absent[engine] = reason
        console.print(f"{workload.name}: no {engine}: {reason}", markup=False, soft_wrap=True)
    return answers


def as_run(macs: int, threads: int, found: dict[str, Measurement], failed: dict[str, str], target: str) -> Run:
    """The figures of one run, the ratios to the peer that was fastest in it, and the shares of `target`'s peak."""
    ms = {engine: measured.milliseconds() for engine, measured in found.items()}
    best = min((engine for engine in found if ENGINES[engine].peer), key=lambda engine: ms[engine], default=None)
    peak = dot_product_peak(threads, target)
    engines = {}
    for engine, measured in found.items():
        speed, rounds = ratio(found[best], measured) if best else (None, 0)
        share = macs / (ms[engine] * 1e-3) / peak if peak else None
        engines[engine] = Timed(ms[engine], speed, rounds, share, measured.disturbed)
    return Run(threads, peak, best, engines, failed)


def show(title: str, columns: tuple[str, ...], rows: Any) -> None:
    shown = Table(*columns, title=title)
    for row in rows:
        shown.add_row(*row)
    console.print(shown)


def installed(engines: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The versions of what is installed, and for each engine that is not the reason."""
    versions: dict[str, str] = {}
    absent: dict[str, str] = {}
    for engine in engines:
        found = missing(ENGINES[engine])
        if isinstance(found, str):
            absent[engine] = f"not installed: {found}"
            console.print(f"{engine} is {absent[engine]}", markup=False, soft_wrap=True)
        else:
            versions |= found
    return versions, absent


def main(
    description: str | None = __doc__,
    engines: Sequence[str] = UNRESTRICTED,
    target: str = "native",
    output: Path = Path("benchmarks/results.json"),
    models: Sequence[str] = tuple(MODELS),
    batches: Sequence[int] = (1, 16),
) -> None:
    """Run a benchmark from the command line; the arguments are what it compares unless told otherwise."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(target=target)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=models)
    parser.add_argument("--batches", nargs="+", type=int, default=batches)
    parser.add_argument("--engines", nargs="+", choices=engines, default=engines)
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, min(2, os.cpu_count() or 1)}))
    parser.add_argument("--rounds", type=int, default=12, help="undisturbed blocks wanted of each engine")
    parser.add_argument("--seconds", type=float, default=0.15, help="length of a block")
    parser.add_argument("--starts", type=int, default=9, help="cold starts of each engine")
    parser.add_argument("--output", type=Path, default=output)
    options = parser.parse_args()
    versions, absent = installed(options.engines)
    absent |= {engine: "left out of this run (--engines)" for engine in engines if engine not in options.engines}
    settings = {key: getattr(options, key) for key in ("rounds", "seconds", "starts")}
    report, measured = Report(machine(), versions, settings).kept(options.output), commit()
    console.print(", ".join(f"{key}: {value}" for key, value in report.machine.items()), soft_wrap=True)
    if options.output.exists() and not report.workloads:
        console.print(
            f"{options.output} was measured elsewhere, or with other versions or settings: it is begun anew",
            soft_wrap=True,
        )
    present = [engine for engine in options.engines if engine not in absent]
    for model in options.models:
        for batch in options.batches:
            workload = Workload(model, batch, 0, measured, absent=dict(absent))
            with tempfile.TemporaryDirectory() as scratch:
                measure(workload, present, Path(scratch), options)
            report.put(workload)
            report.save(options.output)
    console.print(f"written to {options.output}")


if __name__ == "__main__":
    main()
