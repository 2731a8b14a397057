"""The search for mixed precision on EfficientNet-Lite0, against as many random layers left in float.

    python -m benchmarks.mixed [--drop 0.03] [--random 16] [--preset balanced] [--threads 1]

There are no labels, so that the metric is how often the top label is the float model's, on crops that calibration does
not use. Each random choice has as many layers as the search's result, and is called in turns with it: medians of 100
calls each. Some ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import random
import time
from functools import partial

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import qcompile
from examples import photographs
from examples.efficientnet_lite0 import load_model
from qcompile.compiler import compile_program
from qcompile.evaluation.timing import interleave
from qcompile.metrics import Agreement, Checked
from qcompile.mixed import search
from qcompile.quantizer import prepared
from qcompile.simulation import Simulation
from qcompile.stages import Stages
from qcompile.targets import get
from qcompile.targets.capability import objection


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drop", type=float, default=0.03)
    parser.add_argument("--random", type=int, default=16)
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=240)
    parser.add_argument("--preset")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    console, target = Console(width=120), get("native")
    held_out = photographs.crops(options.held_out, seed=2)
    config = qcompile.QuantConfig(preset=options.preset)
    calibration = photographs.crops(options.calibration, seed=1)
    start = prepared(load_model(), None, calibration, None, config, None, objection(target), None)
    finish = partial(compile_program, target=target, threads=options.threads)
    metric = Checked(Agreement(held_out, start[0]))
    began = time.perf_counter()
    stages = Stages(*start)
    with console.status("searching") as status:
        show = lambda step, done, total: status.update(f"{step}: {done} of {total or '?'}")  # noqa: E731
        compiled, choices = search(stages, metric, options.drop, target, finish, show)
    console.print(choices.table())
    console.print(f"found in {time.perf_counter() - began:.0f} s")

    groups = Simulation(stages).groups
    rng = random.Random(0)
    table = Table("left in float", "metric", "target", "ms", "of the search's ms", title="as many random layers")
    ratios: list[tuple[float, bool]] = []
    for _ in track(range(options.random), "random layers", console=console, transient=True):
        names = rng.sample(sorted(groups), len(choices.rows))
        other = finish(stages.integer(frozenset(m.name for name in names for m in groups[name].members)))
        ours, theirs = interleave([partial(compiled, held_out[0]), partial(other, held_out[0])], 20)
        value = metric(other, "random layers")
        met = choices.float_metric - value <= options.drop
        ratios.append((theirs / ours, met))
        places = ", ".join(sorted(groups[name].root.name for name in names))
        table.add_row(places, f"{value:.3f}", "met" if met else "missed", f"{theirs:.3f}", f"{theirs / ours:.2f}")
    console.print(table)
    console.print(
        f"the search {'met' if choices.met else 'missed'} the target with {len(choices.rows)} layers in float"
    )
    for kind, chosen in (("", ratios), (" that meet the target", [r for r in ratios if r[1]])):
        slower, times = sum(ratio >= 1 for ratio, _ in chosen), sorted(ratio for ratio, _ in chosen)
        spread = f": {times[0]:.2f} to {times[-1]:.2f} times the search's" if times else ""
        console.print(f"{slower} of {len(times)} random choices{kind} take no less time{spread}")
    console.print(f"all of it in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    with torch.no_grad():
        main()
