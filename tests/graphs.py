"""Random float networks: any operator on any value made so far, with every value free to be read again.

A graph is drawn step by step; each draw knows the shapes so far, so every graph is valid. Dimension 0 of
every value is the batch, which may be dynamic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from hypothesis import strategies as st
from passing import randomize
from torch import Tensor, nn
from torch.nn import functional as F

LARGEST = 6000  # elements of a value
Draw = st.DrawFn


class Apply(nn.Module):
    """`function(*operands, *args, **kwargs)` as a module."""

    def __init__(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.function, self.args, self.kwargs = function, args, kwargs

    def forward(self, *operands: Tensor) -> Tensor:
        return self.function(*operands, *self.args, **self.kwargs)

    def extra_repr(self) -> str:
        return f"{self.function.__name__}, {self.args}, {self.kwargs}"


class Cat(nn.Module):
    """Several values along dimension 1."""

    def forward(self, *operands: Tensor) -> Tensor:
        return torch.cat(operands, 1)


class Shuffle(nn.Module):
    """The channels of ShuffleNet: `groups` hands of cards become one pack."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)


@dataclass(frozen=True)
class Step:
    """One operator and the values that it reads, by number: the inputs come first."""

    module: nn.Module
    operands: tuple[int, ...]


class Graph(nn.Module):
    """The network of `steps`; returns the values `outputs`."""

    def __init__(self, inputs: Sequence[tuple[int, ...]], dynamic: bool) -> None:
        super().__init__()
        self.inputs, self.dynamic = list(inputs), dynamic
        self.steps: list[Step] = []
        self.operators = nn.ModuleList()
        self.outputs: tuple[int, ...] = ()

    def add(self, module: nn.Module, *operands: int) -> int:
        """The number of the new value."""
        self.steps.append(Step(module, operands))
        self.operators.append(module)
        return len(self.inputs) + len(self.steps) - 1

    def values(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        values = list(inputs)
        for step in self.steps:
            values.append(step.module(*(values[i] for i in step.operands)))
        return values

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        values = self.values(inputs)
        return tuple(values[i] for i in self.outputs)

    def sample(self, seed: int, batch: int | None = None, spread: float = 1.0) -> tuple[Tensor, ...]:
        """Random inputs, `spread` times as wide as normal ones."""
        g = torch.Generator().manual_seed(seed)
        shapes = [(batch or shape[0], *shape[1:]) for shape in self.inputs]
        return tuple(torch.randn(shape, generator=g) * spread for shape in shapes)

    def __repr__(self) -> str:
        first = len(self.inputs)
        lines = [f"  {first + i} = {s.module}{s.operands}" for i, s in enumerate(self.steps)]
        kind = "dynamic batch, " if self.dynamic else ""
        return "\n".join([f"Graph({kind}{self.inputs} ->", *lines, f"  outputs {self.outputs})"])


Maker = Callable[[Draw, tuple[int, ...]], nn.Module]


def _windows(draw: Draw, sizes: tuple[int, ...], pool: bool = False) -> dict[str, tuple[int, ...]]:
    """Kernel, stride, padding and dilation under which something is left of an image of `sizes`."""
    axes = []
    for size in sizes:
        dilation = draw(st.integers(1, 2))
        padding = draw(st.integers(0, 2))
        kernel = draw(st.integers(1, min(5, (size + (0 if pool else 2 * padding) - 1) // dilation + 1)))
        padding = min(padding, kernel // 2) if pool else padding
        axes.append((kernel, draw(st.integers(1, 3)), padding, dilation))
    return dict(zip(("kernel_size", "stride", "padding", "dilation"), zip(*axes, strict=True), strict=True))


def _convolution(draw: Draw, shape: tuple[int, ...]) -> nn.Module:
    channels, sizes = shape[1], shape[2:]
    groups = draw(st.sampled_from([1, 1, *(g for g in range(2, channels + 1) if channels % g == 0)]))
    after = groups * draw(st.integers(1, max(1, 40 // groups)))
    conv = nn.Conv2d if len(sizes) == 2 else nn.Conv1d
    return conv(channels, after, groups=groups, bias=draw(st.booleans()), **_windows(draw, sizes))  # type: ignore[arg-type]


def _depthwise(draw: Draw, shape: tuple[int, ...]) -> nn.Module:
    conv = nn.Conv2d if len(shape) == 4 else nn.Conv1d
    return conv(shape[1], shape[1], groups=shape[1], **_windows(draw, shape[2:]))  # type: ignore[arg-type]


def _same(draw: Draw, shape: tuple[int, ...]) -> nn.Module:
    """A convolution whose output has the shape of its input: what residual networks add to it."""
    kernel = draw(st.sampled_from([1, 3, 5]))
    return nn.Conv2d(shape[1], shape[1], kernel, padding=kernel // 2)


def _max_pool(draw: Draw, shape: tuple[int, ...]) -> nn.Module:
    return nn.MaxPool2d(**_windows(draw, shape[2:], pool=True), ceil_mode=draw(st.booleans()))  # type: ignore[arg-type]


def _average_pool(draw: Draw, shape: tuple[int, ...]) -> nn.Module:
    window = _windows(draw, shape[2:], pool=True)
    del window["dilation"]
    return nn.AvgPool2d(**window, ceil_mode=draw(st.booleans()), count_include_pad=draw(st.booleans()))  # type: ignore[arg-type]


def _adaptive(draw: Draw, shape: tuple[int, ...]) -> nn.Module:
    return nn.AdaptiveAvgPool2d((draw(st.integers(1, 4)), draw(st.integers(1, 4))))


def _mean(draw: Draw, shape: tuple[int, ...]) -> nn.Module:
    return Apply(torch.mean, dim=(2, 3), keepdim=draw(st.booleans()))


def _batch_norm(draw: Draw, shape: tuple[int, ...]) -> nn.Module:
    return nn.BatchNorm2d(shape[1])


def _activation(draw: Draw, shape: tuple[int, ...]) -> nn.Module:
    clamps = (nn.ReLU(), nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.5, 0.7), Apply(torch.clamp, min=0.2))
    curves = (nn.Hardswish(), nn.SiLU(), nn.GELU(), nn.Sigmoid(), nn.Tanh(), nn.LeakyReLU(0.1), nn.ELU(), nn.Softplus())
    constants = (nn.PReLU(shape[1]), Apply(torch.mul, -2.5), Apply(torch.add, 0.3))
    return draw(st.sampled_from([*clamps, *curves, *constants]))


def _linear(draw: Draw, shape: tuple[int, ...]) -> nn.Module:
    return nn.Linear(shape[-1], draw(st.integers(1, 40)), bias=draw(st.booleans()))


def _flatten(draw: Draw, shape: tuple[int, ...]) -> nn.Module:
    return nn.Flatten(draw(st.integers(1, len(shape) - 1)))


def _permute(draw: Draw, shape: tuple[int, ...]) -> nn.Module:
    return Apply(torch.permute, (0, *draw(st.permutations(range(1, len(shape))))))


def _shuffle(draw: Draw, shape: tuple[int, ...]) -> nn.Module:
    return Shuffle(draw(st.sampled_from([g for g in range(1, shape[1] + 1) if shape[1] % g == 0])))


def _narrow(draw: Draw, shape: tuple[int, ...]) -> nn.Module:
    dim = draw(st.integers(1, len(shape) - 1))
    start = draw(st.integers(0, shape[dim] - 1))
    return Apply(torch.narrow, dim, start, draw(st.integers(1, shape[dim] - start)))


def _select(draw: Draw, shape: tuple[int, ...]) -> nn.Module:
    dim = draw(st.integers(1, len(shape) - 1))
    return Apply(torch.select, dim, draw(st.integers(-1, shape[dim] - 1)))


def _pad(draw: Draw, shape: tuple[int, ...]) -> nn.Module:
    return Apply(F.pad, draw(st.tuples(*[st.integers(0, 2)] * 4)))


def _unsqueeze(draw: Draw, shape: tuple[int, ...]) -> nn.Module:
    return Apply(torch.unsqueeze, draw(st.integers(1, len(shape))))


# Operators of one operand, with the ranks that they take.
ONE: tuple[tuple[Maker, tuple[int, ...]], ...] = (
    (_convolution, (3, 4)),
    (_convolution, (3, 4)),
    (_convolution, (4,)),
    (_depthwise, (3, 4)),
    (_same, (4,)),
    (_activation, (2, 3, 4)),
    (_activation, (2, 3, 4)),
    (_max_pool, (4,)),
    (_max_pool, (4,)),
    (_average_pool, (4,)),
    (_adaptive, (4,)),
    (_mean, (4,)),
    (_batch_norm, (4,)),
    (_linear, (2, 3, 4)),
    (_flatten, (3, 4)),
    (_permute, (3, 4)),
    (_shuffle, (4,)),
    (_narrow, (2, 3, 4)),
    (_select, (3, 4)),
    (_pad, (3, 4)),
    (_unsqueeze, (2, 3)),
)


def _pairs(shapes: list[tuple[int, ...]]) -> list[tuple[int, int]]:
    """Pairs of different values of one shape, or of an image and its channels' factors."""
    alike = [(i, j) for i, a in enumerate(shapes) for j, b in enumerate(shapes) if i != j and a == b]
    scaled = [
        (i, j) for i, a in enumerate(shapes) for j, b in enumerate(shapes) if len(a) == 4 and a != b == (*a[:2], 1, 1)
    ]
    return alike + scaled


def _combine(draw: Draw, shapes: list[tuple[int, ...]]) -> Step:
    """An operator of several operands."""
    kind = draw(st.sampled_from(["add", "sub", "mul", "cat", "cat"]))
    if kind == "cat":
        first = draw(st.sampled_from(range(len(shapes))))
        rest = (shapes[first][:1], shapes[first][2:])
        others = [i for i, s in enumerate(shapes) if (s[:1], s[2:]) == rest]
        return Step(Cat(), (first, *draw(st.lists(st.sampled_from(others), min_size=1, max_size=3))))
    pairs = _pairs(shapes) or [(i, i) for i in range(len(shapes))]
    options = {"alpha": 2} if kind == "sub" and draw(st.booleans()) else {}
    return Step(Apply(getattr(torch, kind), **options), draw(st.sampled_from(pairs)))


def _recent(draw: Draw, count: int) -> int:
    """A value, the newest ones more often."""
    return max(draw(st.integers(0, count - 1)), draw(st.integers(0, count - 1)))


@st.composite
def graphs(draw: Draw, dynamic: bool = False) -> Graph:
    """Networks of one or two images and up to two dozen operators. The outputs are all values that no
    operator reads, so that nothing is dead, and often one that is read too, or an input."""
    batch = draw(st.integers(2, 3) if dynamic else st.integers(1, 3))
    image = (batch, draw(st.integers(1, 20)), draw(st.integers(3, 12)), draw(st.integers(3, 12)))
    graph = Graph(draw(st.sampled_from([[image], [image, image]])), dynamic)
    shapes = list(graph.inputs)

    def add(step: Step) -> int:
        """The number of the new value; that of the operand where it would be too large."""
        shape = tuple(step.module.eval()(*(torch.zeros(shapes[i]) for i in step.operands)).shape)
        if prod(shape) > LARGEST or len(shape) > 4:
            return step.operands[0]
        shapes.append(shape)
        return graph.add(step.module, *step.operands)

    for _ in range(draw(st.integers(4, 10))):
        kind = draw(st.sampled_from(["one", "one", "several", "residual"]))
        at = _recent(draw, len(shapes))
        if kind == "several":
            add(_combine(draw, shapes))
        elif kind == "residual" and len(shapes[at]) == 4:
            body = add(Step(_same(draw, shapes[at]), (at,)))
            total = add(Step(Apply(torch.add), draw(st.permutations([body, at]).map(tuple))))
            if draw(st.booleans()):
                add(Step(nn.ReLU(), (total,)))
        else:
            make = draw(st.sampled_from([maker for maker, ranks in ONE if len(shapes[at]) in ranks]))
            add(Step(make(draw, shapes[at]), (at,)))
    read = {i for step in graph.steps for i in step.operands}
    unread = [i for i in range(len(graph.inputs), len(shapes)) if i not in read]
    others = draw(st.lists(st.integers(0, len(shapes) - 1), max_size=2))
    graph.outputs = tuple(dict.fromkeys([*unread, *others])) or (0,)
    randomize(graph, seed=draw(st.integers(0, 2**16)))
    return graph
