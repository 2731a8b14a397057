"""The data of an evaluation, batch by batch, as both models take it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import length_hint
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from qcompile.artifact import TensorSpec
from qcompile.batches import Batches
from qcompile.capture import check_eval
from qcompile.checks import InputChecker
from qcompile.errors import CalibrationError, InputError
from qcompile.inputs import count_samples, example_call, flatten, surplus, warn_of_surplus
from qcompile.passes.base import Progress


@dataclass(frozen=True)
class Piece:
    """A batch, or a part of one where the compiled model has a smaller, static batch size.

    Attributes:
        place: for errors: "batch 3".
        positional, named: the arguments of the float model.
        flat: the inputs of the compiled model, in order.
        labels: of this piece; None without labels.
    """

    place: str
    positional: tuple[Any, ...]
    named: dict[str, Any]
    flat: tuple[Tensor, ...]
    labels: Tensor | None

    @property
    def samples(self) -> int:
        return count_samples(self.flat)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Piece:
        """With `change` done to each input."""
        changed = {id(x): change(x) for x in self.flat}
        positional, named = pytree.tree_map_only(Tensor, lambda x: changed.get(id(x), x), (self.positional, self.named))
        return replace(self, positional=positional, named=named, flat=tuple(changed[id(x)] for x in self.flat))


def runnable(model: nn.Module | ExportedProgram) -> nn.Module:
    """The float model as a module to call.

    Raises:
        InputError: it is no model. CaptureError: a layer is in training mode.
    """
    if isinstance(model, ExportedProgram):
        return model.module()
    if not isinstance(model, nn.Module):
        raise InputError(
            f"the float model is a {type(model).__name__}", remedy="pass the nn.Module or ExportedProgram it was"
        )
    check_eval(model)
    return model


def pieces(
    data: Iterable[Any],
    specs: Sequence[TensorSpec],
    model: nn.Module,
    *,
    labels: bool,
    progress: Progress | None = None,
    step: str = "evaluate",
) -> Iterator[Piece]:
    """The batches of `data`, read once, in pieces of the static batch size where there is one.

    Args:
        data: batches as calibration takes them; with `labels`, pairs of such a batch and labels.

    Raises:
        InputError: there is no batch, or one does not fit; names the batch.
    """
    batches = Batches(data, "evaluation", InputError)
    total, check, index = length_hint(batches, -1), InputChecker(tuple(specs)), -1
    for index, batch in enumerate(batches):
        for piece in _split(_piece(batch, model, specs, labels, f"batch {index}"), specs):
            try:
                check([x.numpy() for x in piece.flat])
            except InputError as error:
                raise InputError(error.what, where=f"{piece.place}, {error.where}", remedy=error.remedy) from error
            yield piece
        if progress is not None:
            progress(step, index + 1, total if total >= 0 else None)
    if index < 0:
        raise InputError("there is no data to evaluate on", remedy="pass at least one batch")


def _piece(batch: Any, model: nn.Module, specs: Sequence[TensorSpec], labels: bool, place: str) -> Piece:
    wanted: Any = None
    if labels:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            what = f"{len(batch)} values" if isinstance(batch, (tuple, list)) else f"a {type(batch).__name__}"
            raise InputError(
                f"the batch is {what}, and no pair of inputs and labels",
                where=place,
                remedy="give pairs (inputs, labels), or labels=False",
            )
        batch, wanted = batch
        wanted = torch.from_numpy(wanted) if isinstance(wanted, np.ndarray) else wanted
        if not isinstance(wanted, Tensor):
            raise InputError(
                f"the labels are a {type(wanted).__name__}", where=place, remedy="give a tensor of class indices"
            )
    try:
        positional, named = example_call(model, batch, None)
    except CalibrationError as error:
        raise InputError(error.what, where=place, remedy=error.remedy) from error
    positional, named = pytree.tree_map_only(Tensor, lambda x: x.detach().cpu(), (positional, named))
    flat = flatten(named or positional, specs)
    names = ", ".join(spec.name for spec in specs)
    if flat is None or not all(isinstance(x, Tensor) for x in flat):
        raise InputError(
            f"the batch does not hold the {len(specs)} inputs of the model ({names}) as tensors",
            where=place,
            remedy="give each batch as for a call: a tensor, a tuple of tensors, or a dict by name",
        )
    if more := surplus(named or positional, specs):
        raise InputError(
            f"the batch holds more than the inputs of the compiled model ({names}), and the float model would take "
            f"it: {more}",
            where=place,
            remedy="give the inputs alone, or pairs of inputs and labels and labels=True",
        )
    warn_of_surplus(batch, specs)
    return Piece(place, positional, named, tuple(flat), wanted)


def _split(piece: Piece, specs: Sequence[TensorSpec]) -> Iterator[Piece]:
    """Into equal parts of the static batch size, where the batch is a multiple of it; else whole."""
    parts = _parts(piece.flat, specs)
    if parts == 1:
        yield piece
        return
    labels: Sequence[Tensor | None] = [None] * parts
    if piece.labels is not None:
        if piece.labels.dim() == 0 or len(piece.labels) != piece.samples:
            raise InputError(
                f"there are labels of shape {tuple(piece.labels.shape)} for {piece.samples} samples",
                where=piece.place,
                remedy="give one label per sample, along the first axis",
            )
        labels = piece.labels.chunk(parts)
    for part in range(parts):
        cut = piece.mapped(lambda x, part=part: x.chunk(parts)[part])  # type: ignore[misc]
        yield replace(cut, labels=labels[part])


def _parts(flat: Sequence[Tensor], specs: Sequence[TensorSpec]) -> int:
    factors = set()
    for x, spec in zip(flat, specs, strict=False):
        batch = spec.shape[0] if spec.shape else None
        if not isinstance(batch, int) or batch < 1 or not x.dim() or len(x) % batch:
            return 1
        factors.add(len(x) // batch)
    return max(factors.pop(), 1) if len(factors) == 1 else 1
