"""The kernels of each kind of processor, under one set of names: emitters call them and know no processor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qcompile.targets.base import InstructionSet
from qcompile.targets.cpu import choose, copy, elementwise, pool
from qcompile.targets.cuda import convolution, move
from qcompile.targets.cuda import elementwise as cuda
from qcompile.targets.filters import ConvShape
from qcompile.targets.function import Kernel
from qcompile.targets.generator import Generator
from qcompile.targets.nvidia import Gpu

Make = Callable[..., Kernel]  # its last arguments: the instructions, the dynamic dimensions


@dataclass(frozen=True)
class Kernels:
    """What makes the kernel of each operator; what its arguments are is said at the functions for CPUs.

    Attributes:
        generator_for: (geometry, instructions) -> the generator of a convolution's or linear layer's kernels.
        copied: (shape, dtype) -> the kernel y = x of a dense tensor.
    """

    generator_for: Callable[[ConvShape, Any], Generator]
    add: Make
    mul: Make
    lookup: Make
    cat: Make
    max_pool: Make
    average_pool: Make
    quantize: Make
    dequantize: Make
    gather: Make
    copied: Make


CPU = Kernels(
    choose.generator_for,
    elementwise.add,
    elementwise.mul,
    elementwise.lookup,
    copy.cat,
    pool.max_pool,
    pool.average_pool,
    copy.quantize,
    copy.dequantize,
    copy.gather,
    copy.copied,
)


CUDA = Kernels(
    convolution.generator_for,
    cuda.add,
    cuda.mul,
    cuda.lookup,
    move.cat,
    cuda.max_pool,
    cuda.average_pool,
    move.quantize,
    move.dequantize,
    move.gather,
    move.copied,
)


def kernels_for(isa: InstructionSet) -> Kernels:
    """The kernels of processors with these instructions."""
    return CUDA if isinstance(isa, Gpu) else CPU
