"""Workload: one kernel of a network whose config may be tuned, and the key under which the best is remembered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from torch import fx
from tvm import tirx

from qcompile.targets.base import InstructionSet
from qcompile.targets.cpu.epilogue import Requantize
from qcompile.targets.filters import ConvShape, Filters
from qcompile.targets.function import Kernel
from qcompile.targets.generator import Generator
from qcompile.targets.layout import Layout

Chosen = Mapping[tuple[str, str], Mapping[str, Any]]
"""(operator, shape) -> the fields of its config; none of them stands for the default."""


@dataclass(frozen=True)
class Workload:
    """A convolution or linear layer of a network, as its generator sees it.

    Attributes:
        node: of the integer graph: the reference.
        generator: of its kernel.
        shape, filters, numbers: what the generator is given.
        symbols: the dynamic dimensions of the network.
    """

    node: fx.Node
    generator: Generator
    shape: ConvShape
    filters: Filters
    numbers: Requantize
    isa: InstructionSet
    symbols: tuple[tirx.Var, ...]

    @cached_property  # it looks at every weight
    def key(self) -> tuple[str, str]:
        """(operator, shape): all that the speed of a config depends on, and nothing else."""
        instruction = self.generator.instruction(self.shape, self.filters, self.isa)
        return self.generator.name, describe(self.shape.flat(), instruction, self.symbols)

    def configs(self) -> list[Any]:
        return self.generator.configs(self.shape, self.filters, self.isa)

    def kernel(self, config: Any = None) -> Kernel:
        return self.generator.kernel(self.shape, self.filters, self.numbers, self.isa, self.symbols, config)

    def chosen(self, known: Chosen) -> Any:
        """The config that is known for this key. None, for the default, where that is known to be the best, where
        nothing is known, or a config that the generator does not offer any more."""
        wanted = known.get(self.key)
        offered = (config for config in self.configs() if config is not None)
        return next((config for config in offered if asdict(config) == wanted), None) if wanted else None

    def settled(self, known: Chosen) -> bool:
        """Whether there is nothing to find out: a single config, or what is known for this key can be used, the default
        or a config that the generator offers."""
        return len(self.configs()) == 1 or known.get(self.key) == {} or self.chosen(known) is not None


def describe(shape: ConvShape, dot: str, symbols: Iterable[tirx.Var]) -> str:
    """One line, such as "1x56x56x64 -> 1x56x56x64 3x3 stride 1x1 ... vpdpbusd"; dynamic dimensions by their order."""
    names = {str(symbol): f"d{i}" for i, symbol in enumerate(symbols)}

    def number(dim: Any) -> str:
        text = str(dim)
        for name, stands_for in names.items():
            text = text.replace(name, stands_for)
        return text.replace(" ", "")

    def joined(dims: Iterable[Any]) -> str:
        return "x".join(map(number, dims))

    def place(layout: Layout) -> str:
        halo = "" if not any(layout.halo) else f" halo {joined(layout.halo)}"
        return f"{joined((*layout.extents, layout.channels))} pitch {number(layout.pitch)}{halo}"

    parts = [
        f"{place(shape.x)} -> {place(shape.y)}",
        f"kernel {joined(shape.kernel)} stride {joined(shape.stride)} padding {joined(shape.padding)}"
        f" dilation {joined(shape.dilation)} groups {shape.groups}",
        *([f"residual {place(shape.residual)}"] if shape.residual else []),
        dot,
    ]
    return ", ".join(parts)
