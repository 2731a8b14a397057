"""quantize(): the half of compile() that no target is needed for. Float model in, integer program out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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
from qcompile.passes import Context, Pipeline, default_pipeline
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
        return call(self.program, self.program, args, kwargs)


def call(program: Program, run: Callable[..., Sequence[Tensor]], args: Any, kwargs: Any) -> Any:
    """`run`, which takes and returns the flat tensors of `program`, on inputs as the model takes them.

    Raises:
        InputError: an input is missing or is no tensor.
    """
    names = [spec.name for spec in program.inputs]
    positional = flatten(args, names[: len(names) - len(kwargs)]) if args or not kwargs else []
    rest = flatten(kwargs, names[len(positional or []) :]) if kwargs else []
    flat = None if positional is None or rest is None else [*positional, *rest]
    if flat is None or len(flat) != len(names) or not all(isinstance(v, Tensor) for v in flat):
        raise InputError(f"the model takes {len(names)} tensors: {', '.join(names)}", remedy="pass them all")
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
    """Quantize `model`.

    Args:
        model: in eval mode; it is not modified.
        example_inputs: a tensor, a tuple or a dict (keyword inputs). Without them, the first batch
            of `calibration` is used.
        calibration: an iterable of inputs, each as `example_inputs`; read once, batch by batch. A
            batch may hold more than the model takes (labels), and may be a multiple of a static batch size.
            Not needed, with `example_inputs`, where the config gives no layer static activations.
        dynamic_shapes: as torch.export takes it.
        config: how to quantize.
        pipeline: the passes; `qcompile.passes.default_pipeline()` to start from.
        objection: a target's capability: what it cannot do stays float.
        progress: called after each calibration batch.
        dump: where the graph after each pass goes: a folder or a callable.
        rewrite_limit: run only the first so many rewrites, to bisect a wrong one.

    Raises:
        CaptureError, CalibrationError, ConfigError, PipelineError, PassError, QuantizationError
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
    with torch.no_grad():
        records = PassManager(passes, dump).run(program, context)
    recipe = Recipe(passes, context.config, dynamic_shapes, context.objection, context.rewrite_limit)
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
    config = QuantConfig() if config is None else config
    if not isinstance(config, QuantConfig):
        raise ConfigError(f"the config is a {type(config).__name__}", remedy="pass config=qcompile.QuantConfig(...)")
    has_example = not is_empty(example_inputs) or isinstance(model, ExportedProgram)
    passes = tuple(pipeline if pipeline is not None else default_pipeline(config))
    calibrates = any(Property.CALIBRATED in step.establishes for step in passes if isinstance(step, Pass))
    if calibration is None and calibrates and (config.activations == "static" or not has_example):
        raise CalibrationError(
            "no calibration data",
            remedy="pass calibration=an iterable of typical inputs, for example a list of 32 preprocessed images",
        )
    batches = None if calibration is None else Batches(calibration)
    if batches is not None and not has_example:
        example_inputs = batches.first()
    program = capture(model, example_inputs, dynamic_shapes)
    context = Context(config, batches, progress, objection=objection)
    if Property.INTEGER not in check_order(passes, program.properties):
        raise PipelineError(
            "the pipeline does not end in an integer program",
            where=f"pipeline {', '.join(step.name for step in passes) or 'without passes'}",
            remedy="start from qcompile.passes.default_pipeline(), and keep 'fuse_requantize' or a pass in its place",
        )
    return program, context, passes
