"""The networks that are asked about, with what they are calibrated and judged on. Cached in each process."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.models import MODELS, samples
from examples import digits

DIGITS, LITE0, RESNET, MLP = "digits CNN", "EfficientNet-Lite0", "ResNet-18", "MLP"
NAMES = (DIGITS, LITE0, RESNET)
_KEYS = {LITE0: "efficientnet_lite0", RESNET: "resnet18", MLP: "mlp"}
CALIBRATION, HELD_OUT = 128, 120  # crops


class Network(NamedTuple):
    """A float model, and inputs of batch 1."""

    model: nn.Module
    calibration: list[Tensor]
    held_out: list[Tensor]


@cache
@torch.enable_grad()  # whoever asks for it may need none
def trained(seed: int) -> tuple[digits.Digits, nn.Module]:
    """The digits dealt out by `seed`, and the network that learned them."""
    data = digits.load(seed)
    return data, digits.train(digits.network(seed), data.images, data.labels)


@cache
def network(name: str) -> Network:
    if name == DIGITS:
        data, model = trained(0)
        return Network(model, list(data.images[: digits.CALIBRATION].split(1)), list(data.held_out_images.split(1)))
    key = _KEYS[name]
    return Network(
        MODELS[key](), list(samples(key, CALIBRATION, seed=1).split(1)), list(samples(key, HELD_OUT, seed=2).split(1))
    )


@cache
@torch.no_grad()
def float_answers(name: str) -> Tensor:
    """The logits of the held-out inputs in float."""
    chosen = network(name)
    return torch.cat([chosen.model(x) for x in chosen.held_out])
