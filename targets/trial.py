"""One kernel by itself, as it would run in its network: what it is called with, and what it must answer.

The module calls the kernel several times on the same activations, each time with another copy of its
constants: in a network too, weights come from beyond the second-level cache and activations do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import tvm
from torch import fx
from tvm import relax, tirx
from tvm.sym import Analyzer

from qcompile.ir import Program, constant
from qcompile.targets.constants import Pool
from qcompile.targets.function import Kernel
from qcompile.targets.layout import Dim, Layout
from qcompile.targets.stored import stored, wrong
from qcompile.targets.workload import Workload

COLD_BYTES = 4 << 20  # of weights, among which the calls of a run take turns
MOST_COPIES = 16
SETS = 2  # of inputs: the second finds in memory what the first has left there


class Trial:
    """The inputs and the answers of one workload, with random activations.

    Attributes:
        inputs: SETS lists of flat stored activations.
        calls: of the kernel in one run of "main" of `module`.
    """

    def __init__(self, program: Program, workload: Workload, seed: int = 0) -> None:
        self._workload = workload
        self._sizes = {
            str(size.node.expr): int(size.node.hint)
            for node in program.placeholders()
            for size in node.meta["val"].shape
            if not isinstance(size, int)
        }
        rng = np.random.default_rng(seed)
        shape, node = workload.shape, workload.node
        places = [(node.args[0], self._concrete(shape.x), workload.filters.x_zero_point)]
        if shape.residual is not None:  # it may be the same value, in another layout
            places.append((node.kwargs["residual"], self._concrete(shape.residual), 0))
        self.inputs: list[list[np.ndarray]] = []
        self._wanted: list[np.ndarray] = []
        for _ in range(SETS):
            values = {source: rng.integers(-128, 128, place.shape, dtype=np.int8) for source, place, _ in places}
            self.inputs.append(
                [stored(values[source], place, fill, workload.isa, rng) for source, place, fill in places]
            )
            self._wanted.append(_reference(program, node, values))
        self.calls = min(MOST_COPIES, 2 + COLD_BYTES // workload.filters.weight.nbytes)

    def exact(self, outputs: Sequence[np.ndarray]) -> bool:
        """Whether these are the bits of the reference, for every set of inputs."""
        layout, fill, isa = (
            self._concrete(self._workload.shape.y),
            self._workload.numbers.zero_point,
            self._workload.isa,
        )
        pairs = zip(outputs, self._wanted, strict=True)
        return all(wrong(output, layout, want, fill, isa) == 0 for output, want in pairs)

    def constants(self, kernel: Kernel) -> dict[str, np.ndarray]:
        """The pools of `kernel`, with as many copies of its constants as there are calls."""
        pools, _ = _pooled(kernel)
        return {dtype: np.tile(pool.data(), self.calls) for dtype, pool in pools.items()}

    def module(self, kernel: Kernel) -> tvm.IRModule:
        """Two functions (*inputs, *pools) -> the output of the last call: "main" of `calls`, "once" of one."""
        builder = relax.BlockBuilder()
        function = builder.add_func(kernel.func, "kernel")
        self._add(builder, function, kernel, "once", 1)
        self._add(builder, function, kernel, "main", self.calls)
        return builder.get()

    def _add(self, builder: relax.BlockBuilder, function: Any, kernel: Kernel, name: str, calls: int) -> None:
        workload, (pools, starts) = self._workload, _pooled(kernel)
        activations = [layout for layout in (workload.shape.x, workload.shape.residual) if layout is not None]
        flat = [
            relax.Var(f"x{i}", relax.TensorType((self._concrete(layout).size,), workload.isa.storage))
            for i, layout in enumerate(activations)
        ]
        tables = [relax.Var(d, relax.TensorType((pool.size * self.calls,), d)) for d, pool in pools.items()]
        sizes = [relax.prim_value(self._sizes[str(symbol)]) for symbol in workload.symbols]
        output = relax.TensorType((self._concrete(workload.shape.y).size,), workload.isa.storage)
        with builder.function(name, [*flat, *tables]):
            for call in range(calls):
                copies = [
                    relax.prim_value(start + call * pools[str(value.dtype)].size)
                    for start, value in zip(starts, kernel.constants, strict=True)
                ]
                arguments = relax.Tuple([*flat, *tables, *copies, *sizes])
                result = builder.emit(relax.call_tir(function, arguments, output))
            builder.emit_func_output(result)

    def _concrete(self, layout: Layout) -> Layout:
        return replace(layout, shape=tuple(map(self._number, layout.shape)), pitch=self._number(layout.pitch))

    def _number(self, dim: Dim) -> int:
        if isinstance(dim, int):
            return dim
        analyzer = Analyzer()
        for symbol in self._workload.symbols:
            analyzer.bind(symbol, tirx.const(self._sizes[str(symbol)], "int64"))
        return int(analyzer.simplify(dim))


def _pooled(kernel: Kernel) -> tuple[dict[str, Pool], list[int]]:
    """One copy of the constants by element type, and where each begins."""
    pools = {dtype: Pool(dtype) for dtype in kernel.pools()}
    return pools, [pools[str(value.dtype)].add(value) for value in kernel.constants]


def _reference(program: Program, node: fx.Node, values: dict[Any, np.ndarray]) -> np.ndarray:
    """What the integer operator answers to these activations."""

    def value(argument: fx.Node) -> torch.Tensor:
        if argument in values:
            return torch.from_numpy(values[argument])
        return constant(program.graph_module, argument)

    target: Any = node.target
    answer: torch.Tensor = target(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))
    return answer.contiguous().numpy()
