"""The networks that are measured and their inputs, the same in every process and for every engine.

EfficientNet-Lite0 has its ImageNet weights. The others are random, but behave as trained networks
do: He initialisation, channels of different strength, and batch norm statistics taken from data. The
MLP is 784-1024-1024-10, the size that is used for 28 x 28 grey images, and sees the same photographs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from examples.efficientnet_lite0 import load_model as efficientnet_lite0
from examples.photographs import crops

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


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
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(depths=depths, layer_type=layer_type, hidden_sizes=widths)
    return _random(ResNetForImageClassification, config)


def _mobilenetv2() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return _random(MobileNetV2ForImageClassification, MobileNetV2Config(tf_padding=False))


def _mlp() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            layer.weight.data *= torch.empty(layer.out_features, 1).uniform_(0.5, 1.5)
            nn.init.normal_(layer.bias, 0.0, 0.2)
    return model.eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": lambda: _resnet([3, 4, 6, 3], "bottleneck", [256, 512, 1024, 2048]),
    "mobilenetv2": _mobilenetv2,
    "resnet18": lambda: _resnet([2, 2, 2, 2], "basic", [64, 128, 256, 512]),
    "efficientnet_lite0": efficientnet_lite0,
    "mlp": _mlp,
}


def samples(model: str, count: int, seed: int) -> Tensor:
    """`count` inputs of `model` in a batch: crops of photographs, for the MLP small and grey."""
    x = torch.cat(crops(count, seed))
    return avg_pool2d(x.mean(1), 8).flatten(1) if model == "mlp" else x


def multiply_accumulates(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of every convolution and linear layer for `example`."""
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
