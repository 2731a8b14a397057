"""The cases by which an artifact tests itself on a device: inputs, and the outputs that the reference gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from qcompile.artifact import CoverageRow, Golden
from qcompile.ir import Program
from qcompile.ops.real import BFLOAT16
from qcompile.specs import quantization_of

FLOAT_TOLERANCE = 1e-3
"""Where operators stayed float, how far a device's outputs may be from the reference's, as a part of
the largest magnitude: float sums may be taken in another order."""

BFLOAT16_TOLERANCE = 2.0**-4
"""The same where they compute in bfloat16: a sum in another order may be rounded to the other of two neighbours, which
are 2^-8 apart, and every layer adds such differences to those before it. Networks of fifty layers came to 2^-6."""

TOLERANCE = {"float": FLOAT_TOLERANCE, BFLOAT16: BFLOAT16_TOLERANCE}  # by the kind of a row of the ledger

LARGE_GOLDEN = 4 << 20
"""Bytes of inputs from which on an artifact has one golden case instead of two."""


def tolerance(coverage: Sequence[CoverageRow]) -> float:
    """How far outputs may be from the reference's; 0 where everything is integer."""
    return max((TOLERANCE.get(row.kind, 0.0) for row in coverage), default=0.0)


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
