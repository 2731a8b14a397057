"""What the caller of an artifact sees of a program: its flat inputs and outputs, how these are quantized, and the names
of dynamic dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qcompile.artifact import TensorSpec
from qcompile.ir import Program, shape_of


def input_specs(program: Program) -> tuple[TensorSpec, ...]:
    """The flat inputs, with the scale and zero point of those that the network quantizes."""
    pairs = zip(program.inputs, program.placeholders(), strict=True)
    return tuple(
        TensorSpec(spec.name, spec.shape, spec.dtype, *quantization_of(node), spec.path) for spec, node in pairs
    )


def quantization_of(node: fx.Node) -> tuple[float | None, int | None]:
    """(scale, zero point) that the network quantizes an input by, or had an output quantized by; else Nones."""
    if node.target is torch.ops.qcompile.dequantize.default:
        return float(node.args[1]), int(node.args[2])  # type: ignore[arg-type]
    found = {user.args[1:3] for user in node.users if user.target is torch.ops.qcompile.quantize.default}
    if len(found) != 1:
        return None, None
    inverse_scale, zero_point = found.pop()
    return 1.0 / float(inverse_scale), int(zero_point)  # type: ignore[arg-type]


def output_specs(program: Program) -> tuple[TensorSpec, ...]:
    """The flat outputs; a dynamic dimension carries its expression and the bounds of its symbol."""
    bounds = {d[0]: d for spec in program.inputs for d in spec.shape if not isinstance(d, int)}
    symbols = dynamic_symbols(program)

    def dimension(size: Any) -> int | tuple[str, int, int]:
        if isinstance(size, int):
            return size
        name = symbols.get(str(size), str(size))
        return bounds.get(name, (name, 0, 2**31 - 1))

    specs = []
    for i, node in enumerate(program.outputs()):
        dtype = str(node.meta["val"].dtype).removeprefix("torch.")
        shape = tuple(dimension(s) for s in shape_of(node))
        specs.append(TensorSpec(f"output{i}", shape, dtype, *quantization_of(node)))
    return tuple(specs)


def dynamic_symbols(program: Program) -> dict[str, str]:
    """The graph's symbols -> the names that the user gave the dimensions."""
    found = {}
    for spec, node in zip(program.inputs, program.placeholders(), strict=True):
        for dim, size in zip(spec.shape, shape_of(node), strict=True):
            if not isinstance(dim, int):
                found[str(size)] = dim[0]
    return found
