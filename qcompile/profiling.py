"""compiled.profile(...): where the time of a call goes, kernel by kernel."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sympy
import torch
from rich.console import Console
from rich.table import Table
from torch import fx

from qcompile.errors import ConfigError
from qcompile.ir import Program, shape_of, where
from qcompile.ops.real import OPS

q = torch.ops.qcompile
_WEIGHTED = (q.conv2d.default, q.conv1d.default, q.linear.default, *OPS)


@dataclass(frozen=True)
class ProfileRow:
    """One kernel of the network.

    Attributes:
        op: the integer operator that it computes, or the float function; "copy" where it only moves data.
        where: the module path in the user's model.
        kernel: the function, as the ledger names it.
        seconds: the median of a call.
        macs: multiply-accumulates of its convolution or linear layer, else 0.
        share_of_peak: of the machine's peak, which its fastest int8 instruction reaches in registers; None where the
            kernel multiplies with another, or not at all.
        node: of the integer graph; "" for the float function.
    """

    op: str
    where: str
    kernel: str
    seconds: float
    macs: int
    share_of_peak: float | None
    node: str = ""


@dataclass(frozen=True)
class Profile:
    """The kernels in the order of execution. Prints as a table, the slowest first."""

    rows: tuple[ProfileRow, ...]
    peak_macs_per_s: float | None

    @property
    def seconds(self) -> float:
        """Of all kernels together."""
        return sum(row.seconds for row in self.rows)

    def table(self, most: int | None = None) -> Table:
        """The `most` slowest kernels (default: all), with their part of the time."""
        table = Table("operator", "module", "kernel", "us", "of time", "of peak", title=f"{self.seconds * 1e3:.3f} ms")
        for row in sorted(self.rows, key=lambda r: -r.seconds)[:most]:
            share = "" if row.share_of_peak is None else f"{row.share_of_peak:.0%}"
            part = f"{row.seconds / self.seconds:.1%}"
            table.add_row(row.op, row.where, row.kernel, f"{row.seconds * 1e6:.1f}", part, share)
        return table

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=140).print(self.table())
        return out.getvalue()

    def plot(self, path: str | Path) -> None:
        """Draw every kernel in the order of execution: its time, and the part of it that the peak would need.

        Raises:
            ConfigError: matplotlib is not installed, or cannot write such a file there.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ConfigError("a plot needs matplotlib", remedy="pip install matplotlib") from error
        figure = Figure(figsize=(8, 0.18 * len(self.rows) + 1.2), layout="constrained")
        axes = figure.subplots()
        places = range(len(self.rows))
        microseconds = [row.seconds * 1e6 for row in self.rows]
        needed = [us * (row.share_of_peak or 0.0) for us, row in zip(microseconds, self.rows, strict=True)]
        axes.barh(places, microseconds, color="#c9d4e3", label="measured")
        axes.barh(places, needed, color="#34618f", label="at the peak")
        axes.set_yticks(places, [f"{row.where or row.op}  {row.kernel}" for row in self.rows], fontsize=6)
        axes.set_ylim(len(self.rows) - 0.4, -0.6)
        axes.set_xlabel("microseconds")
        axes.legend()
        try:
            figure.savefig(path)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the plot cannot be written: {error}",
                where=str(path),
                remedy="give a path in a folder that exists, with an ending such as .png, .svg or .pdf",
            ) from error


def profile(
    program: Program, target: Any, chosen: Any, inputs: Sequence[np.ndarray], threads: int, seconds: float
) -> Profile:
    """Measure the kernels of `program`, with the `chosen` configs, on flat `inputs`; see `CompiledModel.profile`."""
    from qcompile.targets.cpu.peak import peak_instruction, peak_rate
    from qcompile.targets.profiler import Profiler

    profiler = Profiler(program, target, chosen)
    measured = profiler.seconds(inputs, seconds)
    peak, fastest = peak_rate(target, threads, repeat=30), peak_instruction(target.isa)
    nodes = {node.name: node for node in program.graph.nodes}
    sizes = _sizes(program, inputs)
    rows = []
    for (name, kernel), taken in measured.items():
        node = nodes.get(name)
        if node is None:
            rows.append(ProfileRow("float", "", kernel, taken, 0, None))
            continue
        computes = kernel.startswith(profiler.kernels.get(name, kernel))
        macs = multiply_accumulates(node, sizes) if computes else 0
        share = macs / taken / peak if macs and peak and f"_{fastest}_" in kernel else None
        operator = node.name if node.op != "call_function" else str(node.target).split(".")[1]
        rows.append(ProfileRow(operator if computes else "copy", where(node), kernel, taken, macs, share, name))
    return Profile(tuple(rows), peak)


def multiply_accumulates(node: fx.Node, sizes: dict[Any, int]) -> int:
    """Of a convolution or linear layer; `sizes` gives the dynamic dimensions. 0 for other operators."""
    if node.target not in _WEIGHTED:
        return 0
    weight: Any = node.args[1]
    outputs = math.prod(_number(size, sizes) for size in shape_of(node))
    return outputs * math.prod(shape_of(weight)[1:])


def _number(size: Any, sizes: dict[Any, int]) -> int:
    return size if isinstance(size, int) else int(sympy.sympify(size.node.expr).subs(sizes))


def _sizes(program: Program, inputs: Sequence[np.ndarray]) -> dict[Any, int]:
    found: dict[Any, int] = {}
    for node, array in zip(program.placeholders(), inputs, strict=True):
        for size, actual in zip(shape_of(node), array.shape, strict=True):
            if not isinstance(size, int):
                found[size.node.expr] = actual
    return found
