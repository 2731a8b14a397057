"""Operators that stay float: each is compiled next to an integer layer, answers as eager PyTorch does, and is in
the ledger; what cannot be compiled is refused by its name, module and line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from float_models import MODELS
from passing import randn, randomize
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional
from torch.utils import _pytree as pytree

import qcompile
from qcompile.compiled import CompiledModel
from qcompile.errors import BuildError, StrictError

# Model -> the operator that the refusal names.
REFUSED = {
    "cummax": "aten.cummax.default",
    "conv_transpose3d": "aten.conv_transpose3d.input",
    "antialias": "aten._upsample_bilinear2d_aa.default",
    "mask": "aten.index.Tensor",
    "divided by zero": "aten.div.Tensor",
}


def same_answers(compiled: CompiledModel, *inputs: Tensor) -> bool:
    """Whether the machine code gives what the integer graph does: the same types and shapes, close floats."""
    got, want = (pytree.tree_leaves(answer) for answer in (compiled(*inputs), compiled.reference(*inputs)))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5, equal_nan=True)
    return True


@pytest.mark.parametrize("name", [name for name in MODELS if name not in REFUSED])
def test_an_operator_is_compiled_and_accounted_for(name: str) -> None:
    model = MODELS[name]()
    compiled = qcompile.compile(model, calibration=[model.inputs(seed) for seed in (1, 2)])
    # The second run gets the memory of the first, with other values.
    assert all(same_answers(compiled, *model.inputs(seed)) for seed in (5, 6))
    assert any(row.kind == "integer" for row in compiled.coverage)
    assert all(row.reason for row in compiled.coverage if row.kind == "float")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compiled_is_refused_at_its_line(name: str) -> None:
    model = MODELS[name]()
    with pytest.raises(BuildError) as caught:
        qcompile.compile(model, calibration=[model.inputs(1)])
    assert REFUSED[name] in caught.value.what
    assert caught.value.where
    assert "float_models.py" in str(caught.value.source)
    assert caught.value.remedy


def test_strict_refuses_before_anything_is_built() -> None:
    model = MODELS["cummax"]()
    with pytest.raises(StrictError, match=r"aten\.cummax\.default"):
        qcompile.compile(model, calibration=[model.inputs(1)], strict=True)


def test_a_shuffle_of_pixels_stays_integer() -> None:
    model = MODELS["pixel_shuffle quantized"]()
    compiled = qcompile.compile(model, calibration=[model.inputs(1)], strict=True)
    assert torch.equal(compiled(*model.inputs(3)), compiled.reference(*model.inputs(3)))


def test_rrelu_is_a_leaky_relu_and_integer() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.RReLU(0.1, 0.5)).eval()
    compiled = qcompile.compile(model, calibration=[randn(4, 6)], strict=True)
    assert [row.op for row in compiled.coverage] == ["aten.linear.default", "aten.leaky_relu.default"]


# --- outputs that nothing computes --------------------------------------------------------------------------


def test_a_constant_that_is_returned_is_the_callers_own() -> None:
    model = MODELS["constant"]()
    compiled = qcompile.compile(model, calibration=[model.inputs(1)])
    x, y = model.inputs(2)
    weight = compiled(x, y)[1]
    weight.fill_(7.0)
    assert same_answers(compiled, x, y)
    compiled(x, y)[2].fill_(7.0)
    assert same_answers(compiled, x, y)


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_a_model_that_does_nothing_compiles() -> None:
    compiled = qcompile.compile(Nothing(), calibration=[randn(2, 3)])
    x = randn(2, 3, seed=1)
    assert torch.equal(compiled(x), x)


# --- dynamic sizes ----------------------------------------------------------------------------------------


class Segments(nn.Module):
    """Padded, strided, depthwise and pointwise convolutions, a residual, pools of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise, self.pointwise = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x)
        x = torch.relu(self.pointwise(self.depthwise(x)) + x)
        x = functional.max_pool2d(x, 3, 2, 1)
        return x, self.head(x.mean((2, 3)))


@pytest.mark.parametrize("dynamic", [(2,), (3,), (0, 2, 3)], ids=str)
def test_an_image_may_have_any_size_that_was_declared(dynamic: tuple[int, ...]) -> None:
    dims = {axis: Dim(f"size{axis}", min=1 if axis == 0 else 5, max=40) for axis in dynamic}
    model = randomize(Segments())
    compiled = qcompile.compile(
        model, calibration=[randn(2, 3, 12, 14, seed=s) for s in (1, 2)], dynamic_shapes=(dims,)
    )
    for sizes in ({0: 1, 2: 5, 3: 31}, {0: 3, 2: 40, 3: 6}, {0: 2, 2: 12, 3: 14}):
        shape = [sizes.get(axis, size) if axis in dynamic else size for axis, size in enumerate((2, 3, 12, 14))]
        assert same_answers(compiled, randn(*shape, seed=5))
    reasons = [row.reason for row in compiled.coverage if "pool" in row.op and row.kind == "float"]
    assert set(reasons) <= {"its image size is dynamic"}


class Sequences(nn.Module):
    """Operators along and across a dynamic dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.linear(x)
        attended = functional.scaled_dot_product_attention(h, h, h)
        return attended, h.cumsum(1), h.std(1), (h @ h.mT).tril(), h.max(1)[0], x.sin().topk(3).values


def test_a_sequence_may_have_any_length_that_was_declared() -> None:
    dims = {0: Dim("batch", min=1, max=9), 1: Dim("length", min=2, max=20)}
    model = randomize(Sequences())
    compiled = qcompile.compile(model, calibration=[randn(2, 5, 12)], dynamic_shapes=(dims,))
    for batch, length in ((1, 7), (3, 2), (2, 5)):
        assert same_answers(compiled, randn(batch, length, 12, seed=length))


class Rows(nn.Module):
    """Reads or writes rows of a matrix, chosen at run time."""

    def __init__(self, choose: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.choose = nn.Linear(8, 4), choose

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        return self.choose(self.linear(x), rows)


def wide(rows: Tensor) -> Tensor:
    return rows[:, None].expand(-1, 4)


@pytest.mark.parametrize(
    "choose",
    [
        lambda h, rows: h.index_select(0, rows),
        lambda h, rows: h[rows],
        lambda h, rows: h.gather(0, wide(rows)),
        lambda h, rows: torch.zeros(16, 4).scatter_add(0, wide(rows), h[:6]),
        lambda h, rows: functional.embedding(rows, h),
    ],
    ids=["index_select", "index", "gather", "scatter_add", "embedding"],
)
def test_an_index_out_of_range_touches_no_other_memory(choose: Callable[[Tensor, Tensor], Tensor]) -> None:
    """It counts as the nearest one there is. (PyTorch raises an error.)"""
    x, rows = torch.randn(16, 8), torch.tensor([0, 15, 3, 3, 7, 1])
    compiled = qcompile.compile(randomize(Rows(choose)), calibration=[(x, rows)])
    assert same_answers(compiled, x, rows)
    for outside, nearest in ((16, 15), (10**9, 15), (-(10**9), 0)):
        torch.testing.assert_close(
            compiled(x, torch.full((6,), outside)), compiled(x, torch.full((6,), nearest)), rtol=0, atol=0
        )
