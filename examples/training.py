"""Training with quantization on scikit-learn's handwritten digits (see `examples/digits.py`): what it wins.

Prints, for three seeds, the accuracy on held-out digits of
- a depthwise separable network in float, with weights of 2 bits as quantized after training, and fine-tuned;
- a network trained on the digits 0 to 4, given a new head for 5 to 9, which alone is trained: on features in float,
  and on those of the int8 backbone, which stays as it is.

    python -m examples.training
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import qcompile
from examples import digits
from examples.digits import accuracy, train

OLD = 5  # digits below it are known before the new head is trained


def conv_norm(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(after), nn.ReLU6()]


def separable_network(classes: int = 10) -> nn.Sequential:
    """Depthwise and pointwise convolutions in turns, with batch norm and relu6."""
    return nn.Sequential(
        *conv_norm(1, 16, 3),
        *conv_norm(16, 16, 3, 2, groups=16),
        *conv_norm(16, 32, 1),
        *conv_norm(32, 32, 3, groups=32),
        *conv_norm(32, 32, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, classes),
    )


class Tuned(NamedTuple):
    """Accuracy on held-out digits."""

    in_float: float
    quantized: float
    fine_tuned: float


@cache
def pretrained(seed: int) -> nn.Sequential:
    """A network that learned all digits in float."""
    data = digits.load(seed)
    torch.manual_seed(seed)
    return train(separable_network(), data.images, data.labels)


def few_bits(seed: int, weight_bits: int = 2) -> Tuned:
    """A trained network, its weights quantized, and these trained on."""
    data = digits.load(seed)
    held_out = data.held_out_images, data.held_out_labels
    model = pretrained(seed)
    torch.manual_seed(seed)
    config = qcompile.QuantConfig(weight_bits=weight_bits)
    trainable = qcompile.prepare_qat(model, **digits.inputs(data.images), config=config)
    after_training = qcompile.quantize(trainable)
    train(trainable, data.images, data.labels, epochs=10)
    return Tuned(*(accuracy(m, *held_out) for m in (model, after_training, qcompile.quantize(trainable))))


class NewHead(NamedTuple):
    """Accuracy on held-out new digits.

    Attributes:
        in_float: of a head that was trained on float features.
        untrained, trained: of a head on the int8 backbone, before and after.
    """

    in_float: float
    untrained: float
    trained: float


def new_head(seed: int) -> NewHead:
    """A backbone that learned the old digits, frozen; in float and as int8."""
    data = digits.load(seed)
    old, new, held_out = data.labels < OLD, data.labels >= OLD, data.held_out_labels >= OLD
    torch.manual_seed(seed)
    model = train(separable_network(OLD), data.images[old], data.labels[old])
    backbone, head = model[:-1].requires_grad_(False), nn.Linear(32, OLD)
    images, labels = data.images[new], data.labels[new] - OLD
    judged = data.held_out_images[held_out], data.held_out_labels[held_out] - OLD

    model[-1] = head
    trainable = qcompile.prepare_qat(model, **digits.inputs(images))
    untrained = accuracy(qcompile.quantize(trainable), *judged)
    train(trainable, images, labels, epochs=40, rate=1e-2)
    trained = accuracy(qcompile.quantize(trainable), *judged)

    train(head, backbone(images), labels, epochs=40, rate=1e-2)
    return NewHead(accuracy(nn.Sequential(backbone, head), *judged), untrained, trained)


def main() -> None:
    table = Table("seed", "float", "2-bit weights", "fine-tuned", "new head in float", "on int8, untrained", "trained")
    for seed in range(3):
        table.add_row(str(seed), *(f"{100 * value:.1f}%" for value in (*few_bits(seed), *new_head(seed))))
    Console().print(table)


if __name__ == "__main__":
    main()
