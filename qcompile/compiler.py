"""compile(): the whole flow, from a float model to a callable that runs int8 machine code.

capture -> passes -> integer program -> lower -> build -> artifact -> model
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.export import ExportedProgram

from qcompile import metrics, mixed, numbers
from qcompile.artifact import Artifact, CoverageRow, Golden, PassRow, TensorSpec, Variant
from qcompile.checks import InputChecker
from qcompile.choices import Choices
from qcompile.config import QuantConfig
from qcompile.device import lacks
from qcompile.errors import DeviceError, StrictError
from qcompile.executable import OWNER, check_threads
from qcompile.ir import Program, shape_of
from qcompile.manager import PassRecord
from qcompile.metrics import Agreement, Checked, Metric
from qcompile.ops.real import BFLOAT16
from qcompile.passes import Pipeline
from qcompile.passes.base import Progress
from qcompile.profiling import Profile, profile
from qcompile.quantizer import QuantizedModel, Recipe, prepared, run_passes
from qcompile.runtime import Model
from qcompile.sites import COVERS
from qcompile.stages import Stages
from qcompile.targets import Target, get
from qcompile.targets.build import build
from qcompile.targets.capability import objection
from qcompile.targets.tune import best_known
from qcompile.targets.workload import Chosen
from qcompile.tuning import Tuning

FLOAT_TOLERANCE = 1e-3
"""Where operators stayed float, how far a device's outputs may be from the reference's, as a part of
the largest magnitude: float sums may be taken in another order."""

BFLOAT16_TOLERANCE = 2.0**-4
"""The same where they compute in bfloat16: a sum in another order may be rounded to the other of two neighbours, which
are 2^-8 apart, and every layer adds such differences to those before it. Networks of fifty layers came to 2^-6."""

TOLERANCE = {"float": FLOAT_TOLERANCE, BFLOAT16: BFLOAT16_TOLERANCE}  # by the kind of a row of the ledger

LARGE_GOLDEN = 4 << 20
"""Bytes of inputs from which on an artifact has one golden case instead of two."""


class CompiledModel(Model):
    """A compiled model with its integer program: everything that `qcompile.load` gives, and the reference.

    Attributes:
        program: the integer graph.
        recipe: how the program was made of the float model, where that is known.
        choices: the layers that a search left in float, and what it reached; None without one.
    """

    choices: Choices | None = None

    def __init__(
        self,
        artifact: Artifact,
        program: Program,
        target: Target,
        *,
        threads: int | None = None,
        chosen: Chosen | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        self.program, self._built_for, self._chosen, self.recipe = program, target, chosen or {}, recipe
        self._foreign = all(lacks(v.machine, v.features) for v in artifact.variants)
        if self._foreign:  # built for another machine: it can be saved and inspected, not run
            self.artifact, self._variant = artifact, artifact.variants[0]
            self._check = InputChecker(artifact.inputs)
        else:
            super().__init__(artifact, threads=threads)

    def reference(self, *inputs: Any, **named: Any) -> Any:
        """The integer graph in eager PyTorch: called as the model is, gives the same bits, slowly."""
        return self._apply(self._reference, inputs, named)

    def _reference(self, *inputs: np.ndarray) -> list[np.ndarray]:
        # Copies: an array may be read-only, and an output may be an input's own memory.
        outputs = self.program(*[torch.from_numpy(array.copy()) for array in self._check(inputs)])
        return [output.contiguous().numpy() for output in outputs]

    def profile(self, *inputs: Any, seconds: float = 1.0, **named: Any) -> Profile:
        """Time every kernel of a call on `inputs`, for about `seconds` after building once more.

        Returns:
            A `Profile`: prints as a table, and `.plot(path)` draws it.

        Raises:
            InputError: the inputs do not fit. DeviceError: the model was compiled for another machine.
        """
        found: list[Profile] = []

        def run(*arrays: np.ndarray) -> list[np.ndarray]:
            outputs = self.flat(*arrays)  # checks the inputs, and sets the number of threads
            threads = self._threads or int(os.environ["TVM_NUM_THREADS"])
            measure = partial(
                profile, self.program, self._built_for, self._chosen, self._check(arrays), threads, seconds
            )
            found.append(OWNER.run(measure))
            return outputs

        self._apply(run, inputs, named)
        return found[0]

    def flat(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """Flat NumPy inputs to flat NumPy outputs.

        Raises:
            DeviceError: the model was compiled for another machine.
        """
        if self._foreign:
            raise DeviceError(
                f"this model was compiled for {self.target}, which this machine cannot run",
                remedy="save() it and run it on the device, or call .reference(...) here: it gives the same bits",
            )
        return super().flat(*inputs)


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
    check_threads(threads)
    metrics.check(max_accuracy_drop, metric, evaluation, strict)
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
        refuse_float(program)
    chosen = best_known(program, target, tuning, threads, progress)
    steps = iter(range(1, 4))
    built = build(program, target, None if progress is None else lambda step: progress(step, next(steps), 3), chosen)
    variant = Variant(target.name, target.machine, target.features, target.rank, built.library, built.constants)
    coverage = coverage_rows(program, built.kernels)
    artifact = Artifact(
        inputs=input_specs(program),
        outputs=output_specs(program),
        output_structure=program.output_structure,
        variants=(variant,),
        coverage=coverage,
        passes=pass_rows(quantized.passes),
        toolchain={name: version(name) for name in ("qcompile", "torch", "apache-tvm", "apache-tvm-ffi", "numpy")},
        tolerance=max(TOLERANCE.get(row.kind, 0.0) for row in coverage) if coverage else 0.0,
    )
    artifact = artifact._replace(golden=golden_cases(program))
    return CompiledModel(artifact, program, target, threads=threads, chosen=chosen, recipe=quantized.recipe)


def coverage_rows(program: Program, kernels: Mapping[str, str]) -> tuple[CoverageRow, ...]:
    """The ledger, with the kernel that computes each operator (several share one where they are fused)."""
    computes = {
        covered: kernels[n.name] for n in program.graph.nodes for covered in n.meta.get(COVERS, ()) if n.name in kernels
    }
    return tuple(
        CoverageRow(r.op, r.node, r.kind, computes.get(r.node, r.kernel), r.reason, r.where)
        for r in program.ledger.rows
    )


def refuse_float(program: Program) -> None:
    """Raise StrictError when the ledger has a float operator; names the first ones and the reasons."""
    left = [row for row in program.ledger.rows if row.kind == "float"]
    if left:
        shown = "; ".join(f"{row.where or row.node} ({row.op}): {row.reason}" for row in left[:5])
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        raise StrictError(
            f"{len(left)} operators would stay float",
            where=shown + more,
            remedy="replace them, or compile with strict=False: they then run in float32",
        )


def pass_rows(records: Sequence[PassRecord]) -> tuple[PassRow, ...]:
    return tuple(PassRow(r.name, r.changed, r.nodes_before, r.nodes_after) for r in records)


def input_specs(program: Program) -> tuple[TensorSpec, ...]:
    """The flat inputs, with the scale and zero point of those that the network quantizes."""
    pairs = zip(program.inputs, program.placeholders(), strict=True)
    return tuple(
        TensorSpec(spec.name, spec.shape, spec.dtype, *quantization_of(node), spec.path) for spec, node in pairs
    )


def quantization_of(node: fx.Node) -> tuple[float | None, int | None]:
    """(scale, zero point) that the network quantizes an input by, or had an output quantized by; else Nones."""
    if node.target is torch.ops.qcompile.dequantize.default:
        return float(node.args[1]), int(node.args[2])  # type: ignore[arg-type]
    found = {user.args[1:3] for user in node.users if user.target is torch.ops.qcompile.quantize.default}
    if len(found) != 1:
        return None, None
    inverse_scale, zero_point = found.pop()
    return 1.0 / float(inverse_scale), int(zero_point)  # type: ignore[arg-type]


def output_specs(program: Program) -> tuple[TensorSpec, ...]:
    """The flat outputs; a dynamic dimension carries its expression and the bounds of its symbol."""
    bounds = {d[0]: d for spec in program.inputs for d in spec.shape if not isinstance(d, int)}
    symbols = dynamic_symbols(program)

    def dimension(size: Any) -> int | tuple[str, int, int]:
        if isinstance(size, int):
            return size
        name = symbols.get(str(size), str(size))
        return bounds.get(name, (name, 0, 2**31 - 1))

    specs = []
    for i, node in enumerate(program.outputs()):
        dtype = str(node.meta["val"].dtype).removeprefix("torch.")
        shape = tuple(dimension(s) for s in shape_of(node))
        specs.append(TensorSpec(f"output{i}", shape, dtype, *quantization_of(node)))
    return tuple(specs)


def dynamic_symbols(program: Program) -> dict[str, str]:
    """The graph's symbols -> the names that the user gave the dimensions."""
    found = {}
    for spec, node in zip(program.inputs, program.placeholders(), strict=True):
        for dim, size in zip(spec.shape, shape_of(node), strict=True):
            if not isinstance(dim, int):
                found[str(size)] = dim[0]
    return found


def golden_cases(program: Program, seed: int = 0) -> tuple[Golden, ...]:
    """Two inputs with the outputs of the reference, for the self-test: random values over the range the
    network was calibrated for (its input quantization), at the smallest and the largest sensible batch. Of
    large inputs one has to do: they are a part of the file."""
    generator = np.random.default_rng(seed)
    cases = []
    for small in (True, False):
        sizes: dict[str, int] = {}
        inputs = []
        for spec, node in zip(program.inputs, program.placeholders(), strict=True):
            for dim in spec.shape:
                if not isinstance(dim, int):
                    sizes[dim[0]] = dim[1] if small else min(dim[2], dim[1] + 2)
            shape = tuple(d if isinstance(d, int) else sizes[d[0]] for d in spec.shape)
            inputs.append(_golden_input(generator, node, shape, spec.dtype))
        outputs = program(*[torch.from_numpy(x) for x in inputs])
        cases.append(Golden(tuple(inputs), tuple(y.contiguous().numpy() for y in outputs)))
        if sum(x.nbytes for x in inputs) > LARGE_GOLDEN:
            break
    return tuple(cases)


def _golden_input(generator: np.random.Generator, node: Any, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    if dtype == "bool":
        return generator.integers(0, 2, shape).astype(dtype)
    if not dtype.startswith("float"):
        return generator.integers(0, 2, shape).astype(dtype)  # indices: small enough for any table
    scale, zero_point = quantization_of(node)
    if scale is None or zero_point is None:
        return generator.standard_normal(shape).astype(dtype)
    low, high = (scale * (q - zero_point) for q in (-132, 131))  # a little beyond: clamping is tested too
    return generator.uniform(low, high, shape).astype(dtype)
