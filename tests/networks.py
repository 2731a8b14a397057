"""Whole networks for tests: the block structures of well-known classifiers, written out in plain PyTorch.

EfficientNet-Lite0 has its ImageNet weights. The others are random but behave as trained networks do:
He initialisation, channels of different strength, and batch norm statistics taken from data. `width`
scales the channels; at its default each is as published.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d

from examples.efficientnet_lite0 import load_model as efficientnet_lite0


def images(count: int, size: int, seed: int) -> Tensor:
    """(count, 3, size, size): smooth shapes under noise."""
    g = torch.Generator().manual_seed(seed)
    shapes = interpolate(torch.randn(count, 3, 5, 5, generator=g), size=(size, size), mode="bicubic")
    return shapes + 0.3 * torch.randn(count, 3, size, size, generator=g)


def settle(model: nn.Module, batch: Tensor, seed: int = 0) -> nn.Module:
    """`model` in eval mode with random weights, under which `batch` keeps its variance from layer to layer."""
    g = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            shape = module.weight.shape
            strength = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=g) + 0.5
            module.weight.data = torch.randn(shape, generator=g) * strength * (2.0 / module.weight[0].numel()) ** 0.5
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data = torch.rand(module.num_features, generator=g) * 0.7 + 0.5
            module.bias.data = torch.randn(module.num_features, generator=g) * 0.2
            module.momentum = None  # a plain average over what follows
            module.reset_running_stats()
    with torch.no_grad():
        model.train()(batch)
    return model.eval()


def conv_norm(
    before: int,
    after: int,
    kernel: int | tuple[int, int],
    stride: int = 1,
    groups: int = 1,
    activation: nn.Module | None = None,
) -> nn.Sequential:
    """Convolution with the padding that keeps the size at stride 1, batch norm, activation."""
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (kernel[0] // 2, kernel[1] // 2)
    conv = nn.Conv2d(before, after, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after), *([activation] if activation else []))


class Residual(nn.Module):
    """relu(body(x) + shortcut(x)), the shortcut a convolution where the shape changes."""

    def __init__(self, body: nn.Sequential, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = body
        same = before == after and stride == 1
        self.shortcut = nn.Identity() if same else conv_norm(before, after, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def basic(before: int, width: int, stride: int) -> Residual:
    body = nn.Sequential(conv_norm(before, width, 3, stride, activation=nn.ReLU()), conv_norm(width, width, 3))
    return Residual(body, before, width, stride)


def bottleneck(before: int, width: int, stride: int) -> Residual:
    body = nn.Sequential(
        conv_norm(before, width, 1, activation=nn.ReLU()),
        conv_norm(width, width, 3, stride, activation=nn.ReLU()),
        conv_norm(width, 4 * width, 1),
    )
    return Residual(body, before, 4 * width, stride)


def _resnet(
    block: Callable[[int, int, int], Residual], expansion: int, depths: tuple[int, ...], width: int
) -> nn.Module:
    """He et al., Deep Residual Learning for Image Recognition (2016), table 1; the stride on the 3x3."""
    layers: list[nn.Module] = [conv_norm(3, width, 7, 2, activation=nn.ReLU()), nn.MaxPool2d(3, 2, 1)]
    before = width
    for stage, depth in enumerate(depths):
        inner = width << stage
        for i in range(depth):
            layers.append(block(before, inner, 2 if stage and i == 0 else 1))
            before = inner * expansion
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 1000))


def resnet18(width: int = 64) -> nn.Module:
    return _resnet(basic, 1, (2, 2, 2, 2), width)


def resnet50(width: int = 64) -> nn.Module:
    return _resnet(bottleneck, 4, (3, 4, 6, 3), width)


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1 without an activation; a shortcut where the shape stays."""

    def __init__(self, before: int, after: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = before * expansion
        self.body = nn.Sequential(
            *([conv_norm(before, inner, 1, activation=nn.ReLU6())] if expansion > 1 else []),
            conv_norm(inner, inner, 3, stride, groups=inner, activation=nn.ReLU6()),
            conv_norm(inner, after, 1),
        )
        self.same = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.same else y


def mobilenetv2(width: float = 1.0) -> nn.Module:
    """Sandler et al., MobileNetV2 (2018), table 2."""

    def scaled(channels: int) -> int:
        return max(8, int(channels * width + 4) // 8 * 8)

    before = scaled(32)
    layers: list[nn.Module] = [conv_norm(3, before, 3, 2, activation=nn.ReLU6())]
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expansion, channels, depth, stride in stages:
        for i in range(depth):
            layers.append(InvertedResidual(before, scaled(channels), stride if i == 0 else 1, expansion))
            before = scaled(channels)
    last = max(scaled(1280), before)
    layers += [conv_norm(before, last, 1, activation=nn.ReLU6()), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Dropout(0.2), nn.Linear(last, 1000))


def vgg(width: int = 64) -> nn.Module:
    """Simonyan and Zisserman (2015), configuration A with fewer hidden units: no batch norm, biases throughout."""
    layers: list[nn.Module] = []
    before = 3
    for stage, depth in enumerate((1, 1, 2, 2)):
        for _ in range(depth):
            layers += [nn.Conv2d(before, width << stage, 3, padding=1), nn.ReLU(inplace=True)]
            before = width << stage
        layers.append(nn.MaxPool2d(2))
    head = [nn.Flatten(), nn.Linear(before * 16, 256), nn.ReLU(), nn.Dropout(), nn.Linear(256, 1000)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), *head)


class Branches(nn.Module):
    """What each branch makes of the same input, side by side."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Pool(nn.Module):
    def __init__(self, average: bool) -> None:
        super().__init__()
        self.average = average

    def forward(self, x: Tensor) -> Tensor:
        return avg_pool2d(x, 3, 1, 1) if self.average else max_pool2d(x, 3, 2)


def inception(width: int = 64) -> nn.Module:
    """Szegedy et al., Rethinking the Inception Architecture (2016): the blocks of figures 5, 10 and 6, one
    or two of each."""
    w = width

    def block(before: int, after: int, *kernels: int | tuple[int, int], valid: bool = False) -> nn.Sequential:
        """1x1 and then `kernels`; `valid`: the last one has stride 2 and no padding."""
        layers = [conv_norm(before, after, 1, activation=nn.ReLU())]
        layers += [conv_norm(after, after, kernel, activation=nn.ReLU()) for kernel in kernels]
        if valid:
            layers[-1][0] = nn.Conv2d(after, after, 3, 2, bias=False)
        return nn.Sequential(*layers)

    def pooled(before: int, after: int) -> nn.Sequential:
        return nn.Sequential(Pool(average=True), conv_norm(before, after, 1, activation=nn.ReLU()))

    def square(before: int) -> Branches:
        return Branches(block(before, w), block(before, w, 5), block(before, w, 3, 3), pooled(before, w // 2))

    def asymmetric(before: int) -> Branches:
        long = block(before, w, (7, 1), (1, 7), (7, 1), (1, 7))
        return Branches(block(before, w), block(before, w, (1, 7), (7, 1)), long, pooled(before, w))

    stem = [nn.Conv2d(3, w // 2, 3, 2), nn.ReLU(), conv_norm(w // 2, w, 3, activation=nn.ReLU()), nn.MaxPool2d(3, 2)]
    reduce = Branches(block(7 * w // 2, w, 3, valid=True), block(7 * w // 2, w, 3, 3, valid=True), Pool(average=False))
    middle = [square(w), square(7 * w // 2), reduce, asymmetric(11 * w // 2), asymmetric(4 * w)]
    return nn.Sequential(*stem, *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(4 * w, 1000))


@dataclass(frozen=True)
class Network:
    """A network and the side of the images it is given."""

    name: str
    build: Callable[[], nn.Module]
    size: int
    pretrained: bool = False

    def model(self) -> nn.Module:
        """In eval mode, with the same weights at every call."""
        model = self.build()
        return model.eval() if self.pretrained else settle(model, images(8, self.size, seed=3))

    def calibration(self) -> list[Tensor]:
        return list(images(4, self.size, seed=4).split(1))

    def __str__(self) -> str:
        return f"{self.name}-{self.size}"


REDUCED = (
    Network("resnet18", lambda: resnet18(16), 64),
    Network("resnet50", lambda: resnet50(8), 64),
    Network("mobilenetv2", lambda: mobilenetv2(0.35), 96),
    Network("vgg", lambda: vgg(16), 64),
    Network("inception", lambda: inception(24), 75),
    Network("efficientnet_lite0", efficientnet_lite0, 64, pretrained=True),
)
FULL = (
    Network("resnet50", resnet50, 224),
    Network("mobilenetv2", mobilenetv2, 224),
    Network("efficientnet_lite0", efficientnet_lite0, 224, pretrained=True),
)
