"""Training with quantization on scikit-learn's handwritten digits (bundled with it, 8 x 8 pixels): what it wins.

Prints, for three seeds, the accuracy on held-out digits of
- a depthwise separable network in float, with weights of 2 bits as quantized after training, and fine-tuned;
- a network trained on the digits 0 to 4, given a new head for 5 to 9, which alone is trained: the int8 backbone stays
  as it is.

    python -m examples.training
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import qcompile
from examples.digits import accuracy

DYNAMIC = ({0: torch.export.Dim("batch", max=2048)},)
TRAINING = 1200  # digits; the other 597 are held out


def digits() -> tuple[Tensor, Tensor]:
    """All images, (1797, 1, 8, 8) from 0 to 1, and labels, in a fixed random order."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    return images[order], torch.tensor(bunch.target)[order]


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


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, seed: int, rate: float = 3e-3) -> None:
    """Adam on cross entropy, batches of 64."""
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=g).split(64):
            loss = cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def few_bits(seed: int, weight_bits: int = 2) -> tuple[float, float, float]:
    """Held-out accuracy in float, quantized after training, and fine-tuned, the last two as integer programs."""
    torch.manual_seed(seed)
    images, labels = digits()
    held_out = images[TRAINING:], labels[TRAINING:]
    images, labels = images[:TRAINING], labels[:TRAINING]
    model = separable_network()
    train(model, images, labels, 12, seed)
    model.eval()
    config = qcompile.QuantConfig(weight_bits=weight_bits)
    trainable = qcompile.prepare_qat(model, calibration=images.split(64), dynamic_shapes=DYNAMIC, config=config)
    after_training = qcompile.quantize(trainable)
    train(trainable, images, labels, 10, seed)
    fine_tuned = qcompile.quantize(trainable)
    found = [accuracy(m, *held_out) for m in (model, after_training, fine_tuned)]
    return found[0], found[1], found[2]


def new_head(seed: int) -> tuple[float, float]:
    """Held-out accuracy on the digits 5 to 9, before and after the new head is trained on the int8 backbone."""
    torch.manual_seed(seed)
    images, labels = digits()
    old, new = labels < 5, labels >= 5
    old[TRAINING:] = False
    model = separable_network(5)
    train(model, images[old], labels[old], 12, seed)
    model.eval().requires_grad_(False)
    model[-1] = nn.Linear(32, 5)  # trainable, as new modules are
    images, labels = images[new], labels[new] - 5
    cut = 2 * len(images) // 3
    trainable = qcompile.prepare_qat(model, calibration=images[:cut].split(64), dynamic_shapes=DYNAMIC)
    held_out = images[cut:], labels[cut:]
    before = accuracy(qcompile.quantize(trainable), *held_out)
    train(trainable, images[:cut], labels[:cut], 40, seed, 1e-2)
    return before, accuracy(qcompile.quantize(trainable), *held_out)


def main() -> None:
    table = Table("seed", "float", "2-bit weights", "fine-tuned", "new head, untrained", "new head, trained")
    for seed in range(3):
        table.add_row(str(seed), *(f"{100 * value:.1f}%" for value in (*few_bits(seed), *new_head(seed))))
    Console().print(table)


if __name__ == "__main__":
    main()
