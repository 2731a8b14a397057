"""What the tests of the passes share: running passes, comparing graphs with golden files, measuring noise.

Set QCOMPILE_UPDATE_GOLDEN=1 to rewrite the golden files from the graphs as they are now.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.capture import capture
from qcompile.config import QuantConfig
from qcompile.errors import QcompileError
from qcompile.ir import Program
from qcompile.manager import PassManager
from qcompile.passes import Context, Pass, default_pipeline
from qcompile.text import graph_text

GOLDEN = Path(__file__).parent / "passes" / "golden"


def matches_golden(name: str, program: Program) -> bool:
    """Whether the graph's text is the golden file's; writes the file when asked to."""
    path, text = GOLDEN / f"{name}.txt", graph_text(program)
    if os.environ.get("QCOMPILE_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()
    return True


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = randn(2, 4)


def refusal(model: Any, calibration: Any = (X,), **options: Any) -> QcompileError:
    """The error that quantizing `model` ends with; it always has a remedy."""
    with pytest.raises(QcompileError) as caught:
        qcompile.quantize(model, calibration=calibration, **options)
    assert caught.value.remedy
    return caught.value


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights and batch norm statistics from one seed, in eval mode."""
    g = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 4
        parameter.data = torch.randn(parameter.shape, generator=g) * (1.5 / fan_in) ** 0.5
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean = torch.randn(module.num_features, generator=g) * 0.3
            module.running_var = torch.rand(module.num_features, generator=g) + 0.5
            if module.affine:
                module.weight.data = torch.rand(module.num_features, generator=g) + 0.5
    return model.eval()


def passes_until(name: str) -> tuple[Pass, ...]:
    """The default pipeline up to and including the pass called `name`."""
    passes = tuple(default_pipeline())
    return passes[: [p.name for p in passes].index(name) + 1]


def run_until(
    name: str, model: nn.Module, inputs: tuple[Tensor, ...], config: QuantConfig | None = None, **options: Any
) -> Program:
    """Capture `model` and run the default pipeline up to `name`, calibrating on the inputs."""
    program = capture(model, inputs, options.pop("dynamic_shapes", None))
    context = Context(config or QuantConfig(), options.pop("calibration", [inputs]), **options)
    PassManager(passes_until(name)).run(program, context)
    return program


def operators(program: Program) -> list[str]:
    """The ATen and integer operators of the graph, in order, without overload names."""
    return [
        str(n.target).split(".")[1] for n in program.graph.nodes if n.op == "call_function" and "." in str(n.target)
    ]


def sqnr(expected: Tensor, actual: Tensor) -> float:
    """Signal to quantization noise ratio, dB."""
    noise = (expected - actual).square().sum().clamp(min=1e-30)
    return float(10 * torch.log10(expected.square().sum() / noise))


def same_values(program: Program, model: nn.Module, inputs: Iterable[Tensor], tolerance: float = 1e-5) -> bool:
    """Whether the float graph still computes what the model does."""
    inputs = tuple(inputs)
    with torch.no_grad():
        expected = model(*inputs)
    expected = expected if isinstance(expected, (tuple, list)) else (expected,)
    for want, got in zip(expected, program(*inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    return True


class Block(nn.Module):
    """A residual block: conv, bn, relu, conv, bn, add, relu."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(self.first(x)) + x)


class TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


def network(seed: int = 0) -> nn.Module:
    """A small residual classifier: (N, 3, 10, 10) to (N, 5)."""
    return randomize(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU6(),
            Block(16),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 16, 3, groups=16, padding=1),
            nn.Hardswish(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 5),
        ),
        seed,
    )


def two_linears() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5)).eval()


def images(count: int = 8, batch: int = 1) -> list[Tensor]:
    return [randn(batch, 3, 10, 10, seed=i) for i in range(count)]
