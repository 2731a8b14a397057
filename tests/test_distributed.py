"""Calibration under torchrun: every process goes on with what all of them measured, as one process would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, os, sys, warnings
import torch
sys.path.insert(0, sys.argv[1])
from passing import network, randn
import qcompile
from qcompile.config import OBSERVERS
from qcompile.passes import default_pipeline
from qcompile.passes.correct_bias import CorrectBias
from qcompile.passes.smooth import Smooth

rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
torch.set_num_threads(1)
if count > 1:
    torch.distributed.init_process_group("gloo")
example = randn(2, 3, 10, 10)
batches = [(1 + i % 3) * randn(2 + 2 * (i % 2), 3, 10, 10, seed=i) for i in range(13)]  # 38 samples, in pieces of 2
if sys.argv[3] == "bad" and rank == 1:
    batches[rank][0, 0, 0, 0] = float("nan")
found = {}
for observer in OBSERVERS:
    config = qcompile.QuantConfig(observer)
    try:
        program = qcompile.quantize(
            network(), calibration=batches[rank::count], config=config, example_inputs=example
        ).program
    except qcompile.QcompileError as error:
        found[observer] = str(error)
        break
    x = randn(2, 3, 10, 10, seed=99)
    found[observer] = [float(v) for v in program(x)[0].flatten()]
else:
    default = default_pipeline()
    for name, preset, pipeline in (
        ("smooth", None, default.after("fold_batchnorm", Smooth(samples=7))),
        ("balanced", "balanced", None),
        ("correct_bias", None, default.after("quantize", CorrectBias())),
    ):
        quantized = qcompile.quantize(
            network(),
            calibration=batches[rank::count],
            example_inputs=example,
            config=qcompile.QuantConfig(preset=preset),
            pipeline=pipeline,
        )
        found[name] = [float(v) for v in quantized(x).flatten()]
with open(f"{sys.argv[2]}/{rank}.json", "w") as file:
    json.dump(found, file)
if count > 1:
    torch.distributed.destroy_process_group()  # or its threads may still run when the process ends, which aborts it
"""


def run(folder: Path, count: int, kind: str = "good") -> list[dict[str, object]]:
    """What each of `count` processes found."""
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    command = [sys.executable, *launch, str(script), str(Path(__file__).parent), str(folder), kind]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    (found,) = run(tmp_path_factory.mktemp("alone") / "1", 1)
    return found


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_find_what_one_does(count: int, alone: dict[str, object], tmp_path: Path) -> None:
    assert run(tmp_path / "many", count) == [alone] * count


def test_where_one_process_fails_all_end_with_an_error(tmp_path: Path) -> None:
    own, failed = run(tmp_path / "bad", 2, "bad")
    assert "holds NaN or infinity" in str(failed["minmax"])
    assert "failed in another process" in str(own["minmax"])
