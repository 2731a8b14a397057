"""Classification: scores from confusion counts, and the checks that labels need.

Class scores lie along dimension 1, as torch.nn.functional.cross_entropy has them: (N, C), or (N, C, height, width)
with a label for each pixel. The answer is the class with the largest score.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.errors import InputError


@dataclass(frozen=True)
class Scores:
    """How well labels are met.

    Attributes:
        accuracy: the part of the answers that are the label.
        precision, recall, f1: the mean over the classes that occur (as label or as answer). A class that is never
            answered has precision 0, one that is never a label recall 0.
        confusion: (label, answer, how often), the most frequent first; what never occurs is left out.
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    confusion: tuple[tuple[int, int, int], ...]


class Confusion:
    """Counts of (label, answer) over batches."""

    def __init__(self) -> None:
        self._counts = Counter[tuple[int, int]]()

    def add(self, labels: Tensor, answers: Tensor, classes: int) -> None:
        """Equal shapes, whole numbers from 0 to `classes` - 1."""
        pairs, counts = torch.unique(labels.long().flatten() * classes + answers.flatten(), return_counts=True)
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            self._counts[divmod(pair, classes)] += count

    def scores(self) -> Scores:
        actual, answered, right = Counter[int](), Counter[int](), Counter[int]()
        for (label, answer), count in self._counts.items():
            actual[label] += count
            answered[answer] += count
            right[label] += count if label == answer else 0
        classes = actual.keys() | answered.keys()

        def mean(numerator: Counter[int], *denominators: Counter[int]) -> float:
            parts = [
                len(denominators) * numerator[c] / total if (total := sum(d[c] for d in denominators)) else 0.0
                for c in classes
            ]
            return sum(parts) / len(parts)

        ordered = sorted(((*pair, count) for pair, count in self._counts.items()), key=lambda row: (-row[2], row))
        return Scores(
            accuracy=sum(right.values()) / sum(actual.values()),
            precision=mean(right, answered),
            recall=mean(right, actual),
            f1=mean(right, actual, answered),
            confusion=tuple(ordered),
        )


def has_classes(output: Tensor) -> bool:
    """Whether there are scores of at least two classes along dimension 1."""
    return output.is_floating_point() and output.dim() >= 2 and output.shape[1] > 1


def check_labels(labels: Tensor, output: Tensor, name: str, place: str) -> None:
    """Raise InputError unless `labels` are class indices of the shape and range that `output` has scores for."""
    if not has_classes(output):
        raise InputError(
            f"the output {name!r} has shape {tuple(output.shape)}, which holds no scores of classes along dimension 1",
            where=place,
            remedy="leave labels out, or name the output that they are for: labels='name'",
        )
    expected = (output.shape[0], *output.shape[2:])
    if tuple(labels.shape) != expected:
        one_hot = tuple(labels.shape) == tuple(output.shape)
        raise InputError(
            f"the labels have shape {tuple(labels.shape)}, not {expected}",
            where=place,
            remedy="give class indices: labels.argmax(1)" if one_hot else "give one class index per answer",
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool:
        raise InputError(
            f"the labels are {labels.dtype}", where=place, remedy="give whole numbers: labels.long(), if they are"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= output.shape[1]:
        raise InputError(
            f"the labels go from {low} to {high}, and the output {name!r} has {output.shape[1]} classes",
            where=place,
            remedy=f"give class indices from 0 to {output.shape[1] - 1}",
        )
