"""This project's x86-avx2 code beside ONNX Runtime, held to AVX2 as well, at batch 1.

    python -m benchmarks.avx2 [options of benchmarks.run]

A machine with AVX512-VNNI runs both as a machine without it would; `benchmarks.restrict` says how.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks import run
from benchmarks.engines import AVX2

MODELS = ("resnet50", "mobilenetv2", "resnet18", "efficientnet_lite0")

if __name__ == "__main__":
    run.main(__doc__, AVX2, "x86-avx2", Path("benchmarks/avx2.json"), MODELS, (1,))
