"""fold_batchnorm: every batch norm goes into weights, and the values stay."""

from __future__ import annotations

import pytest
import torch
from passing import matches_golden, operators, randn, randomize, run_until, same_values
from torch import Tensor, nn

from qcompile.passes import Context
from qcompile.passes.fold_batchnorm import FoldBatchnorm

FOLDS = {
    "conv2d": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), (2, 3, 7, 7), ["conv2d"]),
    "conv2d without bias": (nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)), (2, 3, 7, 7), ["conv2d"]),
    "grouped": (nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8, affine=False)), (1, 4, 7, 7), ["conv2d"]),
    "conv1d": (nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8, eps=0.1)), (2, 3, 9), ["conv1d"]),
    "linear": (nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)), (5, 6), ["linear"]),
    "after a relu": (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), (2, 3, 7, 7), ["relu", "conv2d"]),
    "over a sequence": (nn.BatchNorm1d(6), (2, 6, 9), ["conv1d"]),
    "over features": (nn.BatchNorm1d(6), (4, 6), ["unsqueeze", "conv1d", "squeeze"]),
}


@pytest.mark.parametrize("case", FOLDS)
def test_folds_and_keeps_the_values(case: str) -> None:
    model, shape, expected = FOLDS[case]
    randomize(model)
    program = run_until("fold_batchnorm", model, (randn(*shape),))
    assert operators(program) == expected
    assert same_values(program, model, (randn(*shape, seed=1),))


class SharedConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


def test_a_convolution_with_other_users_keeps_its_weights() -> None:
    model = randomize(SharedConvolution())
    program = run_until("fold_batchnorm", model, (randn(1, 3, 5, 5),))
    assert operators(program) == ["conv2d", "conv2d", "add"]
    assert same_values(program, model, (randn(1, 3, 5, 5, seed=1),))
    ((rule, _, reason),) = program.ledger.declined
    assert (rule, "other users" in reason) == ("fold_batchnorm", True)


def test_folds_in_float64() -> None:
    """A variance far below eps must not cost the digits of float32 twice."""
    norm = nn.BatchNorm2d(4)
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), norm))
    norm.running_var = torch.tensor([1e-9, 1e-6, 1.0, 1e6])
    assert same_values(
        run_until("fold_batchnorm", model, (randn(1, 3, 6, 6),)), model, (randn(1, 3, 6, 6, seed=1),), 1e-4
    )


def test_a_second_run_changes_nothing() -> None:
    program = run_until("fold_batchnorm", randomize(SharedConvolution()), (randn(1, 3, 5, 5),))
    assert matches_golden("fold_batchnorm", program)
    assert not FoldBatchnorm().run(program, Context())
