"""The networks that are measured, with the same weights in every process and for every engine.

EfficientNet-Lite0 has its ImageNet weights. The others are random, but behave as trained networks
do: He initialisation, channels of different strength, and batch norm statistics taken from data.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from examples.efficientnet_lite0 import load_model as efficientnet_lite0
from examples.photographs import crops


class Logits(nn.Module):
    """A classifier of the transformers library as a plain tensor-to-tensor module."""

    def __init__(self, classifier: PreTrainedModel) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(pixel_values=x, return_dict=False)[0]


def _random(architecture: type[PreTrainedModel], config: PretrainedConfig) -> nn.Module:
    torch.manual_seed(0)
    config.num_labels = 1000
    model = Logits(architecture(config))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            module.weight.data *= torch.empty(module.out_channels, 1, 1, 1).uniform_(0.5, 1.5)
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.2)
        nn.init.normal_(norm.bias, 0.0, 0.2)
        norm.momentum = None  # a plain average over what follows
        norm.reset_running_stats()
    with torch.no_grad():
        model.train()(torch.cat(crops(16, seed=3)))
    return model.eval()


def _resnet(depths: list[int], layer_type: str, widths: list[int]) -> nn.Module:
    config = ResNetConfig(depths=depths, layer_type=layer_type, hidden_sizes=widths)
    return _random(ResNetForImageClassification, config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": lambda: _resnet([3, 4, 6, 3], "bottleneck", [256, 512, 1024, 2048]),
    "mobilenetv2": lambda: _random(MobileNetV2ForImageClassification, MobileNetV2Config(tf_padding=False)),
    "resnet18": lambda: _resnet([2, 2, 2, 2], "basic", [64, 128, 256, 512]),
    "efficientnet_lite0": efficientnet_lite0,
}


def multiply_accumulates(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of every convolution and linear layer for one input."""
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, (nn.Conv2d, nn.Linear))
        per_channel = output.numel() // module.weight.shape[0]
        total += per_channel * module.weight.numel()

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        model(example)
    for hook in hooks:
        hook.remove()
    return total
