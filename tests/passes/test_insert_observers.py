"""insert_observers: one observer per int8 tensor, none inside a group, none between float operators."""

from __future__ import annotations

import pytest
from passing import Block, TwoBranches, matches_golden, randn, randomize, run_until
from torch import Tensor, nn

from qcompile.config import QuantConfig
from qcompile.errors import ConfigError
from qcompile.ir import Program, where


def observed(program: Program) -> list[str]:
    """The tensors that have an observer, in order."""
    return [str(n.args[0]) for n in program.graph.nodes if n.op == "call_module"]


def test_a_residual_block_has_three_int8_tensors() -> None:
    program = run_until("insert_observers", randomize(Block()), (randn(1, 4, 6, 6),))
    assert observed(program) == ["x", "relu", "relu_1"]
    assert matches_golden("insert_observers", program)


def test_the_later_of_two_convolutions_absorbs_their_sum() -> None:
    program = run_until("insert_observers", randomize(TwoBranches()), (randn(1, 4, 6, 6),))
    assert observed(program) == ["x", "conv2d", "add"]


class Between(nn.Module):
    """Softmax, a view, softmax: the view computes nothing that int8 could speed up."""

    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(1).view(-1).softmax(0)


def test_a_view_between_float_operators_stays_float() -> None:
    assert observed(run_until("insert_observers", Between(), (randn(3, 4),))) == []


def test_an_excluded_module_is_not_observed() -> None:
    config = QuantConfig(exclude=("second.*",))
    program = run_until("insert_observers", randomize(Block()), (randn(1, 4, 6, 6),), config)
    # The excluded convolution reads an int8 tensor and the add reads its float result, quantized.
    excluded = next(n for n in program.graph.nodes if n.op == "call_function" and where(n) == "second.0")
    assert observed(program) == ["x", "relu", excluded.name, "relu_1"]


def test_an_exclude_pattern_that_matches_nothing_names_its_neighbours() -> None:
    with pytest.raises(ConfigError, match=r"secnd.*matches no module(.|\n)*second"):
        run_until("insert_observers", randomize(Block()), (randn(1, 4, 6, 6),), QuantConfig(exclude=("secnd",)))


def test_a_target_that_lacks_an_operator_leaves_it_float() -> None:
    program = run_until(
        "insert_observers",
        randomize(Block()),
        (randn(1, 4, 6, 6),),
        objection=lambda row, node: f"no {row.name} kernel",
    )
    assert observed(program) == []
