"""How a weighted row builds its call: constants, clamp, residual, and the proof about overflow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from qcompile import arith, ops
from qcompile.errors import QuantizationError
from qcompile.ir import QParams
from qcompile.ops import QValue, Site, Weight
from qcompile.ops.row import random_int8

aten = torch.ops.aten
X, Y, R = QParams(0.03, -7), QParams(0.05, 20), QParams(0.011, 3)


def linear_site(q: Tensor, *, bias: Tensor | None, residual: bool = False, lo: int = -128, hi: int = 127) -> Site:
    """A linear of `q` in a graph of its own; constants become attributes of that graph's module."""
    owner = fx.GraphModule(torch.nn.Module(), fx.Graph())
    x, other = owner.graph.placeholder("x"), owner.graph.placeholder("other")
    node = owner.graph.call_function(aten.linear.default, (x, x))

    def constant(name: str, value: Tensor) -> fx.Node:
        owner.register_buffer(name, value)
        return owner.graph.get_attr(name)

    weight = Weight(q, torch.linspace(0.01, 0.02, q.shape[0]))
    return Site(node, (QValue(x, X),), Y, lo, hi, weight, bias, QValue(other, R) if residual else None, constant)


def run(site: Site, x: Tensor, other: Tensor | None = None) -> Tensor:
    target, args, kwargs = ops.row("linear").fuse(site)
    owner = site.node.graph.owning_module
    known = {site.inputs[0].node: x, **({site.residual.node: other} if site.residual else {})}

    def read(node: fx.Node) -> Tensor:
        value = known[node] if node in known else getattr(owner, str(node.target))
        assert isinstance(value, Tensor)
        return value

    result = target(*fx.node.map_arg(args, read), **fx.node.map_arg(kwargs, read))
    assert isinstance(result, Tensor)
    return result


@pytest.fixture
def g() -> torch.Generator:
    return torch.Generator().manual_seed(8)


def test_a_clamp_is_applied_after_the_zero_point(g: torch.Generator) -> None:
    q, x = random_int8(g, 6, 40, lo=-127), random_int8(g, 9, 40)
    bias = torch.randn(6, generator=g)
    free, clamped = run(linear_site(q, bias=bias), x), run(linear_site(q, bias=bias, lo=20, hi=90), x)
    assert torch.equal(clamped, free.clamp(20, 90))
    assert not torch.equal(clamped, free)


def test_a_residual_is_added_at_its_own_scale(g: torch.Generator) -> None:
    q, x = random_int8(g, 6, 40, lo=-127), random_int8(g, 9, 40)
    other, bias = random_int8(g, 9, 6), torch.randn(6, generator=g)
    site = linear_site(q, bias=bias, residual=True)
    assert site.weight is not None
    real = torch.nn.functional.linear(
        arith.dequantize(x, X.scale, X.zero_point).double(), q.double() * site.weight.scale[:, None], bias.double()
    ) + arith.dequantize(other, R.scale, R.zero_point)
    low, high = ((edge - Y.zero_point) * Y.scale for edge in (-128, 127))
    error = arith.dequantize(run(site, x, other), Y.scale, Y.zero_point) - real.clamp(low, high)
    assert float(error.abs().max()) < 0.51 * Y.scale


def test_a_missing_bias_is_zero(g: torch.Generator) -> None:
    q, x = random_int8(g, 5, 12, lo=-127), random_int8(g, 4, 12)
    assert torch.equal(run(linear_site(q, bias=None), x), run(linear_site(q, bias=torch.zeros(5)), x))


def test_an_accumulator_that_could_overflow_is_refused() -> None:
    inputs = arith.INT32_MAX // (127 * 134)  # the largest |x - zero point| is 134
    site = linear_site(torch.full((1, inputs), 127, dtype=torch.int8), bias=None)
    ops.row("linear").fuse(site)
    site = linear_site(torch.full((1, inputs + 1), -127, dtype=torch.int8), bias=None)
    with pytest.raises(QuantizationError, match="accumulator could reach"):
        ops.row("linear").fuse(site)
