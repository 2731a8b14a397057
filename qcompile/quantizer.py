"""quantize(): the half of compile() that no target is needed for. Float model in, integer program out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from qcompile.batches import Batches
from qcompile.capture import capture
from qcompile.config import QuantConfig
from qcompile.errors import CalibrationError, ConfigError, InputError, PipelineError
from qcompile.inputs import flatten, is_empty, unflatten
from qcompile.ir import LedgerRow, Program, Property
from qcompile.manager import Dump, PassManager, PassRecord, check_order
from qcompile.passes import Context, Pipeline, default_pipeline, qdq_pipeline
from qcompile.passes.base import Objection, Pass, Progress


@dataclass(frozen=True)
class Recipe:
    """How a program was made of its model: enough to make the float graph once more, node for node.

    Attributes as the arguments of `quantize`.
    """

    passes: tuple[Pass, ...]
    config: QuantConfig
    dynamic_shapes: Any = None
    objection: Objection | None = None
    rewrite_limit: int | None = None


@dataclass
class QuantizedModel:
    """An integer program. Calling it runs the integer reference in eager PyTorch.

    Attributes:
        program: the integer graph, its inputs and its ledger.
        passes: what each pass did.
        recipe: how the program was made; None where it came from elsewhere.
    """

    program: Program
    passes: list[PassRecord]
    recipe: Recipe | None = None

    @property
    def coverage(self) -> list[LedgerRow]:
        """What became of each operator."""
        return self.program.ledger.rows

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs for positional or keyword inputs, nested as the model nests them.

        Raises:
            InputError: an input is missing or is no tensor.
        """
        names = [spec.name for spec in self.program.inputs]
        positional = flatten(args, names[: len(names) - len(kwargs)]) if args or not kwargs else []
        rest = flatten(kwargs, names[len(positional or []) :]) if kwargs else []
        flat = None if positional is None or rest is None else [*positional, *rest]
        if flat is None or len(flat) != len(names) or not all(isinstance(v, Tensor) for v in flat):
            raise InputError(f"the model takes {len(names)} tensors: {', '.join(names)}", remedy="pass them all")
        return unflatten(self.program.output_structure, self.program(*flat))


def quantize(
    model: nn.Module | ExportedProgram,
    *,
    example_inputs: Any = None,
    calibration: Iterable[Any] | None = None,
    dynamic_shapes: Any = None,
    config: QuantConfig | None = None,
    pipeline: Pipeline | None = None,
    objection: Objection | None = None,
    progress: Progress | None = None,
    dump: str | Path | Dump | None = None,
    rewrite_limit: int | None = None,
) -> QuantizedModel:
    """Quantize `model`, or take a quantized one (torchao's PT2E flow) as it is.

    Args:
        model: in eval mode; it is not modified. A quantized one needs `example_inputs` (an ExportedProgram has them)
            and takes no calibration: its scales are given.
        example_inputs: a tensor, a tuple or a dict (keyword inputs). Without them, the first batch
            of `calibration` is used.
        calibration: an iterable of inputs, each as `example_inputs`; read once, batch by batch. A
            batch may hold more than the model takes (labels), and may be a multiple of a static batch size.
            Not needed, with `example_inputs`, where the config gives no layer static activations.
        dynamic_shapes: as torch.export takes it.
        config: how to quantize.
        pipeline: the passes; `qcompile.passes.default_pipeline()` to start from, or `qdq_pipeline()` for a
            quantized model.
        objection: a target's capability: what it cannot do stays float.
        progress: called after each calibration batch.
        dump: where the graph after each pass goes: a folder or a callable.
        rewrite_limit: run only the first so many rewrites, to bisect a wrong one.

    Raises:
        CaptureError, CalibrationError, ConfigError, PipelineError, PassError, QuantizationError
    """
    config = QuantConfig() if config is None else config
    if not isinstance(config, QuantConfig):
        raise ConfigError(f"the config is a {type(config).__name__}", remedy="pass config=qcompile.QuantConfig(...)")
    has_example = not is_empty(example_inputs) or isinstance(model, ExportedProgram)
    if calibration is None and not has_example:
        raise _no_calibration()
    batches = None if calibration is None else Batches(calibration)
    if batches is not None and not has_example:
        example_inputs = batches.first()
    program = capture(model, example_inputs, dynamic_shapes)
    given = Property.GIVEN_QDQ in program.properties
    if given:
        _check_given(config, batches)
    elif batches is None and config.activations == "static":
        raise _no_calibration()
    if pipeline is None:
        pipeline = qdq_pipeline() if given else default_pipeline(config)
    context = Context(config, batches, progress, rewrite_limit, objection)
    manager = PassManager(tuple(pipeline), dump)
    if Property.INTEGER not in check_order(manager.passes, program.properties):
        raise PipelineError(
            "the pipeline does not end in an integer program",
            where=f"pipeline {', '.join(step.name for step in manager.passes) or 'without passes'}",
            remedy="start from qcompile.passes.default_pipeline(), and keep 'fuse_requantize' or a pass in its place",
        )
    with torch.no_grad():
        records = manager.run(program, context)
    return QuantizedModel(program, records, Recipe(manager.passes, config, dynamic_shapes, objection, rewrite_limit))


def _no_calibration() -> CalibrationError:
    return CalibrationError(
        "no calibration data",
        remedy="pass calibration=an iterable of typical inputs, for example a list of 32 preprocessed images "
        "(for a model that is already quantized: example_inputs)",
    )


def _check_given(config: QuantConfig, batches: Batches | None) -> None:
    """Refuse what would have no effect on a model that is already quantized."""
    if batches is not None:
        raise CalibrationError(
            "the model is already quantized: there is nothing to calibrate",
            remedy="leave calibration out and pass example_inputs, or pass the float model",
        )
    if replace(config, exclude=()) != QuantConfig():
        raise ConfigError(
            "the model is already quantized: preset, observer, overrides and weight_bits have no effect",
            where="config",
            remedy="leave them out (exclude still keeps layers float), or pass the float model",
        )
