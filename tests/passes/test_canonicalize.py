"""canonicalize: each meaning gets one form, and keeps its values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from passing import matches_golden, operators, randn, randomize, run_until, same_values
from torch import Tensor, nn
from torch.nn import functional

from qcompile.manager import PassManager
from qcompile.passes import Context
from qcompile.passes.canonicalize import Canonicalize
from qcompile.text import graph_text


class Apply(nn.Module):
    """A function of x and a constant matrix w (5, 8), vector b (8,), kernel k (4, 3, 3, 3)."""

    def __init__(self, function: Callable[..., Tensor | tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(randn(5, 8, seed=1))
        self.b = nn.Parameter(randn(8, seed=2))
        self.k = nn.Parameter(randn(4, 3, 3, 3, seed=3))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(self, x)


IMAGE, SEQUENCE, ROWS = (2, 3, 8, 9), (2, 6, 10), (4, 5)

FIRES = {
    "dropout": (lambda m, x: functional.dropout(x, 0.5, False) * 2, IMAGE, ["mul"]),
    "clone and contiguous": (lambda m, x: x.clone().contiguous().detach() * 2, IMAGE, ["mul"]),
    "cast to its own type": (lambda m, x: x.to(torch.float32) * 2, IMAGE, ["mul"]),
    "view to its own shape": (lambda m, x: x.view(2, 3, 8, 9) * 2, IMAGE, ["mul"]),
    "same padding": (lambda m, x: functional.conv2d(x, m.k, padding="same"), IMAGE, ["conv2d"]),
    "valid padding": (lambda m, x: functional.conv2d(x, m.k, padding="valid"), IMAGE, ["conv2d"]),
    "asymmetric same padding": (
        lambda m, x: functional.conv2d(x, m.k[:, :, :2, :], padding="same"),
        IMAGE,
        ["constant_pad_nd", "conv2d"],
    ),
    "zero padding before a convolution": (
        lambda m, x: functional.conv2d(functional.pad(x, (2, 2, 1, 1)), m.k, stride=2, padding=1),
        IMAGE,
        ["conv2d"],
    ),
    "convolution": (lambda m, x: torch.convolution(x, m.k, None, [1], [1], [1], False, [0], 1), IMAGE, ["conv2d"]),
    "matmul with a constant": (lambda m, x: x @ m.w, ROWS, ["linear"]),
    "matmul with a transposed constant": (lambda m, x: x.reshape(2, 2, 5) @ m.w, ROWS, ["reshape", "linear"]),
    "mm": (lambda m, x: torch.mm(x, m.w), ROWS, ["linear"]),
    "addmm": (lambda m, x: torch.addmm(m.b, x, m.w), ROWS, ["linear"]),
    "matmul plus bias": (lambda m, x: m.b + x @ m.w, ROWS, ["linear"]),
    "mean over space": (lambda m, x: x.mean((3, 2), keepdim=True), IMAGE, ["adaptive_avg_pool2d"]),
    "mean over space, dropped": (lambda m, x: x.mean((-2, -1)), IMAGE, ["adaptive_avg_pool2d", "squeeze"]),
    "mean over length": (
        lambda m, x: x.mean(-1),
        SEQUENCE,
        ["unsqueeze", "adaptive_avg_pool2d", "squeeze", "squeeze"],
    ),
    "split": (lambda m, x: x.split([1, 2], 1)[1] * 2, IMAGE, ["slice", "mul"]),
    "chunk": (lambda m, x: torch.cat(x.chunk(2, -2)[::-1], 2), IMAGE, ["slice", "slice", "cat"]),
    "unbind": (lambda m, x: x.unbind(1)[2] * 2, IMAGE, ["select", "mul"]),
    "max_pool1d": (lambda m, x: functional.max_pool1d(x, 3, 2, 1), SEQUENCE, ["unsqueeze", "max_pool2d", "squeeze"]),
    "avg_pool1d": (
        lambda m, x: functional.avg_pool1d(x, 3, 2, 1, count_include_pad=False),
        SEQUENCE,
        ["unsqueeze", "avg_pool2d", "squeeze"],
    ),
    "adaptive_avg_pool1d": (
        lambda m, x: functional.adaptive_avg_pool1d(x, 3),
        SEQUENCE,
        ["unsqueeze", "adaptive_avg_pool2d", "squeeze"],
    ),
    "hardswish": (lambda m, x: x * functional.relu6(x + 3) / 6, IMAGE, ["hardswish"]),
    "hardswish, divided first": (lambda m, x: x * (functional.relu6(x + 3) / 6), IMAGE, ["hardswish"]),
    "hardsigmoid": (lambda m, x: functional.relu6(x + 3) * (1 / 6), IMAGE, ["hardsigmoid"]),
    "silu": (lambda m, x: x * torch.sigmoid(x), IMAGE, ["silu"]),
    "gelu": (lambda m, x: 0.5 * x * (1 + torch.erf(x / 2**0.5)), IMAGE, ["gelu"]),
    "gelu by tanh": (
        lambda m, x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x.pow(3)))),
        IMAGE,
        ["gelu"],
    ),
    "mish": (lambda m, x: x * torch.tanh(functional.softplus(x)), IMAGE, ["mish"]),
    "weight normalization": (lambda m, x: functional.linear(x, (m.w / m.w.norm()).t()), ROWS, ["linear"]),
}

DECLINES = {
    "non-zero padding": (lambda m, x: functional.conv2d(functional.pad(x, (1, 1), value=2.0), m.k), IMAGE, 2),
    "mean over channels": (lambda m, x: x.mean(1), IMAGE, 1),
    "matmul of two activations": (lambda m, x: x @ x.transpose(-1, -2), IMAGE, 2),
    "something like hardswish": (lambda m, x: x * functional.relu6(x + 2.9) / 6, IMAGE, 4),
    "the product of two functions of different tensors": (lambda m, x: x[:1] * torch.sigmoid(x[1:]), IMAGE, 4),
}


@pytest.mark.parametrize("case", FIRES)
def test_gives_one_form_and_keeps_the_values(case: str) -> None:
    function, shape, expected = FIRES[case]
    model, x = Apply(function), 3 * randn(*shape)
    program = run_until("canonicalize", model, (x,))
    assert operators(program) == expected
    assert same_values(program, model, (x,))


@pytest.mark.parametrize("case", DECLINES)
def test_leaves_what_only_looks_alike(case: str) -> None:
    function, shape, count = DECLINES[case]
    model, x = Apply(function), randn(*shape)
    program = run_until("canonicalize", model, (x,))
    assert len(operators(program)) == count
    assert same_values(program, model, (x,), tolerance=0)


def test_says_why_a_rule_declines() -> None:
    program = run_until("canonicalize", Apply(DECLINES["mean over channels"][0]), (randn(*IMAGE),))
    assert [(rule, "averages dimensions (1,)" in reason) for rule, _, reason in program.ledger.declined] == [
        ("mean_to_pool", True)
    ]


def test_a_second_run_changes_nothing() -> None:
    class Everything(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 4, padding="same")
            self.drop = nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            a, b = self.drop(y * torch.sigmoid(y)).chunk(2, 1)
            return torch.cat([b, a], 1).mean((2, 3))

    program = run_until("canonicalize", randomize(Everything()), (randn(*IMAGE),))
    text = graph_text(program)
    assert matches_golden("canonicalize", program)
    assert not Canonicalize().run(program, Context())
    PassManager((Canonicalize(),)).run(program, Context())
    assert graph_text(program) == text
