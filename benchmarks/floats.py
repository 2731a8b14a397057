"""This project without quantization, in float32 and bfloat16, beside engines in the same numerics, at batch 1.

python -m benchmarks.floats [options of benchmarks.run]
"""

from __future__ import annotations

from pathlib import Path

from benchmarks import run
from benchmarks.engines import FLOATS

MODELS = ("resnet50", "mobilenetv2")

if __name__ == "__main__":
    run.main(__doc__, FLOATS, "native", Path("benchmarks/floats.json"), MODELS, (1,))
