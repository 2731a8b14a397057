"""Calling one generated kernel by itself, in memory that is full of random bytes before and around.

So a kernel that reads what nobody wrote, leaves a part of its output unwritten, or writes beside it,
is found: the network's allocator would hide all three most of the time. What it reads ends where no memory is, so
that one which reads further ends the process.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

import numpy as np
import tvm
import tvm_ffi

from qcompile.targets import Target
from qcompile.targets.function import Kernel

GUARD = 4096  # bytes on each side of the output
LINE = 64  # bytes: most memory begins at a multiple of it, and is there for whole ones

_libc = ctypes.CDLL(None, use_errno=True)
_PROT_NONE = 0


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
    dynamic dimensions `sizes`. Raises AssertionError when it writes outside of its output; the process ends with
    a segmentation fault when it reads past the end of an input or of its constants."""
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
    given = zip((*inputs, *pools.values()), kernel.func.params, strict=False)
    taken = [tvm_ffi.from_dlpack(before_nothing(array, rng, of.ty.data_alignment)) for array, of in given]
    module.mod["main"](*taken, *starts, *sizes, tvm_ffi.from_dlpack(output))
    assert np.array_equal(memory[:begin], before[:begin]), "it wrote before its output"
    assert np.array_equal(memory[end:], before[end:]), "it wrote past its output"
    return output


def before_nothing(array: np.ndarray, rng: np.random.Generator, alignment: int = LINE) -> np.ndarray:
    """A copy at a multiple of `alignment` bytes, as near as that allows to the end of a page; what follows that the
    process may not read."""
    pages = -(-max(array.nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, pages + mmap.PAGESIZE), np.uint8)
    if _libc.mprotect(ctypes.c_void_p(memory.ctypes.data + pages), ctypes.c_size_t(mmap.PAGESIZE), _PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect failed")
    memory[:pages] = rng.integers(0, 256, pages, dtype=np.uint8)
    begin = (pages - array.nbytes) // alignment * alignment
    copy = memory[begin : begin + array.nbytes].view(array.dtype)
    copy[:] = array.reshape(-1)
    return copy
