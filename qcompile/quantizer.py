"""quantize(): the half of compile() that no target is needed for. Float model in, integer program out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from qcompile.batches import Batches
from qcompile.capture import capture
from qcompile.config import QuantConfig
from qcompile.distributed import processes
from qcompile.errors import CalibrationError, ConfigError, PipelineError, TargetError
from qcompile.inputs import arrange, check_first_batch, is_empty, unflatten, warn_of_surplus
from qcompile.ir import LedgerRow, Program, Property, Stage, source
from qcompile.manager import Dump, PassManager, PassRecord, check_order
from qcompile.passes import Context, Pipeline, default_pipeline, qdq_pipeline
from qcompile.passes.base import Objection, Pass, Progress
from qcompile.qat import QatModel
from qcompile.qdq import is_dequantize, is_quantize, lift_weights
from qcompile.sites import place, read


@dataclass(frozen=True)
class Recipe:
    """How a program was made of its model: enough to make the float graph once more, node for node.

    Attributes as the arguments of `quantize`, and `maxima` as of its `Context`.
    """

    passes: tuple[Pass, ...]
    config: QuantConfig
    dynamic_shapes: Any = None
    objection: Objection | None = None
    rewrite_limit: int | None = None
    maxima: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class QuantizedModel:
    """An integer program. Calling it runs the integer reference in eager PyTorch.

    Attributes:
        program: the integer graph, its inputs and its ledger.
        passes: what each pass did.
        recipe: how the program was made of a float model; None of a trained one, or one that was quantized elsewhere.
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
            InputError: an input is missing, is no tensor, or is none of the model's.
        """
        return call(self.program, self.program, args, kwargs)


def call(program: Program, run: Callable[..., Sequence[Tensor]], args: Any, kwargs: Any) -> Any:
    """`run`, which takes and returns the flat tensors of `program`, on inputs as the model takes them.

    Raises:
        InputError: an input is missing, is no tensor, or is none of the model's.
    """
    flat = arrange(args, kwargs, program.inputs)
    return unflatten(program.output_structure, run(*flat))


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
        model: in eval mode; it is not modified. Of a module from `qcompile.prepare_qat` the trained values are taken;
            it needs no calibration, and brings its configuration and pipeline. One that is quantized already takes
            no calibration either: its scales are given (an ExportedProgram has its `example_inputs`).
        example_inputs: a tensor, a tuple or a dict (keyword inputs). Without them, the first batch
            of `calibration` is used.
        calibration: an iterable of inputs, each as `example_inputs`; read once, batch by batch. A
            batch may be a multiple of a static batch size. What it holds beyond the inputs (labels) is left out, with
            a warning; an input that the model can do without is given by name, or in `example_inputs`.
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
        CaptureError, CalibrationError, ConfigError, PipelineError, PassError, QuantizationError, TargetError
    """
    program, context, passes = prepared(
        model, example_inputs, calibration, dynamic_shapes, config, pipeline, objection, progress
    )
    context.rewrite_limit = rewrite_limit
    return run_passes(program, context, passes, dump, dynamic_shapes)


def run_passes(
    program: Program,
    context: Context,
    passes: tuple[Pass, ...],
    dump: str | Path | Dump | None = None,
    dynamic_shapes: Any = None,
) -> QuantizedModel:
    """What becomes of a `prepared` program."""
    recipe = None
    if program.stage is Stage.FLOAT:
        recipe = Recipe(
            passes, context.config, dynamic_shapes, context.objection, context.rewrite_limit, context.maxima
        )
    with torch.no_grad():
        records = PassManager(passes, dump).run(program, context)
    return QuantizedModel(program, records, recipe)


def prepared(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    calibration: Iterable[Any] | None,
    dynamic_shapes: Any,
    config: QuantConfig | None,
    pipeline: Pipeline | None,
    objection: Objection | None,
    progress: Progress | None,
) -> tuple[Program, Context, tuple[Pass, ...]]:
    """The captured program, and the passes with their context, all checked; arguments as of `quantize`."""
    if isinstance(model, QatModel):
        _refuse_twice(
            example_inputs=example_inputs,
            calibration=calibration,
            dynamic_shapes=dynamic_shapes,
            config=config,
            pipeline=pipeline,
        )
        program = model.freeze()
        _check_capability(program, objection)
        check_end(model.rest, program)
        return program, Context(model.config, progress=progress, objection=objection), model.rest
    config = QuantConfig() if config is None else config
    if not isinstance(config, QuantConfig):
        raise ConfigError(f"the config is a {type(config).__name__}", remedy="pass config=qcompile.QuantConfig(...)")
    _check_measured(config)
    has_example = not is_empty(example_inputs) or isinstance(model, ExportedProgram)
    if calibration is None and not has_example and (pipeline is None or _calibrates(pipeline)):
        raise _no_calibration()
    batches = None if calibration is None else Batches(calibration)
    if batches is not None and not has_example:
        with processes().succeed("reading the first batch"):
            example_inputs = batches.first()
        if isinstance(model, nn.Module):
            check_first_batch(model, example_inputs)
    program = capture(model, example_inputs, dynamic_shapes)
    if not is_empty(example_inputs) and isinstance(model, nn.Module):
        warn_of_surplus(example_inputs, program.inputs)
    given = Property.GIVEN_QDQ in program.properties
    if given:
        _check_given(config, batches)
    if pipeline is None:
        pipeline = qdq_pipeline() if given else default_pipeline(config)
    passes = tuple(pipeline)
    check_end(passes, program)
    if batches is None and config.activations == "static" and _calibrates(passes):
        raise _no_calibration()
    return program, Context(config, batches, progress, objection=objection), passes


def _check_measured(config: QuantConfig) -> None:
    """Refuse what says how to measure activations where no layer has a scale that is measured."""
    each = [config.activations, *(options.get("activations") for options in config.overrides.values())]
    if "static" in each:
        return
    said = {"preset": config.preset, "observer": config.observer if config.observer != "minmax" else None}
    for name, value in said.items():
        if value is not None:
            raise ConfigError(
                f"{name} is {value!r}, and no layer has activations='static'",
                where=name,
                remedy=f"leave {name} out, or give some layers static activations (overrides)",
            )


def _calibrates(pipeline: Iterable[Pass]) -> bool:
    return any(Property.CALIBRATED in step.establishes for step in pipeline if isinstance(step, Pass))


def check_end(passes: tuple[Pass, ...], program: Program) -> None:
    """Refuse a pipeline that does not make an integer program.

    Raises:
        PipelineError
    """
    if Property.INTEGER not in check_order(passes, program.properties):
        raise PipelineError(
            "the pipeline does not end in an integer program",
            where=f"pipeline {', '.join(step.name for step in passes) or 'without passes'}",
            remedy="start from qcompile.passes.default_pipeline(), and keep 'fuse_requantize' or a pass in its place",
        )


def _refuse_twice(**given: Any) -> None:
    """A trained module was quantized when it was prepared: nothing is left to choose."""
    for name, value in given.items():
        if value is not None:
            raise ConfigError(
                "the model was quantized before it was trained", where=name, remedy=f"give {name} to prepare_qat"
            )


def _check_capability(program: Program, objection: Objection | None) -> None:
    """Refuse a trained module in which something is integer that the target cannot compute as such.

    Raises:
        TargetError: names the layer.
    """
    if objection is None:
        return
    trial = replace(program, graph_module=deepcopy(program.graph_module))
    lift_weights(trial)
    for group in read(trial.graph, is_dequantize, is_quantize):
        reason = objection(group.row, group.root)
        if reason:
            raise TargetError(
                f"the model was trained with an integer {group.row.name}: {reason}",
                where=place(group.root),
                source=source(group.root),
                remedy="pass the same target to prepare_qat and to compile",
            )


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
