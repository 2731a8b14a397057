"""Scores from confusion counts, held to scikit-learn."""

from __future__ import annotations

import pytest
import torch

from qcompile.evaluation.scores import Confusion


@pytest.mark.parametrize("classes", [2, 7, 1000])
def test_scores_are_those_of_scikit_learn(classes: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    g = torch.Generator().manual_seed(classes)
    labels = torch.randint(0, classes, (300,), generator=g)
    answers = torch.where(torch.rand(300, generator=g) < 0.6, labels, torch.randint(0, classes, (300,), generator=g))
    confusion = Confusion()
    for start in range(0, 300, 70):  # over batches, the last one smaller
        confusion.add(labels[start : start + 70], answers[start : start + 70], classes)
    scores = confusion.scores()
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        labels, answers, average="macro", zero_division=0.0
    )
    assert scores.accuracy == pytest.approx(metrics.accuracy_score(labels, answers))
    assert (scores.precision, scores.recall, scores.f1) == pytest.approx((precision, recall, f1))
    matrix = metrics.confusion_matrix(labels, answers, labels=range(classes))
    assert sum(count for *_, count in scores.confusion) == 300
    assert all(matrix[label, answer] == count for label, answer, count in scores.confusion)
    counts = [count for *_, count in scores.confusion]
    assert counts == sorted(counts, reverse=True)


def test_a_class_that_is_never_answered_counts() -> None:
    confusion = Confusion()
    confusion.add(torch.tensor([0, 0, 1]), torch.tensor([0, 2, 2]), 3)
    scores = confusion.scores()
    assert scores.accuracy == pytest.approx(1 / 3)
    assert scores.precision == pytest.approx((1 + 0 + 0) / 3)
    assert scores.recall == pytest.approx((1 / 2 + 0 + 0) / 3)
    assert scores.f1 == pytest.approx((2 / 3) / 3)
