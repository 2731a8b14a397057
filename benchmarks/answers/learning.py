"""Fine-tuning after quantization, and a new head on a quantized backbone (`examples/training.py`)."""

from __future__ import annotations

from typing import Any

import sklearn.linear_model
import torch
from torch import nn

import qcompile
from benchmarks.answers.jobs import Job
from benchmarks.figures import PER_CENT, POINTS, TEXT, Figures, mean, span, trainings
from examples import digits
from examples.digits import CALIBRATION
from examples.efficientnet_lite0 import load_model
from examples.training import Tuned, few_bits, new_head

BITS = (8, 4, 2)
SIZE = 96  # of the digits' images, enlarged for EfficientNet-Lite0
ENTERED = "ImageNet to digits"
OWN = "digits 0 to 4, to 5 to 9"


def jobs(options: Any) -> dict[str, Job]:
    tuned = {f"fine-tuned, seed {seed}": Job(fine_tuned, (seed,)) for seed in options.seeds}
    heads = {f"new head, seed {seed}": Job(new_head, (seed,)) for seed in options.seeds}
    return {ENTERED: Job(from_imagenet, (options.seeds,)), **tuned, **heads}


def fine_tuned(seed: int) -> dict[int, Tuned]:
    """Bits of a weight -> what fine-tuning wins."""
    return {bits: few_bits(seed, bits) for bits in BITS}


@torch.no_grad()
def from_imagenet(seeds: tuple[int, ...]) -> tuple[float, float]:
    """Accuracy on held-out digits of a linear classifier on EfficientNet-Lite0's features: (float, int8 backbone)."""
    backbone = load_model()
    backbone._fc = nn.Identity()
    calibration = _enlarged(digits.load(0).images[:CALIBRATION]).split(1)
    compiled = qcompile.compile(backbone, calibration=calibration, strict=True, threads=1)
    in_float = qcompile.compile(backbone, example_inputs=calibration[0], numerics="float32", threads=1)
    accuracy = [mean(_probe(model, seed) for seed in seeds) for model in (in_float, compiled)]
    return accuracy[0], accuracy[1]


def _enlarged(images: torch.Tensor) -> torch.Tensor:
    """White on black, from -1 to 1, as photographs are normalized."""
    large = nn.functional.interpolate(images, size=(SIZE, SIZE), mode="bilinear")
    return (2 * large - 1).expand(-1, 3, -1, -1)


def _probe(model: qcompile.CompiledModel, seed: int) -> float:
    data = digits.load(seed)
    seen, unseen = (
        torch.cat([model(x.contiguous()) for x in _enlarged(images).split(1)])
        for images in (data.images, data.held_out_images)
    )
    classifier = sklearn.linear_model.LogisticRegression(max_iter=1000).fit(seen.numpy(), data.labels.numpy())
    return float(classifier.score(unseen.numpy(), data.held_out_labels.numpy()))


def figures(found: dict[str, Any], options: Any) -> dict[str, Figures]:
    rows: list[list[Any]] = []
    for bits in BITS:
        parts = zip(*(found[f"fine-tuned, seed {seed}"][bits] for seed in options.seeds), strict=True)
        in_float, quantized, tuned = map(mean, parts)
        rows.append([bits, in_float, quantized, tuned, 100 * (tuned - quantized)])
    fine = dict.fromkeys(("float", "quantized after training", "fine-tuned"), PER_CENT)

    heads = list(zip(*(found[f"new head, seed {seed}"] for seed in options.seeds), strict=True))
    transfers = [[ENTERED, *found[ENTERED]], [OWN, mean(heads[0]), mean(heads[2])]]
    transfer = [[*row, 100 * (row[2] - row[1])] for row in transfers]
    backbones = {"float backbone": PER_CENT, "int8 backbone": PER_CENT, "points": POINTS}
    notes = [f"Digits: {trainings(options.seeds)}."]
    return {
        "fine_tuning": Figures({"bits of a weight": TEXT, **fine, "points won": POINTS}, rows, notes),
        "transfer": Figures({"from, to": TEXT, **backbones}, transfer, notes),
    }


def answer(figures: dict[str, Figures]) -> str:
    fine, transfer = figures["fine_tuning"], figures["transfer"]
    few, many = BITS[-1], BITS[0]
    changed = span(transfer.column("points"), POINTS)
    return (
        f"Under a new head, an int8 backbone in place of a float one changes the accuracy by {changed} points. "
        f"Fine-tuning changes that of a network with weights of {many} bits by {fine.at('points won', many):+.1f} "
        f"points, and that of one with {few} bits by {fine.at('points won', few):+.1f}: from "
        f"{fine.at('quantized after training', few):.1%} to {fine.at('fine-tuned', few):.1%}, where float has "
        f"{fine.at('float', few):.1%}."
    )
