"""Launches: which function of the device code runs, on what, and how many threads of it.

A kernel of the network is a TIR function that runs on the host: it computes addresses and numbers, and calls device
functions by name. Those are templates of `device/`, as an entry point for each set of template arguments that the
network needs. All that varies between layers otherwise (geometry, strides, numbers) are arguments, so that a network
has few entry points, and a dynamic dimension is one argument more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from qcompile.targets.cpu.epilogue import Requantize
from qcompile.targets.function import Kernel, function
from qcompile.targets.layout import Dim, Layout, product

THREADS = 256  # of a block whose threads have nothing to do with one another
_C_TYPES = {
    "int8": "int8_t",
    "uint8": "uint8_t",
    "int16": "int16_t",
    "int32": "int",
    "int64": "int64_t",
    "float32": "float",
    "float64": "double",
    "bool": "int8_t",
}


@dataclass(frozen=True)
class Long:
    """A number that takes 64 bits."""

    value: Dim


Number = Any  # an int or a dimension (32 bits), a float (float32) or a Long


@dataclass(frozen=True)
class Entry:
    """An entry point of the device code.

    Attributes:
        header: of `device/`.
        function: the template with its arguments, such as "max_pool" or "linear_rows<4, true>".
        pointers: the element types that its pointers point to.
        read: how many of these, the first ones, it does not write to.
        struct: what its numbers are members of, in order; those of nested ones in their place.
        numbers: their C types.
        threads: of a block.
        dynamic: whether it has shared memory, whose size is an argument of the launch.
        roomy: whether it takes the registers that it wants, though fewer of its blocks then share a processor.
    """

    header: str
    function: str
    pointers: tuple[str, ...]
    read: int
    struct: str
    numbers: tuple[str, ...]
    threads: int
    dynamic: bool = False
    roomy: bool = False

    @property
    def name(self) -> str:
        return "qcompile_" + re.sub(r"\W+", "_", self.function.replace("qcompile::", "")).strip("_").lower()

    @property
    def source(self) -> str:
        """Its definition in CUDA C++."""
        pointers = [
            f"{'const ' if i < self.read else ''}{_C_TYPES[dtype]}* p{i}" for i, dtype in enumerate(self.pointers)
        ]
        numbers = [f"{kind} a{i}" for i, kind in enumerate(self.numbers)]
        arguments = ", ".join(f"p{i}" for i in range(len(pointers)))
        members = ", ".join(f"a{i}" for i in range(len(numbers)))
        bounds = f"{self.threads}, 1" if self.roomy else str(self.threads)
        return (
            f'extern "C" __global__ void __launch_bounds__({bounds}) {self.name}(\n'
            f"    {', '.join(pointers + numbers)}) {{\n"
            f"  qcompile::{self.function}({arguments}, qcompile::{self.struct}{{{members}}});\n}}\n"
        )

    @property
    def information(self) -> dict[str, Any]:
        """What TVM must know to launch it."""
        kinds = {"int": "int32", "int64_t": "int64", "float": "float32"}
        tags = [f"{of}Idx.{axis}" for of, axes in (("block", "xyz"), ("thread", "x")) for axis in axes]
        return {
            "name": "",
            "arg_types": ["handle"] * len(self.pointers) + [kinds[kind] for kind in self.numbers],
            "launch_param_tags": tags + ["tirx.use_dyn_shared_memory"] * self.dynamic,
            "arg_extra_tags": [],
        }


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        header, function, struct, threads, roomy: as of `Entry`.
        buffers: names of the kernel's inputs and constants, in the order of its pointers; the result follows, and
            scratch memory where the kernel has it.
        numbers: the members of `struct`.
        blocks: in each direction.
        shared_bytes: of a block; 0 where it shares none.
    """

    header: str
    function: str
    struct: str
    buffers: tuple[str, ...]
    numbers: tuple[Number, ...]
    blocks: tuple[Dim, Dim, Dim]
    threads: int = THREADS
    shared_bytes: int = 0
    roomy: bool = False

    def entry(self, dtypes: Mapping[str, str], written: Sequence[str]) -> Entry:
        """`dtypes`: of the kernel's buffers, of which `written` are written to."""
        return Entry(
            self.header,
            self.function,
            tuple(dtypes[name] for name in (*self.buffers, *written)),
            len(self.buffers),
            self.struct,
            tuple(
                "int64_t" if isinstance(n, Long) else "float" if isinstance(n, float) else "int" for n in self.numbers
            ),
            self.threads,
            self.shared_bytes > 0,
            self.roomy,
        )


def each(count: Dim) -> tuple[Dim, Dim, Dim]:
    """The blocks of a launch with a thread for each of `count` elements."""
    return at_least_one(ceil_div(count, THREADS)), 1, 1


def ceil_div(a: Dim, b: int) -> Dim:
    return -(-a // b) if isinstance(a, int) else T.floordiv(a + (b - 1), b)


def at_least_one(count: Dim) -> Dim:
    return max(count, 1) if isinstance(count, int) else T.max(count, 1)


def kernel(
    name: str,
    launches: Sequence[Launch],
    inputs: Mapping[str, tuple[Dim, str]],
    output: tuple[Dim, str],
    constants: Mapping[str, np.ndarray] | None = None,
    symbols: Sequence[tirx.Var] = (),
    scratch: int = 0,
) -> Kernel:
    """The kernel that makes `launches`, one after the other. `inputs`, `output`: (elements, element type); `scratch`:
    elements of int32."""
    arrays = dict(constants or {})
    dtypes = {
        **{of: dtype for of, (_, dtype) in inputs.items()},
        **{of: str(array.dtype) for of, array in arrays.items()},
        "y": output[1],
        "scratch": "int32",
    }
    written = ("y", "scratch") if scratch else ("y",)
    entries = [launch.entry(dtypes, written) for launch in launches]
    with function(name) as (arguments, done):
        places = {of: arguments.buffer(of, size, dtype).data for of, (size, dtype) in inputs.items()}
        for of, window in zip(arrays, arguments.constants(**arrays), strict=True):
            places[of] = T.address_of(window.buffer[window.start])
        arguments.symbols(symbols)
        places["y"] = arguments.buffer("y", *output).data
        if scratch:
            places["scratch"] = arguments.buffer("scratch", scratch, "int32").data
        for launch, entry in zip(launches, entries, strict=True):
            blocks = [T.cast(extent, "int32") for extent in launch.blocks]
            shared = [T.int32(launch.shared_bytes)] if launch.shared_bytes else []
            T.evaluate(
                T.call_packed(
                    entry.name,
                    *[places[of] for of in (*launch.buffers, *written)],
                    *map(_number, launch.numbers),
                    *blocks,
                    T.int32(launch.threads),
                    *shared,
                )
            )
    return Kernel(name, done.result, tuple(arrays.values()), tuple(zip(entries, launches, strict=True)), scratch)


def _number(value: Number) -> Any:
    if isinstance(value, float):
        return T.float32(value)
    if isinstance(value, Long):
        return T.cast(value.value, "int64")
    return T.cast(value, "int32")


# --- members of the structs that most kernels have --------------------------------------------------------------


def image(layout: Layout) -> tuple[Number, ...]:
    """Image."""
    _, height, width = layout.extents
    top, _, left, _ = layout.halo
    return (height, width, top, left, *layout.padded, layout.pitch)


def margin(layout: Layout, zero_point: int) -> tuple[Number, ...]:
    """Margin."""
    return layout.extents[0], zero_point


def requantize(numbers: Requantize) -> tuple[Number, ...]:
    """Requantize."""
    zero_point = numbers.zero_point
    return (
        zero_point,
        float(numbers.lo - zero_point),
        float(numbers.hi - zero_point),
        float(np.float32(numbers.other_m)),
        numbers.other_zero_point,
    )


def words(layout: Layout) -> Dim:
    """How many words of four channels an activation has."""
    return product((*layout.extents, ceil_div(layout.channels, 4)))
