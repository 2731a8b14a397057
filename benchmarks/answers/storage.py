"""What is stored: the file of the float weights, and the files that qcompile writes."""

from __future__ import annotations

from typing import Any

from benchmarks.answers import builds
from benchmarks.answers.builds import BFLOAT16, FLOAT32, JOINED, ORIGINAL, Build, key
from benchmarks.answers.jobs import Job
from benchmarks.answers.networks import LITE0, MLP, NAMES
from benchmarks.figures import MEGABYTES, TEXT, TIMES, Figures

MEGA = 1e6
INT8, RATIO = "int8", "float / .qcm"
OTHER_NUMERICS = (FLOAT32, BFLOAT16)
FEW_BITS = ("int8", "int4")  # of weights alone
FORMS = [(name, JOINED) for name in (*NAMES, MLP)] + [(LITE0, form) for form in OTHER_NUMERICS]


def jobs(options: Any) -> dict[str, Job]:
    found: dict[str, Job] = {}
    for name in (*NAMES, MLP):
        found |= builds.original_job(name, options.folder)
    for name, form in FORMS:
        found |= builds.job(name, form, options.folder)
    return found | {key(MLP, _weights(bits)): Job(builds.few_bits, (bits, options.folder)) for bits in FEW_BITS}


def _weights(bits: str) -> str:
    return f"{bits} weights alone"


def figures(found: dict[str, Any], options: Any) -> dict[str, Figures]:
    rows: list[list[Any]] = []
    for name, form in [*FORMS, *((MLP, _weights(bits)) for bits in FEW_BITS)]:
        build: Build = found[key(name, form)]
        whole, before = sum(build.members.values()), found[key(name, ORIGINAL)].facts["file"]
        parts = [build.members[part] / MEGA for part in ("weights", "code", "rest")]
        rows.append([name, INT8 if form == JOINED else form, before / MEGA, whole / MEGA, before / whole, *parts])
    columns = {
        "network": TEXT,
        "numerics": TEXT,
        "float weights": MEGABYTES,
        ".qcm file": MEGABYTES,
        RATIO: TIMES,
        "of it weights": MEGABYTES,
        "machine code": MEGABYTES,
        "the rest": MEGABYTES,
    }
    return {"storage": Figures(columns, rows)}


def answer(figures: dict[str, Figures]) -> str:
    table = figures["storage"]
    int8 = {row[0]: row[4] for row in table.rows if row[1] == INT8}
    most, least = max(int8, key=int8.__getitem__), min(int8, key=int8.__getitem__)
    return (
        f"The file of the float weights is {int8[most]:.1f} times as large as that of the int8 network, machine code "
        f"and all, for {most}, and {int8[least]:.1f} times for {least}, which gains least. With weights of 4 bits and "
        f"float arithmetic the factor of the MLP is {table.at(RATIO, MLP, _weights('int4')):.1f}."
    )
