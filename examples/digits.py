"""A labelled task that trains in seconds: the handwritten digits that scikit-learn ships, 8x8 pixels, 10 classes.

Shows what integers cost in accuracy, by bits of a weight, on digits that training has not seen:

    python -m examples.digits [--seeds 5]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import sklearn.datasets
import sklearn.model_selection
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import qcompile

Trained = TypeVar("Trained", bound=nn.Module)

HELD_OUT = 600  # of the 1,797 digits
CALIBRATION = 256
SETTINGS = {
    "int8": qcompile.QuantConfig(),
    "int8, best": qcompile.QuantConfig(preset="best"),
    "int4 weights": qcompile.QuantConfig(weight_bits=4),
    "int4 weights, best": qcompile.QuantConfig(preset="best", weight_bits=4),
    "int3 weights": qcompile.QuantConfig(weight_bits=3),
    "int3 weights, best": qcompile.QuantConfig(preset="best", weight_bits=3),
}


class Digits(NamedTuple):
    """Images (N, 1, 8, 8) in [0, 1] and labels (N,), to train with and held out."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


def load(seed: int = 0) -> Digits:
    """The digits, dealt out at random, each class in its proportion."""
    data = sklearn.datasets.load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    kept, held_out = sklearn.model_selection.train_test_split(
        range(len(labels)), test_size=HELD_OUT, stratify=data.target, random_state=seed
    )
    return Digits(images[kept], labels[kept], images[held_out], labels[held_out])


def network(seed: int = 0) -> nn.Module:
    """A convolutional network with batch norm, a depthwise layer and a residual connection."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        Residual(32), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


class Residual(nn.Module):
    """x + batch norm of a convolution of x, then relu."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.norm(self.convolution(x)))


def train(model: Trained, images: Tensor, labels: Tensor, epochs: int = 12, rate: float = 3e-3) -> Trained:
    """Fit `model` and return it in eval mode. The order of the samples follows from torch's seed."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    steps = epochs * -(-len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """The part of the images whose largest output is the label."""
    return float((model(images).argmax(1) == labels).double().mean())


def compile(model: nn.Module, images: Tensor, config: qcompile.QuantConfig) -> qcompile.CompiledModel:
    """All layers integer; see `inputs`."""
    return qcompile.compile(model, **inputs(images), config=config, strict=True)


def inputs(images: Tensor) -> dict[str, Any]:
    """How to capture the network for any batch, and calibrate it on the first `images`."""
    return {
        "example_inputs": images[:2],
        "calibration": images[:CALIBRATION].split(1),
        "dynamic_shapes": ({0: torch.export.Dim("batch", min=1, max=1024)},),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    table = Table("", *(f"seed {seed}" for seed in seeds), "mean", title=f"Accuracy on {HELD_OUT} held-out digits, %")
    rows: dict[str, list[float]] = {name: [] for name in ("float", *SETTINGS)}
    for seed in seeds:
        digits = load(seed)
        held_out = digits.held_out_images, digits.held_out_labels
        model = train(network(seed), digits.images, digits.labels)
        rows["float"].append(accuracy(model, *held_out))
        for name, config in SETTINGS.items():
            rows[name].append(accuracy(compile(model, digits.images, config), *held_out))
    for name, found in rows.items():
        table.add_row(name, *(f"{100 * part:.2f}" for part in (*found, sum(found) / len(found))))
    Console().print(table)


if __name__ == "__main__":
    main()
