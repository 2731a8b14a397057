"""A generated TIR function with its constants, and how one is begun.

A generated function takes flat buffers: the activations, then one buffer per element type that
holds the constants of the whole network, then where this call's constants begin in them and the
dynamic dimensions as int64 scalars, then the output. So a network has a handful of constant tensors
(each one costs time at every call), and layers of one shape share one function.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
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
        launches: on a GPU, the entry points of device code that it calls, each with what it is called with.
        scratch: int32 elements of memory that it is lent besides, after its output.
    """

    name: str
    func: tirx.PrimFunc
    constants: tuple[np.ndarray, ...] = ()
    launches: tuple[tuple[Any, Any], ...] = ()
    scratch: int = 0

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

    def window(self, name: str, size: Dim, dtype: str) -> Any:
        """A buffer that may begin at any element of a larger one, and where only elements are aligned: an input."""
        start = tirx.Var(f"{name}_first", "int64")
        element = int(tvm.DataType(dtype).itemsize)
        return T.arg(name, T.buffer((size,), dtype, elem_offset=start, offset_factor=1, align=element))

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
