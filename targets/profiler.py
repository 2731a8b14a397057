"""How long each kernel of a network takes: the network built for TVM's interpreter, which can be watched."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax

from qcompile.ir import Program
from qcompile.targets.base import Target
from qcompile.targets.build import compile_module
from qcompile.targets.emitters import emitters_for
from qcompile.targets.lower import Lowered, lower
from qcompile.targets.parts import PART
from qcompile.targets.workload import Chosen

WARM_UP, LEAST_CALLS = 3, 5


class Profiler:
    """A network that notes when each of its kernels starts and ends.

    The machine code of the kernels is that of the compiled model. What the interpreter itself costs, and
    about a microsecond a kernel for watching it, is not in the figures.
    """

    def __init__(self, program: Program, target: Target, chosen: Chosen) -> None:
        self._lowered: Lowered = lower(program, target, emitters_for(target), chosen)
        executable = compile_module(self._lowered.module, target.tvm, "bytecode")
        self.kernels = self._lowered.kernels  # of each node, the one that computes it; others copy its operands
        self._machine = relax.VirtualMachine(executable, tvm.cpu())
        self._constants = [tvm.runtime.tensor(c) for c in self._lowered.constants.values()]

    def seconds(self, inputs: Sequence[np.ndarray], seconds: float) -> dict[tuple[str, str], float]:
        """The median over about `seconds` of calls of the time that every (node, kernel) takes in one, all its runs
        together; ("", function) for what TVM made itself, of float operators."""
        arrays = [tvm.runtime.tensor(np.ascontiguousarray(x)) for x in inputs]
        times: dict[tuple[str, str], list[float]] = {}
        spent: dict[tuple[str, str], float] = {}  # in this call
        started, upcoming = 0.0, iter(self._lowered.calls)

        def watch(function: Any, name: str, before: bool, result: Any, *args: Any) -> int:
            nonlocal started
            now = time.perf_counter()
            if before:
                started = time.perf_counter()
            elif name != PART and not name.startswith(("vm.", "runtime.")):
                key = owner(name)
                spent[key] = spent.get(key, 0.0) + now - started
            return 0

        def owner(function: str) -> tuple[str, str]:
            """Whose kernel is called now: calls come in the order of lowering, some of them eliminated."""
            if function not in names:
                return "", function
            return next(call for call in upcoming if call[1] == function)

        names = {function for _, function in self._lowered.calls}
        run = self._machine["main"]
        for _ in range(WARM_UP):
            run(*arrays, self._constants)
        self._machine.set_instrument(watch)
        stop, calls = time.perf_counter() + seconds, 0
        while calls < LEAST_CALLS or time.perf_counter() < stop:
            upcoming = iter(self._lowered.calls)
            spent.clear()
            run(*arrays, self._constants)
            calls += 1
            for key, taken in spent.items():
                times.setdefault(key, []).append(taken)
        self._machine.set_instrument(lambda *_: 0)
        return {key: statistics.median(taken) for key, taken in times.items()}
