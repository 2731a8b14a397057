"""Calibration spread over several processes: what they measured is brought together by torch.distributed.

Each process calibrates on its own part of the data; process r of n holds the batches r, r + n, r + 2n, ... of the
whole. (`torch.utils.data.DistributedSampler` deals out samples, so that batches are others than those of one process.)
All processes must compile the same model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from qcompile.errors import CalibrationError

_Item = TypeVar("_Item")


class Processes(ABC):
    """The processes that calibrate together.

    Attributes:
        rank, count: which of them this is, and how many there are.
    """

    rank: int
    count: int

    @abstractmethod
    def smallest(self, value: float) -> float:
        """The smallest `value` that any of them gives."""

    @abstractmethod
    def sum(self, value: Tensor) -> Tensor:
        """The sum of all their values: tensors of float64 and one shape."""

    @abstractmethod
    def largest_each(self, value: Tensor) -> Tensor:
        """The largest of their values, element by element: tensors of one type and shape."""

    @abstractmethod
    def gather(self, value: Any) -> list[Any]:
        """What each of them gives, by rank; all must be able to import what it consists of."""

    def in_turn(self, dealt: list[_Item]) -> list[_Item]:
        """What was dealt out to all of them, in its order before."""
        rounds = zip_longest(*([(item,) for item in held] for held in self.gather(dealt)), fillvalue=())
        return [item for turn in rounds for given in turn for item in given]

    def largest(self, value: float) -> float:
        """The largest `value` that any of them gives."""
        return -self.smallest(-value)

    @contextmanager
    def succeed(self, what: str) -> Iterator[None]:
        """Within, each does its own part of `what`; behind it all go on, or none does.

        Raises:
            CalibrationError: it failed in another process.
        """
        try:
            yield
        except BaseException:
            self.largest(1.0)
            raise
        if self.largest(0.0):
            raise CalibrationError(
                f"{what} failed in another process", remedy="see what that process says; each says its own error"
            )


class _Alone(Processes):
    rank, count = 0, 1

    def smallest(self, value: float) -> float:
        return value

    def sum(self, value: Tensor) -> Tensor:
        return value

    def largest_each(self, value: Tensor) -> Tensor:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]


class _Group(Processes):
    """The default process group."""

    def __init__(self) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self._device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")

    def smallest(self, value: float) -> float:
        return float(self._reduced(torch.tensor(value, dtype=torch.float64), dist.ReduceOp.MIN))

    def sum(self, value: Tensor) -> Tensor:
        return self._reduced(value, dist.ReduceOp.SUM)

    def largest_each(self, value: Tensor) -> Tensor:
        return self._reduced(value, dist.ReduceOp.MAX)

    def gather(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def _reduced(self, value: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        together = value.to(self._device, copy=True)
        dist.all_reduce(together, how)
        return together.to(value.device)


def processes() -> Processes:
    """Those of the process group that the script has initialised; this one alone where it has none."""
    return _Group() if dist.is_available() and dist.is_initialized() else _Alone()
