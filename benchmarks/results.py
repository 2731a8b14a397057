"""What a run of the benchmark found, as data: `results.json` holds exactly this.

Seconds, bytes and ratios; an engine that has no figures has a reason instead.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Prepared:
    """One engine on one workload, whatever the number of threads.

    Attributes:
        bytes: of all files that a device needs, without the engine itself.
        prepare_s: from the float model to these files.
        cold_s: from the start of a process to its first answer.
        peak_bytes: the most memory that this process held.
        loads_torch: whether it loaded PyTorch.
        sqnr_db, agreement: of the outputs to those of the float model; None: they are equal.
    """

    bytes: int
    prepare_s: float
    cold_s: float
    peak_bytes: int
    loads_torch: bool
    sqnr_db: float | None
    agreement: float


@dataclass(frozen=True)
class Timed:
    """One engine in one run.

    Attributes:
        ms: the median of a call.
        speed: how many times faster than the best peer, the median over the rounds of the ratio in a round.
        rounds: undisturbed rounds that `speed` is taken over; 0: all rounds were disturbed, and are taken.
        share_of_peak: multiply-accumulates a second, as a part of the machine's dot-product peak.
        disturbed: the part of its blocks that other load disturbed.
    """

    ms: float
    speed: float | None
    rounds: int
    share_of_peak: float | None
    disturbed: float


@dataclass(frozen=True)
class Run:
    """All engines in turns, on one number of threads. `best_peer`: the fastest engine that is not this project's."""

    threads: int
    peak_macs_per_s: float | None
    best_peer: str | None
    engines: dict[str, Timed]
    failed: dict[str, str]


@dataclass
class Workload:
    """One model at one batch size; `absent`: engine -> why it has no figures; `commit`: of this project."""

    model: str
    batch: int
    macs: int
    commit: str = ""
    prepared: dict[str, Prepared] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.model}, batch {self.batch}"


@dataclass
class Report:
    """What came out, on what and with what. Workloads may come from several runs, of several commits."""

    machine: dict[str, str]
    versions: dict[str, str]
    options: dict[str, Any]
    workloads: list[Workload] = field(default_factory=list)

    @property
    def commits(self) -> str:
        """Of this project: one for all workloads, or of which workloads it is."""
        of: dict[str, list[str]] = {}
        for workload in self.workloads:
            of.setdefault(workload.commit, []).append(workload.name)
        return next(iter(of)) if len(of) == 1 else ", ".join(f"{c} ({'; '.join(names)})" for c, names in of.items())

    def kept(self, path: Path) -> Report:
        """This, with what was measured before of other workloads, where that was on the same machine, with the same
        versions and settings."""
        before = Report.load(path) if path.exists() else self
        agree = all(before.versions.get(name, number) == number for name, number in self.versions.items())
        if (before.machine, before.options) != (self.machine, self.options) or not agree:
            return self
        return replace(self, versions=before.versions | self.versions, workloads=[*before.workloads])

    def put(self, workload: Workload) -> None:
        """Add `workload`, in place of what was measured of it before."""
        names = [other.name for other in self.workloads]
        if workload.name in names:
            self.workloads[names.index(workload.name)] = workload
        else:
            self.workloads.append(workload)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(rounded(asdict(self)), indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> Report:
        raw = json.loads(path.read_text())
        return Report(**{**raw, "workloads": [_workload(w) for w in raw["workloads"]]})


def _workload(raw: dict[str, Any]) -> Workload:
    prepared = {engine: Prepared(**p) for engine, p in raw["prepared"].items()}
    runs = [Run(**{**r, "engines": {engine: Timed(**t) for engine, t in r["engines"].items()}}) for r in raw["runs"]]
    return Workload(**{**raw, "prepared": prepared, "runs": runs})


def rounded(value: Any) -> Any:
    """Four digits are more than a measurement has."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value
