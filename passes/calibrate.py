"""Run the calibration data through the observed graph: read once, batch by batch, in constant memory.

Where the script has initialised torch.distributed, each process feeds its own data and all go on with what all
of them measured (see `qcompile.distributed`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from operator import length_hint
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from qcompile.batches import empty
from qcompile.distributed import processes
from qcompile.errors import CalibrationError, CalibrationWarning
from qcompile.inputs import count_samples, flatten, warn_of_surplus
from qcompile.ir import InputSpec, Program, Property
from qcompile.observers import Observer
from qcompile.passes.base import Context, Pass

FEW_SAMPLES = 16  # below this a range is a matter of chance
_REMEDY_DATA = "each batch must look like the example inputs: the same inputs, shapes and types"


@dataclass(frozen=True)
class Calibrate(Pass):
    """Feeds every batch of the context's calibration data; none is needed where nothing is observed.

    A batch whose first dimension is a multiple of a static batch size is fed in pieces.

    Raises:
        CalibrationError: there is no batch, or one is of the wrong count, shape or type, or holds
            NaN or infinity; names the batch and the input. Or another process failed.

    Warns:
        CalibrationWarning: there were fewer than 16 samples, or a batch holds more than the inputs.
    """

    name: ClassVar[str] = "calibrate"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.OBSERVED})
    establishes: ClassVar[frozenset[Property]] = frozenset({Property.CALIBRATED})

    def run(self, program: Program, context: Context) -> bool:
        if not any(isinstance(module, Observer) for module in program.graph_module.modules()):
            return False  # nothing is measured: no layer has static activations
        if context.calibration is None:
            raise CalibrationError("no calibration data", remedy="pass calibration=an iterable of inputs")
        length = length_hint(context.calibration, -1)
        total = length if length >= 0 else None
        together = processes()
        observers = [module for module in program.graph_module.modules() if isinstance(module, Observer)]
        kept: list[list[list[Tensor]]] = []
        with together.succeed("calibration"):
            samples = self._feed(program, context, observers, kept, total)
        for observer in observers:
            observer.merge(together)
        if context.config.kept_samples:
            pieces = [inputs for batch in together.in_turn(kept) for inputs in batch]
            context.samples = _first(program.inputs, pieces, context.config.kept_samples)
        count = int(together.sum(torch.tensor(samples, dtype=torch.float64)))
        if count < FEW_SAMPLES:
            warnings.warn(
                f"calibrated on {count} sample{'' if count == 1 else 's'}: the ranges of activations depend on which; "
                "give some hundred typical ones",
                CalibrationWarning,
                stacklevel=2,
            )
        return False

    def _feed(
        self,
        program: Program,
        context: Context,
        observers: list[Observer],
        kept: list[list[list[Tensor]]],
        total: int | None,
    ) -> int:
        """Run all batches; returns how many samples they held. The pieces of the first batches are `kept`."""
        done = samples = 0
        for index, batch in enumerate(context.calibration or ()):
            pieces = list(check_batch(program.inputs, batch, f"calibration batch {index}"))
            if samples < context.config.kept_samples:  # copies: the memory may be the next batch's too
                kept.append([[x.clone() for x in inputs] for inputs in pieces])
            for number, inputs in enumerate(pieces):
                for observer in observers:
                    observer.continues = number > 0
                program(*inputs)
                samples += count_samples(inputs)
            done = index + 1
            context.report("calibrate", done, total)
        if done == 0:
            raise empty()
        return samples


def _first(specs: tuple[InputSpec, ...], pieces: list[list[Tensor]], most: int) -> list[list[Tensor]]:
    """The first `most` samples; a few more where the batch is static and must not be cut."""
    first: list[list[Tensor]] = []
    batch, *others = {spec.shape[0] if spec.shape else 1 for spec in specs}
    smallest = batch[1] if not others and isinstance(batch, tuple) else math.inf
    for inputs in pieces:
        size = count_samples(inputs)
        if most <= 0:
            break
        cut = smallest <= most < size
        first.append([x[:most].clone() for x in inputs] if cut else inputs)
        most -= size
    return first


def check_batch(specs: tuple[InputSpec, ...], batch: Any, place: str) -> Iterator[list[Tensor]]:
    """The inputs that `batch` holds, checked against `specs`: once, or in pieces of the static batch size. `place` is
    how errors call it."""
    values = flatten(batch, specs)
    warn_of_surplus(batch, specs)
    if values is None:
        wanted = ", ".join(spec.name for spec in specs)
        raise CalibrationError(
            f"the batch does not hold the {len(specs)} inputs of the model ({wanted})", where=place, remedy=_REMEDY_DATA
        )
    tensors = [_tensor(spec, value, place) for spec, value in zip(specs, values, strict=True)]
    pieces = _pieces(specs, tensors)
    for spec, tensor in zip(specs, tensors, strict=True):
        _check_shape(spec, tensor, pieces, place)
        if tensor.numel() == 0:
            raise CalibrationError(f"the input {spec.name!r} is empty", where=place, remedy=_REMEDY_DATA)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CalibrationError(
                f"the input {spec.name!r} holds NaN or infinity",
                where=place,
                remedy="look for missing values or a division by zero in the preprocessing",
            )
    yield from (list(piece) for piece in zip(*(t.chunk(pieces) if pieces > 1 else (t,) for t in tensors), strict=True))


def _tensor(spec: InputSpec, value: Any, place: str) -> Tensor:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if not isinstance(value, Tensor) or str(value.dtype) != f"torch.{spec.dtype}":
        got = str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else type(value).__name__
        raise CalibrationError(
            f"the input {spec.name!r} is {got}, not {spec.dtype}", where=place, remedy=f"convert it to {spec.dtype}"
        )
    return value.detach().to("cpu")


def _pieces(specs: tuple[InputSpec, ...], tensors: list[Tensor]) -> int:
    """Into how many equal pieces to cut the batch so that each has the static batch size; else 1."""
    factors = set()
    for spec, tensor in zip(specs, tensors, strict=True):
        batch = spec.shape[0] if spec.shape else None
        if not isinstance(batch, int) or batch < 1 or tensor.dim() == 0 or tensor.shape[0] % batch:
            return 1
        factors.add(tensor.shape[0] // batch)
    return max(factors.pop(), 1) if len(factors) == 1 else 1


def _check_shape(spec: InputSpec, tensor: Tensor, pieces: int, place: str) -> None:
    shape = list(tensor.shape)
    if shape and pieces > 1:
        shape[0] //= pieces
    fits = len(shape) == len(spec.shape) and all(
        size == want if isinstance(want, int) else want[1] <= size <= want[2]
        for size, want in zip(shape, spec.shape, strict=True)
    )
    if not fits:
        wanted = tuple(w if isinstance(w, int) else f"{w[0]}: {w[1]} to {w[2]}" for w in spec.shape)
        first = spec.shape[0] if spec.shape else None
        ragged = isinstance(first, int) and shape[1:] == list(spec.shape[1:])
        raise CalibrationError(
            f"the input {spec.name!r} has shape {tuple(tensor.shape)}, not ({', '.join(map(str, wanted))})",
            where=place,
            remedy="use batches of one size (drop_last=True in a DataLoader), or make the batch dynamic: dynamic_shapes"
            if ragged
            else _REMEDY_DATA,
        )
