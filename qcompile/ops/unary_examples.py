"""Float modules for the tests of `lookup`: one per activation, and arithmetic with constants."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from qcompile.ops.row import Example

_MODULES: tuple[Callable[[], nn.Module], ...] = (
    nn.Sigmoid,
    nn.Tanh,
    nn.SiLU,
    nn.GELU,
    lambda: nn.GELU("tanh"),
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.ELU,
    nn.LeakyReLU,
    nn.Mish,
    nn.Softplus,
    nn.ReLU,
    nn.ReLU6,
    nn.Hardtanh,
    nn.SELU,
    nn.LogSigmoid,
)

_FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x.clamp(min=-0.3),
    lambda x: x.clamp(-0.5, 0.7),
    torch.exp,
    torch.abs,
    torch.neg,
    lambda x: x + 3,
    lambda x: 1 - x,
    lambda x: x * -0.7,
    lambda x: x / 3,
    lambda x: x**2,
    lambda x: torch.sqrt(x + 5),
)


class _Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class _ChannelScale(nn.Module):
    """A scale per channel, as in layer scale (Touvron et al., "Going deeper with image transformers")."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def examples(g: torch.Generator) -> Iterator[Example]:
    """Each example has one operator that the `lookup` row takes (two in sqrt(x + 5))."""
    x = 1.5 * torch.randn(2, 5, 6, 7, generator=g)
    for make in _MODULES:
        yield Example(make(), (x,))
    for function in _FUNCTIONS:
        yield Example(_Function(function), (x,))
    prelu = nn.PReLU(5)
    with torch.no_grad():
        prelu.weight.copy_(torch.rand(5, generator=g))
    yield Example(prelu, (x,))
    yield Example(nn.PReLU(), (x[:, :, 0, 0].clone(),))
    yield Example(_ChannelScale(torch.randn(5, 1, 1, generator=g)), (x,))
