"""compile(): the whole flow, from a float model to a callable that runs int8 machine code.

capture -> passes -> integer program -> lower -> build -> artifact -> model
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from qcompile import metrics, mixed, numbers
from qcompile.artifact import Artifact, PassRow
from qcompile.compiled import CompiledModel
from qcompile.config import QuantConfig
from qcompile.coverage import coverage_rows, refuse_float
from qcompile.device import lacks
from qcompile.executable import check_threads, pool_size
from qcompile.golden import golden_cases, tolerance
from qcompile.metrics import Agreement, Checked, Metric
from qcompile.ops.real import BFLOAT16
from qcompile.passes import Pipeline
from qcompile.passes.base import Progress
from qcompile.quantizer import QuantizedModel, prepared, run_passes
from qcompile.specs import input_specs, output_specs
from qcompile.stages import Stages
from qcompile.targets import Target, get, requests, tune
from qcompile.targets.build import build, tools
from qcompile.targets.capability import objection
from qcompile.targets.nvidia import Gpu
from qcompile.tuning import Tuning


def compile(
    model: nn.Module | ExportedProgram,
    target: str | Target = "native",
    *,
    example_inputs: Any = None,
    calibration: Iterable[Any] | None = None,
    dynamic_shapes: Any = None,
    config: QuantConfig | None = None,
    pipeline: Pipeline | None = None,
    tuning: Tuning | str | Path | None = None,
    strict: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    max_accuracy_drop: float | None = None,
    metric: Metric | None = None,
    evaluation: Iterable[Any] | None = None,
    numerics: str = "int8",
) -> CompiledModel:
    """Compile a float model to int8 machine code.

    Args:
        model: an nn.Module in eval mode, an fx.GraphModule or an ExportedProgram; it is not modified.
        target: a name from `qcompile.targets.names()`, or a Target. "native": the machine this runs on.
        example_inputs: a tensor, a tuple or a dict (keyword inputs); default: the first calibration batch.
        calibration: an iterable of such inputs (a DataLoader works), read once, batch by batch. Not needed, with
            `example_inputs`, where the config gives no layer static activations.
        dynamic_shapes: as torch.export takes it, for example ``({0: torch.export.Dim("batch", max=64)},)``.
        config: how to quantize.
        pipeline: the passes, for example ``default_pipeline().after("canonicalize", MyPass())``.
        tuning: a path: measure the kernels that the tuning database there does not know yet, and use the
            fastest of each; or a `Tuning`. Without it, analytic defaults and what ships with the package.
        strict: refuse a model in which an operator would stay float.
        threads: how many a call uses; default: all cores.
        progress: called with (step, done, total or None) during long work.
        max_accuracy_drop: leave layers in float until the metric is at most so much lower than the float model's;
            `compiled.choices` lists them. It may not be reached: then there is an `AccuracyWarning`.
        metric: called with a function that stands for the model; returns a number, the larger the better. Default:
            how often the top label is the float model's, on `evaluation`.
        evaluation: an iterable of inputs that calibration does not use, for the default metric.
        numerics: of the whole model: "int8", or without quantization "bfloat16" (factors and results of convolutions
            and linear layers are rounded to it, sums are float32) or "float32"; these need no calibration.

    Returns:
        A callable: torch tensors in and out, or NumPy arrays in and out.

    Raises:
        QcompileError: every mistake has its subclass, see `qcompile.errors`.
    """
    where = target if isinstance(target, Target) else get(str(target), numerics == BFLOAT16)
    requests.check(where, threads=threads, numerics=numerics, max_accuracy_drop=max_accuracy_drop)
    check_threads(threads, None if lacks(where.machine, where.features) else pool_size())
    metrics.check(max_accuracy_drop, metric, evaluation, strict)
    tools(where)  # what is missing is found before any work too
    tune.check(where, tuning, threads)
    if max_accuracy_drop is not None or numerics != "int8":
        numbers.refuse_int8(model, "numerics" if max_accuracy_drop is None else "max_accuracy_drop")
    pipeline = numbers.chosen_pipeline(numerics, config, pipeline, max_accuracy_drop, strict)
    start = prepared(model, example_inputs, calibration, dynamic_shapes, config, pipeline, objection(where), progress)
    finish = partial(compile_program, target=where, tuning=tuning, strict=strict, threads=threads)
    if max_accuracy_drop is None:
        return finish(run_passes(*start, dynamic_shapes=dynamic_shapes), progress=progress)
    held_to = Checked(metric if metric is not None else Agreement(evaluation, start[0]))
    compiled, choices = mixed.search(
        Stages(*start, dynamic_shapes), held_to, max_accuracy_drop, where, finish, progress
    )
    compiled.choices = choices
    return compiled


def compile_program(
    quantized: QuantizedModel,
    target: Target,
    *,
    tuning: Tuning | str | Path | None = None,
    strict: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> CompiledModel:
    """The second half of `compile`: an integer program to machine code. Arguments as there."""
    program = quantized.program
    if strict:
        refuse_float(program, runs=not isinstance(target.isa, Gpu))
    chosen = tune.best_known(program, target, tuning, threads, progress)
    steps = iter(range(1, 4))
    with ThreadPoolExecutor(1) as beside:  # the reference runs while TVM compiles, mostly on one core
        golden = beside.submit(golden_cases, program)
        built = build(program, target, progress and (lambda step: progress(step, next(steps), 3)), chosen)
    coverage = coverage_rows(program, built.kernels)
    artifact = Artifact(
        inputs=input_specs(program),
        outputs=output_specs(program),
        output_structure=program.output_structure,
        variants=(built.variant(target),),
        coverage=coverage,
        passes=tuple(PassRow(r.name, r.changed, r.nodes_before, r.nodes_after) for r in quantized.passes),
        toolchain={name: version(name) for name in ("qcompile", "torch", "apache-tvm", "apache-tvm-ffi", "numpy")},
        tolerance=tolerance(coverage),
        golden=golden.result(),
    )
    return CompiledModel(artifact, program, target, threads=threads, chosen=chosen, recipe=quantized.recipe)
