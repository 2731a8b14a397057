"""The constants of a network: one array for each element type, so that a call passes a handful of tensors."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

POOLS = ("int8", "uint8", "int16", "int32", "float32")
ALIGNMENT = 64  # bytes: a cache line, and the widest vector


@dataclass
class Pool:
    """All constants of one element type, one after the other, aligned; equal ones once."""

    dtype: str
    parts: list[np.ndarray] = field(default_factory=list)
    size: int = 0
    known: dict[bytes, int] = field(default_factory=dict)

    def add(self, value: np.ndarray) -> int:
        """The position of `value` in the pool."""
        key = hashlib.sha256(value.tobytes()).digest()
        if key not in self.known:
            self.known[key] = self.size
            padding = -value.size % (ALIGNMENT // value.itemsize)
            self.parts.append(np.pad(value.reshape(-1), (0, padding)))
            self.size += value.size + padding
        return self.known[key]

    def data(self) -> np.ndarray:
        return np.concatenate(self.parts) if self.parts else np.zeros(1, self.dtype)
