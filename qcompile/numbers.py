"""What numbers a whole model is asked to compute in, and the requests that contradict it."""

from __future__ import annotations

from torch import nn
from torch.export import ExportedProgram

from qcompile.capture import is_quantized
from qcompile.config import QuantConfig
from qcompile.errors import ConfigError
from qcompile.ir import Property
from qcompile.ops.real import NUMERICS
from qcompile.passes import Pipeline, float_pipeline
from qcompile.passes.fuse_float import FuseFloat
from qcompile.qat import QatModel


def refuse_int8(model: nn.Module | ExportedProgram, where: str) -> None:
    """Refuse a choice between int8 and float, called `where`, for a model in which it was made before.

    Raises:
        ConfigError: the model was trained as int8, or quantized elsewhere.
    """
    before = "trained as int8" if isinstance(model, QatModel) else "quantized elsewhere" if is_quantized(model) else ""
    if before:
        raise ConfigError(f"the model was {before}", where=where, remedy="leave it out, or compile the float model")


def chosen_pipeline(
    numerics: str,
    config: QuantConfig | None,
    pipeline: Pipeline | None,
    max_accuracy_drop: float | None,
    strict: bool = False,
) -> Pipeline | None:
    """The pipeline for `numerics`; None for the default one.

    Raises:
        ConfigError: there are no such numerics, or something that is for int8 is given with others.
    """
    if numerics == "int8":
        return pipeline
    if numerics not in NUMERICS:
        raise ConfigError(f"unknown numerics {numerics!r}", where="numerics", remedy=f"use int8, {', '.join(NUMERICS)}")
    if strict:
        raise ConfigError(
            f"strict=True refuses operators in float, and with numerics={numerics!r} all of them are",
            where="strict",
            remedy="leave strict or numerics out",
        )
    for name, value in (("config", config), ("max_accuracy_drop", max_accuracy_drop)):
        if value is not None:
            raise ConfigError(
                f"{name} is given, but with numerics={numerics!r} nothing is quantized",
                where=name,
                remedy=f"leave {name} or numerics out",
            )
    if pipeline is None:
        return float_pipeline(numerics)
    found = {step.numerics for step in pipeline if isinstance(step, FuseFloat)}
    if found != {numerics} or any(Property.QDQ in step.establishes for step in pipeline):
        raise ConfigError(
            f"the pipeline is not one for numerics={numerics!r}",
            where="pipeline",
            remedy=f"start from qcompile.passes.float_pipeline({numerics!r})",
        )
    return pipeline
