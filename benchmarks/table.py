"""The figures of a run as rows of text, for the terminal and for the documentation alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.results import Prepared, Run, Workload

TIMES = ("engine", "ms", "speed", "rounds", "of peak", "disturbed")
COSTS = ("engine", "file", "compile", "cold start", "memory", "SQNR", "same top-1")


def title(workload: Workload, run: Run) -> str:
    """What was run, on how many threads, and the limits."""
    peak = f", peak {run.peak_macs_per_s / 1e9:.0f} GMAC/s" if run.peak_macs_per_s else ""
    return f"{workload.name}, {threads(run.threads)} ({macs(workload)}{peak})"


def threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def macs(workload: Workload) -> str:
    return f"{workload.macs / 1e9:.2f} GMAC" if workload.macs >= 1e8 else f"{workload.macs / 1e6:.1f} MMAC"


def time_rows(run: Run) -> Iterator[tuple[str, ...]]:
    """Rows of TIMES."""
    for engine, timed in run.engines.items():
        yield (
            engine,
            milliseconds(timed.ms),
            speed(timed.speed),
            str(timed.rounds),
            share(timed.share_of_peak),
            f"{timed.disturbed:.0%}",
        )


def cost_rows(workload: Workload) -> Iterator[tuple[str, ...]]:
    """Rows of COSTS."""
    for engine, cost in workload.prepared.items():
        yield (
            engine,
            f"{cost.bytes / 1e6:.1f} MB",
            f"{cost.prepare_s:.1f} s",
            f"{1000 * cost.cold_s:.0f} ms",
            f"{cost.peak_bytes / 1e6:.0f} MB",
            sqnr(cost),
            f"{cost.agreement:.1%}",
        )


def sqnr(cost: Prepared) -> str:
    return "equal" if cost.sqnr_db is None else f"{cost.sqnr_db:.1f} dB"


def milliseconds(ms: float) -> str:
    return f"{ms:.1f}" if ms >= 100 else f"{ms:.2f}" if ms >= 1 else f"{ms:.4f}"


def speed(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} x"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def place(machine: Mapping[str, str], versions: Mapping[str, str]) -> str:
    """Where something was measured, and with what."""
    listed = ", ".join(f"{name} {number}" for name, number in sorted(versions.items()))
    return f"{markdown(('', ''), list(machine.items()))}\nVersions: {listed}.\n"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text, numbers stand on the right."""
    rule = ["---", *["---:"] * (len(columns) - 1)] if columns[0] else ["---"] * len(columns)
    return "".join("| " + " | ".join(row) + " |\n" for row in (columns, rule, *rows))
