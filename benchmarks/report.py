"""The page `docs/benchmarks.md` and its picture, from the results of a run; neither is edited by hand.

python -m benchmarks.report [benchmarks/results.json] [--avx2 benchmarks/avx2.json] [--other benchmarks/other.json]
    [--folder docs]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import table
from benchmarks.engines import OURS, UNTUNED
from benchmarks.plot import draw
from benchmarks.results import Report, Run, Workload

TIE = 0.1
PAGE, PICTURE = "benchmarks.md", "benchmarks.svg"

INTRODUCTION = """\
# Benchmarks

What `make bench` measured: int8 models of this project, and what other engines make of the same float
weights, calibration data and inputs. `python -m benchmarks.report` wrote this page from
`benchmarks/results.json`. Engines are compared within a row; rows may come from several runs, of the commits
that are named with the versions.
"""

METHOD = """\
## How it is measured

- All engines are measured **in turns**: every round gives each of them one block of calls, and while
  one is measured the others sleep. A ratio is the median over the rounds of the ratio within a round,
  because a machine's speed drifts by more than what separates the engines. Under 10% is a tie.
- A block in which other load took a core or kept a thread waiting counts as disturbed, and is left out.
- **Speed** is relative to the best peer: the fastest engine in that row that is not this project's, int8
  or float. Above 1 is faster.
- **Of peak**: multiply-accumulates of the model's convolutions and linear layers in a second, as a part of
  what the machine's fastest int8 instruction does in registers, measured just after. AMX multiplies eight times as much
  as a dot product; a network of few channels spends its time there on loads and on what follows a product.
- **File**: all that a device needs besides the engine itself. **Compile**: from the float model in memory
  or in ONNX to these files, calibration included, importing the engine's packages not.
- **Cold start**: from the start of a Python process to its first answer, with the files in the page cache; the median
  of starts in turns, in another order each time. The process imports NumPy and the engine, and no more. All engines
  start without the hooks that installed packages may run in every Python (`-S`), and with NumPy's own BLAS, which none
  of them uses, on one thread. OpenVINO compiles the network while it loads it; a cache of its own, which would spare it
  that, is not used. **Memory**: the most that this process held (VmHWM). Both with the most threads.
- **SQNR** and **same top-1** compare the outputs with the float model's on held-out data. They belong next
  to the speed, since an engine can be fast by leaving out what it should compute; they are no measure of
  accuracy, since most of these weights are random.
- **qcompile untuned** is compiled with the analytic default of every kernel; **qcompile** also looks up what was
  measured for these models on this kind of processor and ships with the package ([tuning](tuning.md)).
- Every call takes a float32 NumPy array and returns one. LiteRT gets images channels last, as it was
  converted; the others channels first. Batch 16 is compiled with that static shape. What OpenVINO does not compute in
  int8 it computes in float32 (`INFERENCE_PRECISION_HINT`), as the float model is.
- Batch 16 has the int8 peers that came nearest at batch 1; the engines that were left out are listed with each row.
- The networks: ResNet-18 and ResNet-50, MobileNetV2, EfficientNet-Lite0 (224 x 224 photographs), and an MLP
  784-1024-1024-10. EfficientNet-Lite0 has its ImageNet weights; the other weights are random with
  the statistics of trained ones.
"""

RESTRICTED = """\
## With AVX2 alone

The machine has more than AVX2, so both sides are held to it (`python -m benchmarks.avx2`). This project is
compiled for `x86-avx2`. ONNX Runtime chooses its kernels by what the `cpuid` instruction says and has no switch;
so in a copy of its library every `cpuid` is replaced by an invalid instruction, and a signal handler answers in its
place, leaving out AVX512, AVX-VNNI and AMX. Nothing else is changed: it is the same release with the kernels that
it picks on a processor with AVX2.

Models, quantization and method are those of this page. ONNX Runtime's AVX2 kernels multiply uint8 by int8 with
`vpmaddubsw`, which saturates at 16 bits, so they lose accuracy to what it computes with VNNI: compare its SQNR
here with the one below. This project's answers are the same bits on both. Of a real processor without AVX512
this is the instruction set, not the caches and the execution units.
"""

OTHER = """\
## On another machine

The same on a machine without a matrix unit, measured with an earlier version ({commit}, `benchmarks/other.json`); rows
of batch 16 come from runs of their own, with the int8 engines that came nearest.
"""


def page(report: Report, avx2: Report | None, other: Report | None) -> str:
    """The whole page; `avx2`: what `python -m benchmarks.avx2` found; `other`: as `report`, of another machine."""
    parts = [INTRODUCTION, f"![Speed of each engine relative to the best peer]({PICTURE})\n"]
    parts += ["## The machine\n", table.place(report.machine, report.versions | {"commit": report.commits})]
    parts += ["## Summary\n", table.markdown(*summary(report)), METHOD]
    parts += [RESTRICTED, measured_on(avx2), table.markdown(*restricted(avx2))] if avx2 else []
    parts += [OTHER.format(commit=other.commits), *shortly(other)] if other else []
    parts += ["## Each workload\n"]
    for workload in report.workloads:
        parts += [f"### {workload.name}\n", *details(workload)]
    return "\n".join(parts)


def measured_on(report: Report) -> str:
    return f"Measured on {report.machine['processor']}, commit {report.commits}.\n"


def shortly(report: Report) -> Iterable[str]:
    """The machine, the summary, and one table of what every engine costs."""
    yield table.markdown(("", ""), list(report.machine.items()))
    yield table.markdown(*summary(report))
    costs = [(workload.name, *row) for workload in report.workloads for row in table.cost_rows(workload)]
    yield table.markdown(("workload", *table.COSTS), costs)


def summary(report: Report) -> tuple[Sequence[str], list[Sequence[str]]]:
    """One row a run: this project and the best peer. What is no tie is bold."""
    columns = ("workload", "threads", f"{OURS} ms", "untuned ms", "best peer", "its ms", "speed", "of peak")
    rows: list[Sequence[str]] = []
    for workload in report.workloads:
        for run in workload.runs:
            ours, untuned, best = (run.engines.get(name or "") for name in (OURS, UNTUNED, run.best_peer))
            speed = table.speed(ours.speed) if ours and ours.speed else ""
            rows.append(
                (
                    workload.name,
                    str(run.threads),
                    table.milliseconds(ours.ms) if ours else "failed",
                    table.milliseconds(untuned.ms) if untuned else "",
                    run.best_peer or "",
                    table.milliseconds(best.ms) if best else "",
                    f"**{speed}**" if ours and ours.speed and abs(ours.speed - 1) > TIE else speed,
                    table.share(ours.share_of_peak) if ours else "",
                )
            )
    return columns, rows


def restricted(report: Report) -> tuple[Sequence[str], list[Sequence[str]]]:
    """One row for each engine on each workload."""
    threads = sorted({run.threads for workload in report.workloads for run in workload.runs})
    columns = ["workload", "engine"]
    for count in threads:
        columns += [f"ms, {table.threads(count)}", "speed"]
    rows: list[Sequence[str]] = []
    for workload in report.workloads:
        for engine, cost in workload.prepared.items():
            cells = [cell for run in workload.runs for cell in _cells(run, engine)[:2]]
            rows.append((workload.name, engine, *cells, table.sqnr(cost)))
    return (*columns, "SQNR"), rows


def details(workload: Workload) -> Iterable[str]:
    """Both tables of a workload, and what has no figures."""
    yield f"{table.macs(workload)} a call.\n"
    runs = workload.runs
    columns = ["engine"]
    for run in runs:
        columns += [f"ms, {table.threads(run.threads)}", "speed", "of peak"]
    engines = list(dict.fromkeys(engine for run in runs for engine in run.engines))
    rows = [[engine, *(cell for run in runs for cell in _cells(run, engine))] for engine in engines]
    yield table.markdown(columns, rows)
    yield table.markdown(table.COSTS, list(table.cost_rows(workload)))
    absent = dict(workload.absent)
    for run in runs:
        absent |= {f"{engine}, {table.threads(run.threads)}": reason for engine, reason in run.failed.items()}
    if absent:
        yield "Without figures:\n"
        yield "".join(f"- {engine}: {reason}\n" for engine, reason in absent.items())


def _cells(run: Run, engine: str) -> tuple[str, str, str]:
    timed = run.engines.get(engine)
    if timed is None:
        return ("", "", "")
    return table.milliseconds(timed.ms), table.speed(timed.speed), table.share(timed.share_of_peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, default=Path("benchmarks/results.json"))
    parser.add_argument("--avx2", type=Path, default=Path("benchmarks/avx2.json"))
    parser.add_argument("--other", type=Path, default=Path("benchmarks/other.json"))
    parser.add_argument("--folder", type=Path, default=Path("docs"))
    options = parser.parse_args()
    report = Report.load(options.results)
    avx2, other = (Report.load(path) if path.exists() else None for path in (options.avx2, options.other))
    (options.folder / PAGE).write_text(page(report, avx2, other))
    draw(report, options.folder / PICTURE)
    print(f"written: {options.folder / PAGE}, {options.folder / PICTURE}")


if __name__ == "__main__":
    main()
