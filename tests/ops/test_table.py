"""The op table as a whole: every row and every sample."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from qcompile import ops
from qcompile.ops import Act, Row, Sample

SEED = 2026
SAMPLES = [
    pytest.param(row, sample, id=f"{row.name}-{i}")
    for row in ops.ROWS
    for i, sample in enumerate(row.samples(torch.Generator().manual_seed(SEED)))
]


def unwrap(value: Any) -> Any:
    """The arguments of a sample without the `Act` marks."""
    return pytree.tree_map_only(Act, lambda act: act.tensor, value)


def call(row: Row, sample: Sample) -> Tensor:
    result = row.op(*unwrap(sample.args), **unwrap(sample.kwargs))
    assert isinstance(result, Tensor)
    return result


def activations(sample: Sample) -> list[Tensor]:
    leaves = pytree.tree_leaves((sample.args, sample.kwargs))
    return [leaf.tensor for leaf in leaves if isinstance(leaf, Act)]


def tensors(sample: Sample) -> list[Tensor]:
    """Activations and constants."""
    return [leaf for leaf in pytree.tree_leaves(unwrap((sample.args, sample.kwargs))) if isinstance(leaf, Tensor)]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("row", "sample"), SAMPLES)
def test_the_reference_gives_varied_values_of_the_right_type(row: Row, sample: Sample) -> None:
    result = call(row, sample)
    gives_floats = row.name in ("dequantize", "linear_dynamic", "linear_weight_only")
    assert result.dtype is (torch.float32 if gives_floats else torch.int8)
    if result.numel() > 8:
        assert len(result.unique()) > 3
    if "lo" in (names := argument_names(row)):
        lo, hi = (sample.args[names.index(name)] for name in ("lo", "hi"))
        assert lo <= int(result.min())
        assert int(result.max()) <= hi


@pytest.mark.parametrize(("row", "sample"), SAMPLES)
def test_the_fake_shape_is_the_real_shape(row: Row, sample: Sample) -> None:
    mode = FakeTensorMode()
    args, kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, (unwrap(sample.args), unwrap(sample.kwargs)))
    with mode:
        fake = row.op(*args, **kwargs)
    real = call(row, sample)
    assert fake.shape == real.shape
    assert fake.dtype == real.dtype


@pytest.mark.parametrize(("row", "sample"), SAMPLES)
def test_the_reference_leaves_its_arguments_alone(row: Row, sample: Sample) -> None:
    before = [x.clone() for x in tensors(sample)]
    assert before
    call(row, sample)
    assert_same(tensors(sample), before)


@pytest.mark.parametrize("row", ops.ROWS, ids=lambda row: row.name)
def test_samples_are_the_same_for_the_same_seed(row: Row) -> None:
    first, second = (list(row.samples(torch.Generator().manual_seed(7))) for _ in range(2))
    assert 3 <= len(first) <= 20
    for a, b in zip(first, second, strict=True):
        assert_same(activations(a), activations(b))
    assert len({sample.label for sample in first}) == len(first)


def argument_names(row: Row) -> list[str]:
    return [argument.name for argument in row.op._schema.arguments]


@pytest.mark.parametrize("row", ops.integer_rows(), ids=lambda row: row.name)
def test_the_schema_names_the_arguments_of_the_reference(row: Row) -> None:
    for function in (row.reference, row.fake):
        code = function.__code__
        assert list(code.co_varnames[: code.co_argcount]) == argument_names(row)
    assert "Reference. x" in (row.reference.__doc__ or "").replace("a, b", "x").replace("xs", "x")


@pytest.mark.parametrize("row", ops.integer_rows(), ids=lambda row: row.name)
def test_the_reference_is_what_torch_ops_calls(row: Row) -> None:
    sample = next(iter(row.samples(torch.Generator().manual_seed(3))))
    assert torch.equal(call(row, sample), row.reference(*unwrap(sample.args), **unwrap(sample.kwargs)))


def test_an_aten_operator_is_shared_only_between_activations_and_constants() -> None:
    rows_of = Counter(target for row in ops.ROWS for target in row.aten)
    shared = {str(target): [r.name for r in ops.ROWS if target in r.aten] for target, n in rows_of.items() if n > 1}
    assert shared == {
        "aten.add.Tensor": ["add", "lookup"],
        "aten.sub.Tensor": ["add", "lookup"],
        "aten.mul.Tensor": ["mul", "lookup"],
    }
    # No row names a target twice.
    assert all(len(set(row.aten)) == len(row.aten) for row in ops.ROWS)


def test_rows_are_listed_by_name_and_by_kind() -> None:
    assert set(ops.integer_rows()) | set(ops.shape_rows()) == set(ops.ROWS)
    assert [ops.row(name) for name in ops.names()] == list(ops.ROWS)
    assert all(row.output is ops.Output.SHARED for row in ops.shape_rows())


# --- matching --------------------------------------------------------------------------------------


class Graph:
    """A graph of ATen calls whose values are known, for asking the table about a node."""

    def __init__(self) -> None:
        self.owner = fx.GraphModule(torch.nn.Module(), fx.Graph())
        self.names = (f"value_{i}" for i in itertools.count())

    def input(self, *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        node = self.owner.graph.placeholder(next(self.names))
        node.meta["val"] = torch.empty(shape, dtype=dtype)
        return node

    def constant(self, value: Tensor) -> fx.Node:
        name = next(self.names)
        self.owner.register_buffer(name, value)
        node = self.owner.graph.get_attr(name)
        node.meta["val"] = value
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.owner.graph.call_function(target, args, kwargs)
        node.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"]), **kwargs)
        return node


aten = torch.ops.aten


def taken_by(node: fx.Node) -> str | None:
    row, reason = ops.match(node)
    assert (row is None) == bool(reason)
    return row.name if row else None


def test_arithmetic_goes_to_the_row_that_fits_its_operands() -> None:
    g = Graph()
    x, y = g.input(2, 5, 3, 3), g.input(2, 5, 1, 1)
    channels = g.constant(torch.rand(5, 1, 1))
    assert taken_by(g.call(aten.add.Tensor, x, y)) == "add"
    assert taken_by(g.call(aten.add.Tensor, x, x)) == "add"
    assert taken_by(g.call(aten.mul.Tensor, x, x)) == "mul"
    assert taken_by(g.call(aten.mul.Tensor, x, 2.0)) == "lookup"
    assert taken_by(g.call(aten.mul.Tensor, x, channels)) == "lookup"
    assert taken_by(g.call(aten.sub.Tensor, channels, x)) == "lookup"
    assert taken_by(g.call(aten.add.Tensor, x, g.constant(torch.tensor(1.5)))) == "lookup"


@pytest.mark.parametrize(
    ("shape", "constant"),
    [((2, 5, 3, 3), (3, 3)), ((2, 5, 3, 3), (2, 5, 1, 1)), ((2, 5), (4, 1, 1, 5)), ((2, 1, 3), (5, 1)), ((5,), (5,))],
)
def test_a_constant_that_varies_beyond_the_channels_is_declined(
    shape: tuple[int, ...], constant: tuple[int, ...]
) -> None:
    g = Graph()
    row, reason = ops.match(g.call(aten.mul.Tensor, g.input(*shape), g.constant(torch.rand(constant))))
    assert row is None
    assert "constant" in reason


def test_what_no_row_can_take_is_declined_with_a_reason() -> None:
    g = Graph()
    image, weight, vector = g.input(3, 8, 8), g.input(4, 3, 3, 3), g.input(6)
    x = g.input(2, 3, 8, 8)
    kernel = g.constant(torch.rand(4, 3, 3, 3))
    declined = {
        "no batch": [
            g.call(aten.conv2d.default, image, kernel),
            g.call(aten.linear.default, vector, g.constant(torch.rand(2, 6))),
        ],
        "computed at run time": [
            g.call(aten.conv2d.default, x, weight),
            g.call(aten.div.Tensor, x, g.input(2, 3, 1, 1)),
            g.call(aten.maximum.default, x, g.input(1)),
        ],
        "(N, C, H, W)": [g.call(aten.max_pool2d.default, image, [2, 2])],
        "padding mode": [g.call(aten.pad.default, x, [1, 1, 1, 1], "reflect")],
        "pads with": [g.call(aten.constant_pad_nd.default, x, [1, 1], 2.5)],
        "crops": [g.call(aten.constant_pad_nd.default, x, [-1, 0])],
        "differ in rank": [g.call(aten.cat.default, [x, g.input(0)], 1)],
        "an operand is constant": [g.call(aten.cat.default, [vector, g.constant(torch.rand(3))])],
        "not a float32 tensor": [g.call(aten.add.Tensor, g.input(3, dtype=torch.int64), g.input(3, dtype=torch.int64))],
        "no activation operand": [g.call(aten.relu.default, g.constant(torch.rand(3)))],
        "no integer operator": [g.call(aten.cumsum.default, x, 1), x],
    }
    for words, nodes in declined.items():
        for node in nodes:
            row, reason = ops.match(node)
            assert row is None, node
            assert words in reason


def test_the_bounds_of_clamping_operators_are_known() -> None:
    g = Graph()
    x = g.input(3)
    assert ops.clamp_bounds(g.call(aten.relu.default, x)) == (0.0, None)
    assert ops.clamp_bounds(g.call(aten.relu6.default, x)) == (0.0, 6.0)
    assert ops.clamp_bounds(g.call(aten.hardtanh.default, x)) == (-1.0, 1.0)
    assert ops.clamp_bounds(g.call(aten.hardtanh.default, x, 0.0, 6.0)) == (0.0, 6.0)
    assert ops.clamp_bounds(g.call(aten.clamp.default, x, 0.1)) == (0.1, None)
    assert ops.clamp_bounds(g.call(aten.clamp.default, x, None, 2)) == (None, 2)
    assert ops.clamp_bounds(g.call(aten.clamp.default, x, max=2)) == (None, 2)
    assert ops.clamp_bounds(g.call(aten.clamp_min.default, x, 0.0)) == (0.0, None)
    assert ops.clamp_bounds(g.call(aten.clamp_max.default, x, 3.0)) == (None, 3.0)
    assert ops.clamp_bounds(g.call(aten.sigmoid.default, x)) is None
