"""One kernel by itself, as it would run in its network: what it is called with, and what it must answer.

The module calls the kernel several times on the same activations, each time with another copy of its
constants: in a network too, others have used the cache since this kernel last read its weights, and its activations
have just been written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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

SETS = 2  # of inputs: the second finds in memory what the first has left there


@dataclass(frozen=True)
class Rotation:
    """Among how many copies of its weights the calls of a kernel take turns.

    Attributes:
        weight_bytes: of all copies together, or a little more.
        most: copies.
    """

    weight_bytes: int
    most: int

    def copies(self, weight_bytes: int) -> int:
        """Of the weights of one kernel, two or more."""
        return min(self.most, 2 + self.weight_bytes // weight_bytes)


class Trial:
    """The inputs and the answers of one workload, with random activations.

    Attributes:
        inputs: SETS lists of flat stored activations.
        calls: of the kernel in one run of "main" of `module`, each with its own copy of the constants.
    """

    def __init__(self, program: Program, workload: Workload, rotation: Rotation, seed: int = 0) -> None:
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
        self.calls = rotation.copies(workload.filters.weight.nbytes)

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
        """The pools of `kernel`; `module` takes as many copies of each, one after the other, as there are calls."""
        pools, _ = _pooled(kernel)
        return {dtype: pool.data() for dtype, pool in pools.items()}

    def module(self, kernel: Kernel) -> tvm.IRModule:
        """Two functions (*inputs, *pools): "once" calls the kernel and returns its output; "main" makes `calls` calls.

        "main" returns nothing that it computed, and what it is given counts as constant: so a GPU gets all its calls as
        one graph of launches, as it gets a network. Launched one by one, kernels of a few microseconds would only show
        how long a launch takes.
        """
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
        outputs = [relax.TensorType((self._concrete(workload.shape.y).size,), workload.isa.storage)]
        if kernel.scratch:
            outputs.append(relax.TensorType((kernel.scratch,), "int32"))
        parameters, alone = [*flat, *tables], name == "once"
        with builder.function(name, parameters, {"num_input": len(parameters) if alone else 0}):
            for call in range(calls):
                copies = [
                    relax.prim_value(start + call * pools[str(value.dtype)].size)
                    for start, value in zip(starts, kernel.constants, strict=True)
                ]
                arguments = relax.Tuple([*parameters, *copies, *sizes])
                result = builder.emit(relax.call_tir(function, arguments, outputs if kernel.scratch else outputs[0]))
            if alone and kernel.scratch:
                result = builder.emit(relax.TupleGetItem(result, 0))
            builder.emit_func_output(result if alone else flat[0])

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
