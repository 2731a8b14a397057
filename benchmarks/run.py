"""`make bench`: this project against ONNX Runtime and OpenVINO, batch 1, side by side in one run.

    python -m benchmarks.run [--models resnet50 ...] [--engines ...] [--threads 1 2] [--output results.json]

All engines get the same float weights, calibration crops and inputs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.engines import ENGINES, export_onnx
from benchmarks.interleave import interleave, ratio
from benchmarks.models import MODELS, multiply_accumulates
from benchmarks.peak import dot_product_peak
from examples.photographs import crops

OURS = "qcompile"
CALIBRATION_CROPS, HELD_OUT_CROPS = 60, 120
console = Console(width=110)


def processor() -> str:
    """The processor's name, as /proc/cpuinfo has it."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].split(":", 1)[1].strip() if names else platform.machine()


def prepare(name: str, engines: list[str], folder: Path) -> dict[str, Any]:
    """Build the network, and prepare it for every engine. Times are seconds, sizes bytes."""
    torch.set_num_threads(os.cpu_count() or 1)
    model = MODELS[name]()
    calibration = [x.numpy() for x in crops(CALIBRATION_CROPS, seed=1)]
    onnx = folder / f"{name}.onnx"
    export_onnx(model, calibration[0], onnx)
    prepared: dict[str, Any] = {
        "macs": multiply_accumulates(model, torch.from_numpy(calibration[0])),
        "paths": {},
        "prepare_s": {},
        "sqnr_db": {},
        "agreement": {},
    }
    held_out = crops(HELD_OUT_CROPS, seed=2)
    with torch.no_grad():
        expected = torch.cat([model(x) for x in held_out])
    for engine in engines:
        start = time.perf_counter()
        path = ENGINES[engine].prepare(onnx, model, calibration)
        prepared["prepare_s"][engine] = time.perf_counter() - start
        prepared["paths"][engine] = path
        run = ENGINES[engine].load(path, os.cpu_count() or 1)
        actual = torch.cat([torch.from_numpy(np.array(run(x.numpy()))) for x in held_out])
        prepared["sqnr_db"][engine] = _sqnr(expected, actual)
        prepared["agreement"][engine] = _agreement(expected, actual)
    return prepared


def _sqnr(expected: Tensor, actual: Tensor) -> float:
    return float(10 * torch.log10(expected.square().sum() / (expected - actual).square().sum()))


def _agreement(expected: Tensor, actual: Tensor) -> float:
    return float((expected.argmax(1) == actual.argmax(1)).float().mean())


def measure(
    name: str, prepared: dict[str, Any], threads: int, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """One table's worth: every engine in turns on `threads` threads."""
    x = folder / "input.npy"
    np.save(x, crops(1, seed=2)[0].numpy())
    results = interleave(
        prepared["paths"], threads, x, rounds=options.rounds, max_rounds=4 * options.rounds, seconds=options.seconds
    )
    ours = results.get(OURS)
    peak = dot_product_peak(threads)
    row: dict[str, Any] = {"model": name, "threads": threads, "macs": prepared["macs"], "peak_macs_per_s": peak}
    row["engines"] = {
        engine: {
            "ms": found.milliseconds(),
            "share_of_peak": prepared["macs"] / (found.milliseconds() * 1e-3) / peak if peak else None,
            "disturbed": found.disturbed,
            "sqnr_db": prepared["sqnr_db"][engine],
            "agreement": prepared["agreement"][engine],
            "prepare_s": prepared["prepare_s"][engine],
        }
        for engine, found in results.items()
    }
    if ours is not None:
        for engine, found in results.items():
            row["engines"][engine]["ratio"], row["engines"][engine]["clean_rounds"] = ratio(found, ours)
    return row


def show(row: dict[str, Any]) -> None:
    plural = "s" if row["threads"] > 1 else ""
    peak = f", peak {row['peak_macs_per_s'] / 1e9:.0f} GMAC/s" if row["peak_macs_per_s"] else ""
    title = f"{row['model']}, {row['threads']} thread{plural} ({row['macs'] / 1e9:.2f} GMAC{peak})"
    table = Table("engine", "ms", "ratio (rounds)", "of peak", "SQNR", "same top-1", "disturbed", title=title)
    for engine, found in row["engines"].items():
        faster = (
            "" if engine == OURS or "ratio" not in found else f"{found['ratio']:.2f} x ({found['clean_rounds']} rounds)"
        )
        share = f"{found['share_of_peak']:.0%}" if found["share_of_peak"] else ""
        table.add_row(
            engine,
            f"{found['ms']:.3f}",
            faster,
            share,
            f"{found['sqnr_db']:.1f} dB",
            f"{found['agreement']:.1%}",
            f"{found['disturbed']:.0%}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, min(2, os.cpu_count() or 1)}))
    parser.add_argument("--rounds", type=int, default=20, help="undisturbed blocks wanted of each engine")
    parser.add_argument("--seconds", type=float, default=0.15, help="length of a block")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results.json"))
    options = parser.parse_args()
    console.print(f"{processor()}, {os.cpu_count()} cores")
    rows = []
    for name in options.models:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            prepared = prepare(name, options.engines, folder)
            for threads in options.threads:
                rows.append(measure(name, prepared, threads, folder, options))
                show(rows[-1])
    packages = ("torch", "apache-tvm", "onnxruntime", "openvino", "nncf")
    report = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "versions": {package: version(package) for package in packages},
        "measured": rows,
    }
    options.output.write_text(json.dumps(report, indent=1))
    console.print(f"written to {options.output}")


if __name__ == "__main__":
    main()
