"""quantize(): the half of compile() that no target is needed for. Float model in, integer program out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from qcompile.capture import capture
from qcompile.config import QuantConfig
from qcompile.errors import CalibrationError, InputError
from qcompile.inputs import flatten, is_empty, unflatten
from qcompile.ir import LedgerRow, Program
from qcompile.manager import Dump, PassManager, PassRecord
from qcompile.passes import Context, Pipeline, default_pipeline
from qcompile.passes.base import Objection, Progress


@dataclass
class QuantizedModel:
    """An integer program. Calling it runs the integer reference in eager PyTorch.

    Attributes:
        program: the integer graph, its inputs and its ledger.
        passes: what each pass did.
    """

    program: Program
    passes: list[PassRecord]

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
    """Quantize `model`.

    Args:
        model: in eval mode; it is not modified.
        example_inputs: a tensor, a tuple or a dict (keyword inputs). Without them, the first batch
            of `calibration` is used.
        calibration: an iterable of inputs, each as `example_inputs`; read once, batch by batch. A
            batch may hold more than the model takes (labels), and may be a multiple of a static batch size.
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
    config = config or QuantConfig()
    if calibration is None:
        raise CalibrationError(
            "no calibration data",
            remedy="pass calibration=an iterable of typical inputs, for example a list of 32 preprocessed images",
        )
    if is_empty(example_inputs) and not isinstance(model, ExportedProgram):
        calibration, example_inputs = _peek(calibration)
    program = capture(model, example_inputs, dynamic_shapes)
    context = Context(config, calibration, progress, rewrite_limit, objection)
    manager = PassManager(tuple(pipeline if pipeline is not None else default_pipeline(config)), dump)
    with torch.no_grad():
        records = manager.run(program, context)
    return QuantizedModel(program, records)


class _Again:
    """An iterable whose first item was taken, with it in front again. Keeps its length, if it has one."""

    def __init__(self, first: Any, rest: Iterator[Any]) -> None:
        self.first, self.rest = first, rest

    def __iter__(self) -> Iterator[Any]:
        yield self.first
        yield from self.rest


class _Sized(_Again):
    def __init__(self, first: Any, rest: Iterator[Any], length: int) -> None:
        super().__init__(first, rest)
        self.length = length

    def __len__(self) -> int:
        return self.length


def _peek(calibration: Iterable[Any]) -> tuple[Iterable[Any], Any]:
    """The calibration data still whole, and its first batch."""
    batches = iter(calibration)
    try:
        first = next(batches)
    except StopIteration:
        raise CalibrationError(
            "the calibration data is empty",
            remedy="pass at least one batch; a generator that was read before is empty, so make a new one",
        ) from None
    if isinstance(calibration, Sized):
        return _Sized(first, batches, len(calibration)), first
    return _Again(first, batches), first
