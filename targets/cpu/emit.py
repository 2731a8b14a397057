"""What the bodies of CPU kernels are written with: vectors, registers, and loops over threads.

The outermost loops of a kernel are parallel; everything that should live in registers is written out (unrolled) by
Python, so that LLVM sees straight-line code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from qcompile.targets.function import Window
from qcompile.targets.layout import Dim


def ramp(offset: Any, lanes: int) -> Any:
    return T.ramp(offset, 1, lanes) if lanes > 1 else offset


def load(buffer: Any, offset: Any, lanes: int) -> Any:
    """`lanes` consecutive elements from `offset`."""
    if isinstance(buffer, Window):
        buffer, offset = buffer.buffer, buffer.start + offset
    return buffer[ramp(offset, lanes)]


def store(buffer: Any, offset: Any, value: Any, lanes: int) -> None:
    T.buffer_store(buffer, value, [ramp(offset, lanes)])


def store_first(buffer: Any, offset: Any, channel: Any, value: Any, lanes: int, channels: int) -> None:
    """Store at `offset` + `channel` those of the `lanes` elements that are below `channels`, the end of a row."""
    rest = channels % lanes
    if not rest:
        store(buffer, offset + channel, value, lanes)
        return
    with T.If(channel + lanes <= channels):
        with T.Then():
            store(buffer, offset + channel, value, lanes)
        with T.Else():
            first = 0
            while first < rest:
                size = 1 << ((rest - first).bit_length() - 1)
                part = T.Shuffle([value], list(range(first, first + size)))
                store(buffer, offset + channel + first, part, size)
                first += size


def splat(value: Any, lanes: int) -> Any:
    return T.broadcast(value, lanes) if lanes > 1 else value


def vector_type(dtype: str, lanes: int) -> str:
    return f"{dtype}x{lanes}" if lanes > 1 else dtype


def widen(value: Any, dtype: str, lanes: int) -> Any:
    return T.cast(value, vector_type(dtype, lanes))


def llvm(dtype: str, lanes: int, intrinsic: str, *args: Any) -> Any:
    """A pure LLVM intrinsic on vectors of `lanes` elements."""
    return T.call_llvm_pure_intrin(vector_type(dtype, lanes), T.llvm_lookup_intrinsic_id(intrinsic), *args)


class Registers:
    """Vectors that LLVM keeps in registers.

    A buffer each, and of scope "global": only those of less than 1 KiB does TVM put on the stack, from
    where LLVM lifts them into registers. All others it takes from the heap, at every entry of the block.
    """

    def __init__(self, count: int, lanes: int, dtype: str) -> None:
        self._buffers = [T.alloc_buffer((lanes,), dtype, scope="global") for _ in range(count)]
        self._lanes = lanes

    def __getitem__(self, i: int) -> Any:
        return load(self._buffers[i], 0, self._lanes)

    def __setitem__(self, i: int, value: Any) -> None:
        store(self._buffers[i], 0, value, self._lanes)


def parallel(extent: Dim) -> Any:
    """A parallel loop, or none where there is one task: a launch costs more than it could save."""
    return T.serial(0, 1) if isinstance(extent, int) and extent == 1 else T.parallel(0, extent)


def on_each_thread(extent: Dim) -> Any:
    """Within, every thread runs what is outside of the one `parallel` loop of this extent, and its part of the loop."""
    alone = isinstance(extent, int) and extent == 1
    return nullcontext() if alone else T.attr(0, "pragma_parallel_launch_point", 1)


@contextmanager
def only_if(*conditions: Any) -> Iterator[None]:
    """Within, statements that run where all `conditions` hold; without one, always."""
    if not conditions:
        yield
        return
    with T.If(tirx.all(*conditions)), T.Then():
        yield


def fill(buffer: Any, offset: Any, count: Dim, value: Any) -> None:
    """Store the scalar `value` into `count` consecutive elements."""
    if not isinstance(count, int):
        with T.serial(0, count) as i:
            store(buffer, offset + i, value, 1)
        return
    lanes = 64
    if count >= lanes:
        with T.serial(0, count // lanes) as i:
            store(buffer, offset + i * lanes, splat(value, lanes), lanes)
    rest = count % lanes
    while rest:
        lanes = 1 << (rest.bit_length() - 1)
        store(buffer, offset + (count - rest), splat(value, lanes), lanes)
        rest -= lanes
