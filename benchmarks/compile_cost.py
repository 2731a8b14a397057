"""What compiling costs: seconds by part and peak memory, and whether calibration's memory stays constant.

    python -m benchmarks.compile_cost [--model resnet50] [--target native]

"calibrate" is given apart, since it grows with the data. Its memory is what the process holds while it reads
one of the first batches, and one of the last.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.models import MODELS

IMAGES, BATCHES, EARLY = 8, 200, 20


def _batches(count: int, resident_mb: list[float] | None = None) -> Iterator[Tensor]:
    """Random batches of one image, made as they are read; notes the memory held before each."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        if resident_mb is not None:
            resident_mb.append(_resident_mb())
        yield torch.randn(1, 3, 224, 224, generator=generator)


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def _peak_mb() -> float:
    """The most memory this process or one that it started has held, MB."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) * 1024 / 1e6


def compiling(model: str, target: str) -> dict[str, Any]:
    """Seconds of each part of compile(), and the peak memory, MB."""
    from qcompile.compiler import compile_program
    from qcompile.quantizer import quantize
    from qcompile.targets import get
    from qcompile.targets.capability import objection

    network, where = MODELS[model](), get(target)
    before = _peak_mb()
    start = time.perf_counter()
    quantized = quantize(network, calibration=_batches(IMAGES), objection=objection(where))
    middle = time.perf_counter()
    compile_program(quantized, where, strict=True)
    end = time.perf_counter()
    calibrate = sum(r.seconds for r in quantized.passes if r.name == "calibrate")
    return {
        "calibrate_s": calibrate,
        "quantize_s": middle - start - calibrate,
        "compile_s": end - middle,
        "before_mb": before,
        "peak_mb": _peak_mb(),
    }


def calibrating(model: str) -> dict[str, Any]:
    """The memory held at an early and at the last batch of a long calibration, MB."""
    from qcompile.quantizer import quantize

    resident: list[float] = []
    network = MODELS[model]()
    quantize(network, example_inputs=torch.randn(1, 3, 224, 224), calibration=_batches(BATCHES, resident))
    return {"early_mb": resident[EARLY - 1], "last_mb": resident[-1]}


def _apart(part: str, *arguments: str) -> Any:
    command = [sys.executable, "-m", "benchmarks.compile_cost", "--part", part, *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="resnet50")
    parser.add_argument("--target", default="native")
    parser.add_argument("--part", choices=("compile", "calibrate"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        part = compiling(options.model, options.target) if options.part == "compile" else calibrating(options.model)
        print(json.dumps(part))
        return
    cost = _apart("compile", "--model", options.model, "--target", options.target)
    memory = _apart("calibrate", "--model", options.model)
    table = Table("", "", title=f"Compiling {options.model} for {options.target}")
    table.add_row("quantize, without calibration", f"{cost['quantize_s']:.1f} s")
    table.add_row("lower, build, golden vectors", f"{cost['compile_s']:.1f} s")
    table.add_row("together", f"{cost['quantize_s'] + cost['compile_s']:.1f} s")
    table.add_row(f"calibrate, {IMAGES} images", f"{cost['calibrate_s']:.1f} s")
    table.add_row("peak memory", f"{cost['peak_mb']:.0f} MB ({cost['before_mb']:.0f} MB before, to make the model)")
    for batch, held in ((EARLY, memory["early_mb"]), (BATCHES, memory["last_mb"])):
        table.add_row(f"memory held at calibration batch {batch}", f"{held:.0f} MB")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
