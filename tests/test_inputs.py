"""Inputs that nest: a compiled model is called as the model is, and nothing is taken for another input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from passing import randn, sqnr
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import qcompile
from qcompile.errors import CaptureError, InputError


class Nested(nn.Module):
    """Inputs of one shape: only their places tell them apart."""

    def forward(self, x: Tensor, more: dict[str, Any], scale: dict[int, Tensor]) -> Tensor:
        a, b = more["pair"]
        return torch.relu(x + 2 * a - b * more["last"]) * scale[3]


X, A, B, LAST, SCALE = FLAT = [randn(2, 6, seed=seed) for seed in range(5)]
GIVEN = (X, {"pair": [A, B], "last": LAST}, {3: SCALE})
IN_ANOTHER_ORDER = {"last": LAST, "pair": (A, B)}


@pytest.fixture(scope="module")
def nested() -> qcompile.CompiledModel:
    return qcompile.compile(Nested(), calibration=[GIVEN])


def test_inputs_nest_as_the_model_nests_them(nested: qcompile.CompiledModel, tmp_path: Path) -> None:
    """By position or by name, a dictionary in any order; or all of them flat."""
    nested.save(tmp_path / "nested.qcm")
    expected = nested(*FLAT)
    assert sqnr(Nested()(*GIVEN), expected) > 25
    for call in (nested, nested.reference, qcompile.load(tmp_path / "nested.qcm")):
        assert torch.equal(call(*GIVEN), expected)
        assert torch.equal(call(X, scale={3: SCALE}, more=IN_ANOTHER_ORDER), expected)
        assert torch.equal(call([X, [A, B], LAST, SCALE]), expected)
    arrays = pytree.tree_map(Tensor.numpy, GIVEN)
    np.testing.assert_array_equal(qcompile.load(tmp_path / "nested.qcm")(*arrays), expected.numpy())


def test_a_quantized_model_is_called_so_too() -> None:
    quantized = qcompile.quantize(Nested(), calibration=[GIVEN])
    expected = quantized(*FLAT)
    assert torch.equal(quantized(X, IN_ANOTHER_ORDER, {3: SCALE}), expected)
    with pytest.raises(InputError, match="takes 5 tensors"):
        quantized(*FLAT, X)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((X, {"pair": [A, B]}, {3: SCALE}), "the input more holds nothing at 'last'"),
        ((X, {"pair": [A], "last": LAST}, {3: SCALE}), "the input more holds nothing at 'pair' 1"),
        ((X, {**GIVEN[1], "label": B}, {3: SCALE}), "the inputs hold 6 arrays, and the model takes 5"),
        (GIVEN[:2], "and the model takes scale behind the 2"),
        ((*GIVEN, X), "and the model takes no more behind the 4"),
    ],
    ids=["a key", "a position", "too much", "an argument", "too many"],
)
def test_inputs_that_nest_in_another_way_are_refused(
    nested: qcompile.CompiledModel, inputs: tuple[Any, ...], message: str
) -> None:
    for call in (nested, nested.reference):
        with pytest.raises(InputError, match=message) as caught:
            call(*inputs)
        assert caught.value.remedy


class Unlike(nn.Module):
    def forward(self, of: dict[str, Tensor]) -> Tensor:
        return torch.cat([torch.relu(of["small"]), torch.sigmoid(of["large"])])


def test_calibration_goes_by_the_keys_of_a_dictionary() -> None:
    """Not by their order, which a later batch may have in another way."""
    batch = {"small": A, "large": 100 * B}
    one_order = qcompile.quantize(Unlike(), calibration=[(batch,), (batch,)])
    both_orders = qcompile.quantize(Unlike(), calibration=[(batch,), (dict(reversed(batch.items())),)])
    assert torch.equal(one_order(batch), both_orders(batch))


def test_a_key_that_an_artifact_cannot_hold_is_refused() -> None:
    class Keyed(nn.Module):
        def forward(self, of: dict[Any, Tensor]) -> Tensor:
            return torch.relu(of[1.5])

    with pytest.raises(CaptureError, match=r"a key that is no text(.|\n)*such keys"):
        qcompile.quantize(Keyed(), calibration=[({1.5: X},)])
