"""A network of depthwise-separable blocks with relu, and the same network with channels of very uneven strength."""

from __future__ import annotations

import torch
from networks import conv_norm, images, settle
from torch import nn

SIZE = 24


def separable(seed: int = 0) -> nn.Module:
    """(N, 3, 24, 24) to (N, 10): convolutions, some depthwise or grouped, a leaky relu and a linear layer."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        conv_norm(3, 16, 3, 2, activation=nn.ReLU()),
        conv_norm(16, 16, 3, groups=16, activation=nn.ReLU()),
        conv_norm(16, 24, 1, activation=nn.LeakyReLU(0.1)),
        conv_norm(24, 24, 3, 2, groups=24, activation=nn.ReLU()),
        conv_norm(24, 48, 1, groups=2, activation=nn.ReLU()),
        conv_norm(48, 48, 3, groups=48, activation=nn.ReLU()),
        conv_norm(48, 64, 1, activation=nn.PReLU(64)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    return settle(model, images(16, SIZE, seed=3), seed)


def uneven(model: nn.Module, octaves: float = 4.0, seed: int = 0) -> nn.Module:
    """Multiply each channel behind a batch norm of `separable` by 2^u, u uniform in [-octaves, octaves], and divide
    what reads it by as much: the values at the end stay."""
    g = torch.Generator().manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for norm, reader in zip(norms, layers[1:], strict=True):
        factors = 2 ** ((2 * torch.rand(norm.num_features, generator=g) - 1) * octaves)
        norm.weight.data *= factors
        norm.bias.data *= factors
        groups = getattr(reader, "groups", 1)
        for row, weight in enumerate(reader.weight.data):
            first = row // (len(reader.weight) // groups) * weight.shape[0]
            weight /= factors[first : first + weight.shape[0]].reshape(-1, *[1] * (weight.dim() - 1))
    return model
