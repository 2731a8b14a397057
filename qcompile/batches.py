"""Data as the user gives it: an iterable of batches, read once, one batch at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from operator import length_hint
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree

from qcompile.errors import CalibrationError, QcompileError


class Batches:
    """Iterates over the user's data once; `ahead` and `first` look at batches without taking them away.

    Args:
        what: what errors call the data, and `kind` their class.

    Raises:
        CalibrationError: the data is one batch and no iterable of them, or raises while it is read.
    """

    def __init__(
        self, data: Iterable[Any], what: str = "calibration", kind: type[QcompileError] = CalibrationError
    ) -> None:
        self._what, self._kind = what, kind
        remedy = "pass an iterable of batches: a list of inputs, a generator or a DataLoader"
        if isinstance(data, (Tensor, np.ndarray, Mapping, str)):
            raise kind(f"the {what} data is one {type(data).__name__}", remedy=f"{remedy}, as [batch]")
        try:
            self._rest = iter(data)
        except TypeError as error:
            raise kind(f"the {what} data is a {type(data).__name__}, which is not iterable", remedy=remedy) from error
        self._length = length_hint(data, -1)
        self._waiting: deque[Any] = deque()
        self._taken = 0

    def __length_hint__(self) -> int:
        return self._length if self._length >= 0 else NotImplemented

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._waiting.popleft() if self._waiting else self._read()

    def _read(self) -> Any:
        try:
            batch = next(self._rest)
        except StopIteration:
            raise
        except Exception as error:
            raise self._kind(
                f"the {self._what} data raised {type(error).__name__}: {error}",
                where=f"{self._what} batch {self._taken}",
                remedy="check that a plain loop over the data works",
            ) from error
        self._taken += 1
        return batch

    def ahead(self) -> Iterator[Any]:
        """Copies of the batches from here on, which will be read again; each that is taken is kept until then."""
        yield from tuple(self._waiting)
        while True:
            try:
                batch = self._read()
            except StopIteration:
                return
            self._waiting.append(_copied(batch))  # its memory may be the next one's too
            yield self._waiting[-1]

    def first(self) -> Any:
        """The first batch, which will be read again.

        Raises:
            CalibrationError: there is none.
        """
        for batch in self.ahead():
            return batch
        raise empty()


def _copied(batch: Any) -> Any:
    copied = pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), batch)
    return pytree.tree_map_only(np.ndarray, np.copy, copied)


def empty() -> CalibrationError:
    """What to say of data without a batch."""
    return CalibrationError(
        "the calibration data is empty",
        remedy="pass at least one batch; a generator that was read before is empty, so make a new one",
    )
