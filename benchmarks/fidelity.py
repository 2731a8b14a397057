"""How near the outputs of a quantized classifier are to those of the float one."""

from __future__ import annotations

import torch
from torch import Tensor


def fidelity(wanted: Tensor, given: Tensor) -> tuple[float, float]:
    """(SQNR in dB, how often the top label is the same) of logits (N, classes)."""
    noise = (wanted - given).double().square().sum()
    sqnr = float(10 * torch.log10(wanted.double().square().sum() / noise))
    return sqnr, float((wanted.argmax(1) == given.argmax(1)).double().mean())
