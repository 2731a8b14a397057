"""Building a TIR function statement by statement: the few helpers that every generator uses.

A generated function takes flat buffers: the activations, then one buffer per element type that
holds the constants of the whole network, then where this call's constants begin in them and the
dynamic dimensions as int64 scalars, then the output. So a network has a handful of constant tensors
(each one costs time at every call), and layers of one shape share one function. Its outermost loops
are parallel; everything that should live in registers is written out (unrolled) by Python, so that
LLVM sees straight-line code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from qcompile.targets.layout import Dim


@dataclass
class Kernel:
    """A generated function with the constants it is called with.

    Attributes:
        name: what the ledger and profiles show.
        func: the TIR function.
        constants: in the order that the function declared them.
    """

    name: str
    func: tirx.PrimFunc
    constants: tuple[np.ndarray, ...] = ()

    def pools(self) -> list[str]:
        """The element types of its constants, in parameter order."""
        return pools(self.constants)


def pools(constants: Sequence[np.ndarray]) -> list[str]:
    return list(dict.fromkeys(str(c.dtype) for c in constants))


@dataclass(frozen=True)
class Window:
    """A constant: the elements from `start` on in the buffer of its type."""

    buffer: Any
    start: Any

    def __getitem__(self, index: Any) -> Any:
        return self.buffer[self.start + index]


class Arguments:
    """Declares the parameters of the function under construction."""

    def buffer(self, name: str, size: Dim, dtype: str) -> Any:
        return T.arg(name, T.buffer((size,), dtype))

    def constants(self, **arrays: np.ndarray) -> list[Window]:
        """This call's constants, each a window into the network's constants of its type."""
        pool = {}
        for dtype in pools(list(arrays.values())):
            pool[dtype] = T.arg(dtype, T.buffer((tirx.Var(f"{dtype}_size", "int64"),), dtype))
        starts = [T.arg(f"{name}_start", tirx.Var(f"{name}_start", "int64")) for name in arrays]
        return [Window(pool[str(array.dtype)], start) for array, start in zip(arrays.values(), starts, strict=True)]

    def symbols(self, symbols: Sequence[tirx.Var]) -> None:
        """The dynamic dimensions, as scalars."""
        for symbol in symbols:
            T.arg(symbol.name, symbol)


class Function:
    """Holds the finished function once the `function` context has ended."""

    result: tirx.PrimFunc


@contextmanager
def function(name: str) -> Iterator[tuple[Arguments, Function]]:
    """Build one PrimFunc; the body of the with statement emits its statements."""
    done = Function()
    with IRBuilder() as builder, T.prim_func():
        T.func_name(name)
        T.func_attr({"tirx.noalias": True})
        yield Arguments(), done
    # Named when it joins a module, so that equal functions can be one.
    done.result = builder.get().without_attr("global_symbol")


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
