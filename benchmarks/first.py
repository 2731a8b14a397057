"""The process of a cold start: loads one engine and one prepared model, and answers. Imports as little as a user would.

Prints "first" after the first answer, and after a few more calls what `benchmarks.cold` reads.
"""

from __future__ import annotations

import sys

import numpy as np

from benchmarks import loaders

CALLS = 10  # before the memory is read


def main(loader: str, model_path: str, threads: str, input_path: str) -> None:
    run = getattr(loaders, loader)(model_path, int(threads))
    x = np.load(input_path)
    run(x)
    print("first", flush=True)
    for _ in range(CALLS):
        run(x)
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

    from benchmarks.child import answer

    answer({"peak_bytes": peak, "torch": "torch" in sys.modules})
