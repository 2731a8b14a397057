"""The float model that every engine starts from: exported, as ONNX, and with the data it is quantized on.

Calibration crops and held-out crops are different random draws; both come in batches of the
workload's size, so that an engine with static shapes can take them as they are.

    main(MODEL, BATCH, FOLDER)
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch

from benchmarks.child import answer
from benchmarks.engines.base import INPUT, Source
from benchmarks.models import MODELS, multiply_accumulates, samples

CALIBRATION, HELD_OUT = 64, 128


def write_source(model: str, batch: int, folder: Path) -> int:
    """Write all of it to `folder`; returns the multiply-accumulates of one batch."""
    network, source = MODELS[model](), Source(folder)
    calibration = samples(model, CALIBRATION, seed=1).split(batch)
    held_out = samples(model, HELD_OUT, seed=2).split(batch)
    example = calibration[0].clone()
    np.save(folder / "calibration.npy", torch.stack(calibration).numpy())
    np.save(folder / "held_out.npy", torch.stack(held_out).numpy())
    np.save(folder / "input.npy", held_out[0].numpy())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the ONNX exporter announces its successor
        np.save(folder / "expected.npy", torch.cat([network(x) for x in held_out]).numpy())
        torch.export.save(torch.export.export(network, (example,), strict=True), source.exported)
        torch.onnx.export(
            network,
            (example,),
            source.onnx,
            input_names=[INPUT],
            output_names=["y"],
            opset_version=17,
            dynamo=False,
        )
    return multiply_accumulates(network, example)


def main(model: str, batch: str, folder: str) -> None:
    answer({"macs": write_source(model, int(batch), Path(folder))})
