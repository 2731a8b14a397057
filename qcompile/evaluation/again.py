"""The layers of a model that was loaded from a file: quantize its float model once more, and prove that it is the same.

A .qcm file holds machine code and no layers. But quantization is deterministic, so that the same model, calibration
data and configuration give the same integer program; and the file holds golden vectors, inputs with the exact
outputs that this program gives. A program that answers them with the same bits is taken for the one in the file.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.export import ExportedProgram

from qcompile.compiled import CompiledModel
from qcompile.config import QuantConfig
from qcompile.errors import InputError
from qcompile.passes.base import Progress
from qcompile.quantizer import quantize
from qcompile.runtime import Model, differences
from qcompile.targets import get
from qcompile.targets.capability import objection


def with_layers(
    loaded: Model,
    model: ExportedProgram,
    calibration: Iterable[Any] | None,
    *,
    config: QuantConfig | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> CompiledModel:
    """`loaded` with the integer program that its machine code was built from. Arguments as it was compiled with.

    Raises:
        InputError: another program comes out, which does not answer the golden vectors.
    """
    target = get(loaded.target)
    quantized = quantize(model, calibration=calibration, config=config, objection=objection(target), progress=progress)
    artifact = loaded.artifact
    ours, theirs = ({(row.op, row.node, row.kind) for row in rows} for rows in (quantized.coverage, artifact.coverage))
    if ours != theirs:  # golden vectors alone do not tell, where floats give them a tolerance
        raise InputError(
            "this model, calibration data and configuration do not give the network of the compiled file",
            where=", ".join(f"{node} is {kind}" for _, node, kind in sorted(theirs - ours)[:3]) or None,
            remedy="give what the file was compiled from and with; leave the calibration data out to evaluate without "
            "layers, or evaluate in Python what qcompile.compile returned",
        )
    for case in artifact.golden:
        outputs = quantized.program(*[torch.from_numpy(array.copy()) for array in case.inputs])
        pairs = zip(outputs, case.outputs, strict=False)
        wrong = sum(differences(got.contiguous().numpy(), want, artifact.tolerance) for got, want in pairs)
        if wrong or len(outputs) != len(case.outputs):
            raise InputError(
                "this model, calibration data and configuration do not give the network of the compiled file, "
                "so its layers would be those of another one",
                where=f"{wrong} elements of the golden outputs differ",
                remedy="give what the file was compiled from and with, or compile it anew; "
                "leave the calibration data out to evaluate without layers",
            )
    return CompiledModel(artifact, quantized.program, target, threads=threads, recipe=quantized.recipe)
