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
from torch import Tensor

from qcompile.targets import InstructionSet, Target
from qcompile.targets.cpu.emit import Kernel
from qcompile.targets.layout import Layout

GUARD = 4096  # bytes on each side of the output


def stored(x: Tensor, layout: Layout, fill: int, isa: InstructionSet, rng: np.random.Generator) -> np.ndarray:
    """`x` as `layout` says: `fill` in the halo, random bytes in the channels that are not its own."""
    n, _, _ = layout.extents
    buffer = rng.integers(0, 256, layout.size, dtype=np.uint8).view(isa.storage)
    pixels = buffer.reshape(n, *layout.padded, layout.pitch)[..., : layout.channels]
    pixels[...] = np.array(fill + isa.offset).astype(isa.storage)
    inside(pixels, layout)[...] = (_nhwc(x.numpy(), layout).astype(np.int16) + isa.offset).astype(isa.storage)
    return buffer


def inside(pixels: np.ndarray, layout: Layout) -> np.ndarray:
    """(n, padded height, padded width, channels) without the halo."""
    _, height, width = layout.extents
    top, _, left, _ = layout.halo
    return pixels[:, top : top + height, left : left + width]


def _nhwc(x: np.ndarray, layout: Layout) -> np.ndarray:
    n, height, width = layout.extents
    if layout.channels_last:
        x = np.moveaxis(x, 1, -1)
    return x.reshape(n, height, width, layout.channels)


def wrong(buffer: np.ndarray, layout: Layout, want: Tensor, fill: int, isa: InstructionSet) -> int:
    """How many elements of an output differ from `want`, those of the halo from `fill`."""
    n, _, _ = layout.extents
    pixels = buffer.reshape(n, *layout.padded, layout.pitch)[..., : layout.channels].astype(np.int16) - isa.offset
    expected = np.full_like(pixels, fill)
    inside(expected, layout)[...] = _nhwc(want.contiguous().numpy(), layout)
    return int(np.count_nonzero(pixels != expected))


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
