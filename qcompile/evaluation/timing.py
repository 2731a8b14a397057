"""Speed and storage of two models."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Sequence
from typing import IO, Any, cast

import torch
from torch import nn
from torch.export import ExportedProgram

CALLS = 5  # per block


def interleave(calls: Sequence[Callable[[], object]], blocks: int) -> list[float]:
    """Median milliseconds of each of `calls`, measured in turns so that all see the same machine."""
    times: list[list[float]] = [[] for _ in calls]
    for block in range(blocks + 1):
        for call, taken in zip(calls, times, strict=True):
            for _ in range(CALLS):
                start = time.perf_counter()
                call()
                if block:  # the first block warms up
                    taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]


class _Counter(io.RawIOBase):
    """A file that keeps nothing of what is written but how much it was."""

    size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        written = memoryview(data).nbytes
        self.size += written
        return written


def file_size(model: nn.Module | ExportedProgram) -> int:
    """Bytes of the file that torch.save makes of the model's weights (its state_dict)."""
    state = model.state_dict if isinstance(model, ExportedProgram) else model.state_dict()
    counter = _Counter()
    torch.save(dict(state), cast(IO[bytes], counter))
    return counter.size
