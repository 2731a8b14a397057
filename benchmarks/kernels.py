"""Single kernels with their default tiles, as a share of the machine's dot-product peak.

    python -m benchmarks.kernels [--target native] [--threads 1 2] [--rounds 15] [--output kernels.json]

Every round times the peak's loop and then each kernel, and what is reported is the median over the
rounds of the rate divided by that round's peak. Weights and activations are random; the activations
have the halo that the network's planner would give them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

GOAL = 0.8


@dataclass(frozen=True)
class Shape:
    """A convolution of batch 1 with 'same' padding; height x width are those of its input."""

    height: int
    width: int
    channels: int
    out_channels: int
    kernel: int = 1
    stride: int = 1

    @property
    def out(self) -> tuple[int, int]:
        return -(-self.height // self.stride), -(-self.width // self.stride)

    @property
    def macs(self) -> int:
        return self.out[0] * self.out[1] * self.channels * self.out_channels * self.kernel**2

    def __str__(self) -> str:
        what = f"{self.kernel}x{self.kernel}" + (f"/{self.stride}" if self.stride > 1 else "")
        return f"{what} {self.height}x{self.width} {self.channels}->{self.out_channels}"


SHAPES = (
    Shape(1, 256, 256, 256),
    Shape(1, 512, 512, 512),
    Shape(1, 1024, 1024, 1024),
    Shape(56, 56, 64, 64),
    Shape(56, 56, 64, 256),
    Shape(56, 56, 256, 64),
    Shape(28, 28, 128, 512),
    Shape(28, 28, 512, 128),
    Shape(14, 14, 256, 1024),
    Shape(14, 14, 1024, 256),
    Shape(7, 7, 512, 2048),
    Shape(7, 7, 2048, 512),
    Shape(56, 56, 64, 64, 3),
    Shape(28, 28, 128, 128, 3),
    Shape(14, 14, 256, 256, 3),
    Shape(7, 7, 512, 512, 3),
    Shape(56, 56, 128, 128, 3, 2),
    Shape(28, 28, 256, 256, 3, 2),
    Shape(14, 14, 512, 512, 3, 2),
    Shape(56, 56, 256, 512, 1, 2),
)


class Timed:
    """A compiled function with its arguments, to be timed again and again."""

    def __init__(self, func: Any, target: Any, arguments: list[Any], macs: int) -> None:
        import tvm

        module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
        self._library = tvm.compile(module, tvm.target.Target(target.tvm)).mod
        self._arguments = [tvm.runtime.tensor(a) if isinstance(a, np.ndarray) else a for a in arguments]
        self._macs = macs
        self._calls = max(1, round(0.02 / self._seconds(1)))

    def _seconds(self, calls: int) -> float:
        import tvm

        evaluate = self._library.time_evaluator("main", tvm.cpu(), number=calls, repeat=1)
        return float(evaluate(*self._arguments).mean)

    def rate(self) -> float:
        """Multiply-accumulates a second, over about 20 ms."""
        return self._macs / self._seconds(self._calls)


def kernel(shape: Shape, target: Any, config: Any = None) -> tuple[str, Timed]:
    """The name and the timed kernel of `shape`; `config` None: the default tile."""
    from qcompile.targets.cpu.choose import generator_for
    from qcompile.targets.cpu.epilogue import Requantize
    from qcompile.targets.filters import ConvShape, Filters
    from qcompile.targets.layout import Layout

    isa, rng, pad = target.isa, np.random.default_rng(0), shape.kernel // 2
    x = Layout((1, shape.channels, shape.height, shape.width), True, shape.channels, (pad, pad, pad, pad))
    y = Layout((1, shape.out_channels, *shape.out), True, shape.out_channels)
    place = ConvShape(x, y, None, (shape.kernel,) * 2, (shape.stride,) * 2, (pad, pad), (1, 1), 1)
    weight = rng.integers(-127, 128, (shape.out_channels, shape.channels, shape.kernel, shape.kernel), dtype=np.int8)
    bias = rng.integers(-1000, 1000, shape.out_channels, dtype=np.int32)
    m = (rng.random(shape.out_channels) * 1e-3).astype(np.float32)
    filters = Filters(weight, bias, m, x_zero_point=3)
    made = generator_for(place, isa).kernel(place, filters, Requantize(-128), isa, config=config)
    pools, starts = {}, []
    for constant in made.constants:
        before = pools.get(str(constant.dtype), constant[:0])
        starts.append(before.size)
        pools[str(constant.dtype)] = np.concatenate([before, constant])
    activations = rng.integers(0, 256, x.size, dtype=np.uint8).view(isa.storage)
    return made.name, Timed(
        made.func, target, [activations, *pools.values(), *starts, np.empty(y.size, isa.storage)], shape.macs
    )


def measure(name: str, threads: int, rounds: int) -> dict[str, Any]:
    """The share of the peak that each shape reaches, in this process (TVM_NUM_THREADS is set)."""
    from qcompile import targets
    from qcompile.device import lacks
    from qcompile.targets.cpu.peak import peak_kernel

    target = targets.get(name)
    if missing := lacks(target.machine, target.features):
        raise SystemExit(f"{target.name}: this machine {missing}")
    made = peak_kernel(target, threads)
    if made is None:
        raise SystemExit(f"{target.name} has no single instruction for an int8 dot product")
    peak = Timed(made.func, target, made.arguments, made.macs)
    kernels = {str(shape): kernel(shape, target) for shape in SHAPES}
    shares: dict[str, list[float]] = {shape: [] for shape in kernels}
    peaks = []
    for _ in range(rounds):
        for shape, (_, timed) in kernels.items():
            peaks.append(peak.rate())
            shares[shape].append(timed.rate() / peaks[-1])
    return {
        "target": target.name,
        "threads": threads,
        "peak_macs_per_s": statistics.median(peaks),
        "share_of_peak": {shape: statistics.median(found) for shape, found in shares.items()},
        "kernel": {shape: name for shape, (name, _) in kernels.items()},
    }


def show(found: dict[str, Any]) -> None:
    plural = "s" if found["threads"] > 1 else ""
    title = f"{found['target']}, {found['threads']} thread{plural}, peak {found['peak_macs_per_s'] / 1e9:.0f} GMAC/s"
    table = Table("shape", "kernel", "of peak", title=title)
    for shape, share in found["share_of_peak"].items():
        table.add_row(shape, found["kernel"][shape], f"{share:.0%}", style=None if share >= GOAL else "yellow")
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="native")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, min(2, os.cpu_count() or 1)}))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/kernels.json"))
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_process:
        print(json.dumps(measure(options.target, options.threads[0], options.rounds)))
        return
    results = []
    for threads in options.threads:  # a process each: TVM's pool never grows
        command = [sys.executable, "-m", "benchmarks.kernels", "--in-process"]
        command += ["--target", options.target, "--threads", str(threads), "--rounds", str(options.rounds)]
        environment = {**os.environ, "TVM_NUM_THREADS": str(threads)}
        results.append(json.loads(subprocess.run(command, env=environment, check=True, stdout=-1).stdout))
        show(results[-1])
    options.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
