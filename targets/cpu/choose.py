"""Which kind of kernel computes a convolution or linear layer."""

from __future__ import annotations

from qcompile.targets.base import InstructionSet
from qcompile.targets.cpu import matrix
from qcompile.targets.cpu.conv import CONV
from qcompile.targets.cpu.depthwise import DEPTHWISE, is_depthwise
from qcompile.targets.cpu.depthwise_dot import DEPTHWISE_DOT
from qcompile.targets.filters import ConvShape
from qcompile.targets.generator import Generator


def generator_for(shape: ConvShape, isa: InstructionSet) -> Generator:
    """The fastest generator for this geometry on these instructions."""
    if is_depthwise(shape):
        return DEPTHWISE_DOT if isa.tap_dots else DEPTHWISE
    return matrix.MATRIX if matrix.suits(shape, isa) else CONV
