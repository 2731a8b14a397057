"""What each preset of `QuantConfig` keeps of EfficientNet-Lite0's accuracy, and how long it takes.

    python -m benchmarks.presets [--calibration 128] [--held-out 240]

All layers are int8 (`strict=True`). Calibration and evaluation use different crops of the same photographs.
"""

from __future__ import annotations

import argparse
import time

import torch
from rich.console import Console
from rich.table import Table

import qcompile
from examples import photographs
from examples.efficientnet_lite0 import load_model
from qcompile.config import PRESETS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=240)
    options = parser.parse_args()
    model, held_out = load_model(), photographs.crops(options.held_out, seed=2)
    table = Table("preset", "SQNR", "same top-1", "quantize and compile", title="EfficientNet-Lite0, int8 throughout")
    for preset in (None, *PRESETS):
        start = time.perf_counter()
        compiled = qcompile.compile(
            model,
            calibration=photographs.crops(options.calibration, seed=1),
            config=qcompile.QuantConfig(preset=preset),
            strict=True,
        )
        seconds = time.perf_counter() - start
        found = qcompile.evaluate(compiled, model, held_out, blocks=1)
        table.add_row(preset or "none", f"{found.sqnr:.1f} dB", f"{found.agreement:.1%}", f"{seconds:.0f} s")
    Console().print(table)


if __name__ == "__main__":
    with torch.no_grad():
        main()
