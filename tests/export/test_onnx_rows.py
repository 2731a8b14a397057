"""Every row of the op table has a counterpart in ONNX, and ONNX Runtime computes what the reference does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx_session import Session
from torch import Tensor

import qcompile
from qcompile import ops
from qcompile.export.moves import MOVES
from qcompile.export.rows import ROWS, weight_scale
from qcompile.ir import QPARAMS, Program, finish
from qcompile.ops.row import Example, Row

CASES = [
    pytest.param(row, example, id=f"{row.name}-{i}")
    for row in ops.ROWS
    if row.name in (*ROWS, *MOVES)
    for i, example in enumerate(row.examples(torch.Generator().manual_seed(5)))
]


def test_every_row_is_written() -> None:
    refused = {"linear_dynamic", "linear_weight_only"}  # their activations have no scale of their own in the file
    assert set(ROWS) == {row.name for row in ops.integer_rows()} - refused
    assert set(MOVES) == {row.name for row in ops.shape_rows()}


def clone_first(program: Program) -> None:
    node = next(n for n in program.graph.nodes if QPARAMS in n.meta)
    with program.graph.inserting_after(node):
        clone = program.graph.call_function(torch.ops.aten.clone.default, (node,))
    node.replace_all_uses_with(clone, delete_user_cb=lambda user: user is not clone)
    clone.meta[QPARAMS] = node.meta[QPARAMS]
    finish(program)


def flat(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize(("row", "example"), CASES)
def test_onnx_runtime_gives_what_the_reference_gives(row: Row, example: Example) -> None:
    """Within a step, where a tie is rounded otherwise; what moves values or looks them up is exact."""
    quantized = qcompile.quantize(example.module, calibration=[example.inputs])
    if row.name == "clone":  # canonicalize drops it, and a pass may bring one back
        clone_first(quantized.program)
    assert row.name == "clone" or any(r.kernel == row.name for r in quantized.coverage)
    inputs = tuple(1.2 * x for x in example.inputs)  # beyond the calibrated range, so that clipping shows
    signed = Session(quantized, fused=False)(*inputs)
    unsigned = Session(quantized, fused=False, activations="uint8")(*inputs)
    assert all(map(torch.equal, signed, unsigned))
    for expected, actual in zip(flat(quantized(*inputs)), signed, strict=True):
        assert (expected.shape, expected.dtype) == (actual.shape, actual.dtype)
        steps = (expected - actual).abs() / smallest_step(expected)
        computes = {r.kernel for r in quantized.coverage} - set(MOVES) - {"lookup", "max_pool2d"}
        assert steps.max() <= (1.01 if computes else 1e-3)
        assert (steps > 1e-3).float().mean() <= 0.02


def smallest_step(x: Tensor) -> float:
    values = x.unique().diff()
    return float(values[values > 1e-6].min()) if len(values) else 1.0


def test_an_engine_that_fuses_multiplies_by_the_programs_own_multiplier() -> None:
    g = torch.Generator().manual_seed(0)
    m = (torch.rand(4096, generator=g) * 0.01 + 1e-5).numpy()
    hits = []
    for x_scale, y_scale in (torch.rand(20, 2, generator=g) + 0.001).numpy():
        scale = weight_scale(m, float(x_scale), float(y_scale))
        fused = scale * x_scale / y_scale
        np.testing.assert_allclose(fused, m, rtol=3e-7)
        hits.append((fused == m).mean())
    assert np.mean(hits) > 0.75  # a quotient of two roundings does not reach every number
