"""prepare_qat(): from a float model to a module that computes as its int8 model will, and can be trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from qcompile.config import QuantConfig
from qcompile.errors import ConfigError, PipelineError
from qcompile.ir import Property
from qcompile.manager import PassManager, check_order
from qcompile.passes import Pipeline
from qcompile.passes.base import Progress
from qcompile.qat import QatModel
from qcompile.quantizer import prepared
from qcompile.targets import Target, get
from qcompile.targets.capability import objection

SCALES = ("learned", "fixed")


def prepare_qat(
    model: nn.Module | ExportedProgram,
    *,
    target: str | Target = "native",
    example_inputs: Any = None,
    calibration: Iterable[Any] | None = None,
    dynamic_shapes: Any = None,
    config: QuantConfig | None = None,
    pipeline: Pipeline | None = None,
    scales: str = "learned",
    progress: Progress | None = None,
) -> QatModel:
    """Quantize `model`, and return it as a module that can be trained.

    Nothing is random: the module begins as what `quantize` makes of the same arguments. Batch norms are folded with
    their statistics, which then stay as they are: the folded weights are trained. Train it with any loss and
    optimizer, then pass it to `qcompile.compile` or `qcompile.quantize`, which need no calibration any more.

    Args:
        model: trained in float, in eval mode; it is not modified. Parameters that do not require gradients stay
            fixed, and so do the scales of what only they compute.
        target: what it will be compiled for: says which operators can be integer.
        example_inputs, calibration, dynamic_shapes, config, progress: as for `qcompile.quantize`. Make the batch
            dynamic to train with batches of several sizes.
        pipeline: the passes up to the qdq stage run now, the others when the module is compiled.
        scales: "learned": of weights and activations, together with the weights; or "fixed", as calibrated.

    Raises:
        CaptureError, CalibrationError, ConfigError, PipelineError, PassError
    """
    if scales not in SCALES:
        raise ConfigError(f"unknown scales {scales!r}", where="scales", remedy=f"use one of {', '.join(SCALES)}")
    if isinstance(config, QuantConfig) and any(
        options.get("activations", "static") != "static" for options in (vars(config), *config.overrides.values())
    ):
        raise ConfigError(
            "a model is trained with static activations only",
            where="config.activations",
            remedy="leave activations out, and give calibration data",
        )
    where = target if isinstance(target, Target) else get(str(target))
    program, context, passes = prepared(
        model, example_inputs, calibration, dynamic_shapes, config, pipeline, objection(where), progress
    )
    last = next(i for i, step in enumerate(passes) if Property.INTEGER in step.establishes)
    if Property.QDQ not in check_order(passes[:last], program.properties):
        raise PipelineError(
            f"the pipeline has no qdq stage: {passes[last].name!r} follows another one",
            where=f"pipeline {', '.join(step.name for step in passes)}",
            remedy="keep 'quantize', or a pass that establishes QDQ in its place",
        )
    with torch.no_grad():
        PassManager(passes[:last]).run(program, context)
    return QatModel(program, context.originals, learned=scales == "learned", config=context.config, rest=passes[last:])
