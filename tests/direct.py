"""Calling one generated kernel by itself, in memory that is full of random bytes before and around.

So a kernel that reads what nobody wrote, leaves a part of its output unwritten, or writes beside it,
is found: the network's allocator would hide all three most of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
import tvm_ffi

from qcompile.targets import Target
from qcompile.targets.cpu.emit import Kernel

GUARD = 4096  # bytes on each side of the output


def call(
    kernel: Kernel,
    target: Target,
    inputs: Sequence[np.ndarray],
    size: int,
    rng: np.random.Generator,
    sizes: Sequence[int] = (),
    dtype: str | None = None,
) -> np.ndarray:
    """The `size` elements that `kernel`, compiled for `target`, computes from flat `inputs` and the
    dynamic dimensions `sizes`. Raises AssertionError when it writes outside of its output."""
    module = tvm.compile(
        tvm.IRModule({"main": kernel.func.with_attr("global_symbol", "main")}), tvm.target.Target(target.tvm)
    )
    pools = {name: np.concatenate([c for c in kernel.constants if str(c.dtype) == name]) for name in kernel.pools()}
    starts, ends = [], dict.fromkeys(pools, 0)
    for constant in kernel.constants:
        starts.append(ends[str(constant.dtype)])
        ends[str(constant.dtype)] += constant.size
    itemsize = np.dtype(dtype or target.isa.storage).itemsize
    memory = rng.integers(0, 256, size * itemsize + 2 * GUARD + 64, dtype=np.uint8)
    begin = GUARD + -(memory.ctypes.data + GUARD) % 64
    end = begin + size * itemsize
    before = memory.copy()
    output = memory[begin:end].view(dtype or target.isa.storage)
    arguments: list[Any] = [*inputs, *pools.values(), *starts, *sizes, output]
    module.mod["main"](*[_tensor(a) if isinstance(a, np.ndarray) else a for a in arguments])
    assert np.array_equal(memory[:begin], before[:begin]), "it wrote before its output"
    assert np.array_equal(memory[end:], before[end:]), "it wrote past its output"
    return output


def _tensor(array: np.ndarray) -> Any:
    """The array's own memory where it is aligned as kernels expect, else a copy."""
    return tvm_ffi.from_dlpack(array) if array.ctypes.data % 64 == 0 else tvm.runtime.tensor(array)
