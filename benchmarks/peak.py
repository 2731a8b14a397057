"""The machine's int8 dot-product peak (see `qcompile.targets.cpu.peak`), measured in a process of its own.

python -m benchmarks.peak THREADS TARGET
"""

from __future__ import annotations

import os
import subprocess
import sys


def dot_product_peak(threads: int, target: str) -> float | None:
    """Multiply-accumulates per second on `threads` threads; None where `target` has no int8 dot product."""
    environment = {**os.environ, "TVM_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "benchmarks.peak", str(threads), target]
    answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return float(answer) if answer.strip() else None


def main(threads: str, target: str) -> None:
    from qcompile import targets
    from qcompile.targets.cpu.peak import peak_rate

    peak = peak_rate(targets.get(target), int(threads))
    print("" if peak is None else peak)


if __name__ == "__main__":
    main(*sys.argv[1:])
