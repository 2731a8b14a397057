"""Target: what the compiler must know of a processor, as data.

A target is flat (none inherits from another): the TVM target, the processor features an artifact
built for it needs, the instruction-set row that drives the kernel generators, and how to link.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

Storage = Literal["uint8", "int8"]


@dataclass(frozen=True)
class DotProduct:
    """One way to multiply-accumulate four int8 products into each int32 lane.

    Attributes:
        name: as kernels report it.
        cycles: that it takes for one vector of accumulators, where loading a vector takes one.
        planes: weight vectors per (lanes channels x 4 products).
        weight_dtype: how those vectors are stored.
        pack: (..., channels, 4) int8 -> (..., planes, elements) of `weight_dtype`, one row per vector.
        prepare: the int32 that holds four activations -> the operands shared by a tile row.
        accumulate: (acc, prepared, weight vectors) -> acc.
        exact_for: whether this way is exact for these weights (..., channels, 4).
        surplus: what it adds to a sum besides the products, whatever the activations: (channels, products) int64
            -> (channels,), wrapping at int32.
    """

    name: str
    cycles: float
    planes: int
    weight_dtype: str
    pack: Callable[[np.ndarray], np.ndarray]
    prepare: Callable[[Any], tuple[Any, ...]]
    accumulate: Callable[[Any, tuple[Any, ...], list[Any]], Any]
    exact_for: Callable[[np.ndarray], bool] = lambda weight: True
    surplus: Callable[[np.ndarray], np.ndarray] = lambda weight: np.zeros(len(weight), np.int64)


@dataclass(frozen=True)
class Products:
    """One way to multiply-accumulate real numbers: a 32-bit word of activations into each float32 lane.

    Attributes:
        name: as kernels report it.
        depth: how many products a word holds: 1 of float32, 2 of bfloat16.
        pack: (..., depth) float32 weights -> (...) words, float32 or int32.
        accumulate: (acc, the activations' word in every lane as int32, weights' words, lanes) -> acc.
        cycles, planes: as of `DotProduct`.
        calls: LLVM IR of the functions that it calls, where TVM's own types cannot express them.
    """

    name: str
    depth: int
    pack: Callable[[np.ndarray], np.ndarray]
    accumulate: Callable[[Any, Any, Any, int], Any]
    cycles: float = 1
    planes: int = 1
    calls: str = ""


@dataclass(frozen=True)
class Narrow:
    """One way to turn several int32 vectors into one vector of stored bytes.

    Processors narrow within parts of a register, so the bytes of the vectors come out interleaved. The
    weights are packed in the same order, which puts the channels back in their places for free.

    Attributes:
        count: how many vectors it takes.
        order: for every lane of every vector, in turn, the byte that holds it: (count * lanes,).
        pack: (vectors, zero point or None for 0) -> vectors + zero point, saturated to the stored type.
        unpack: bytes -> the vectors, widened to int32.
    """

    count: int
    order: np.ndarray
    pack: Callable[[list[Any], Any], Any]
    unpack: Callable[[Any], list[Any]]


@dataclass(frozen=True)
class TapDot:
    """A dot product of four bytes for each channel, at one width of vector.

    Attributes:
        name: as kernels report it.
        lanes: int32 lanes; it takes 4 * lanes bytes of activations and of weights.
        narrow: how four such vectors are stored.
        accumulate: (acc, activations, weights) -> acc; exact for every weight.
    """

    name: str
    lanes: int
    narrow: Narrow
    accumulate: Callable[[Any, Any, Any], Any]


class TileRegisters(Protocol):
    """The registers of a block of sums, as instructions that a kernel may emit: tile i of its pixels, j of its
    channels. What they do is said in `qcompile.targets.amx`."""

    @property
    def code(self) -> str:
        """LLVM IR that the kernel imports."""

    def begin(self) -> None: ...
    def end(self) -> None: ...
    def load_sum(self, i: int, j: int, memory: Any, stride: Any) -> None: ...
    def load_pixels(self, i: int, memory: Any, stride: Any) -> None: ...
    def load_weights(self, j: int, memory: Any, stride: Any) -> None: ...
    def prefetch(self, memory: Any) -> None: ...
    def multiply(self, i: int, j: int) -> None: ...
    def memory(self, count: int) -> Any: ...
    def store_sum(self, i: int, j: int, memory: Any, slot: Any) -> None: ...
    def sums(self, memory: Any, slot: Any, row: Any) -> Any: ...


@dataclass(frozen=True)
class MatrixUnit:
    """Registers that hold tiles of matrices, and multiply them exactly: uint8 by int8 into int32.

    Attributes:
        name: as kernels report it.
        tiles: how many registers.
        rows: of a tile of pixels or sums.
        depth: groups of four channels in a row of pixels, and rows of a tile of weights.
        latency: cycles until a sum can be added to again.
        l2_bytes_a_cycle: of weights, as streams of them come from the second-level cache.
        registers: (tiles of pixels, of channels, rows, depth) of a block -> its registers.
    """

    name: str
    tiles: int
    rows: int
    depth: int
    latency: int
    l2_bytes_a_cycle: int
    registers: Callable[[int, int, int, int], TileRegisters]


@dataclass(frozen=True)
class InstructionSet:
    """The row of facts that turns the shared CPU generators into one processor's kernels.

    Attributes:
        storage: how activations are stored; uint8 means q + 128 (x86 multiplies u8 by s8).
        lanes: int32 lanes of a vector register.
        registers: vector registers.
        dots: ways to take dot products, best first; the first exact one for the weights is used.
        narrows: ways to store several vectors at once, largest first; what is left is stored one by one.
        tap_dots: exact dot products at each width, widest first; empty where it has none.
        lookup: (table of 16 float32, 16 int32) -> the entries that the low four bits choose; None where it has none.
        bfloat16: multiplies bfloat16 in one instruction; None where it takes float32's.
        matrix: its matrix unit; None where it has none.
        issue: how many vectors its processors load or multiply in a cycle: one number for each kind that there is.
        l1_bytes, l2_bytes: caches of one core, for choosing tiles and the loop order.
    """

    storage: Storage
    lanes: int
    registers: int
    dots: tuple[DotProduct, ...]
    narrows: tuple[Narrow, ...] = ()
    tap_dots: tuple[TapDot, ...] = ()
    lookup: Callable[[Any, Any], Any] | None = None
    bfloat16: Products | None = None
    matrix: MatrixUnit | None = None
    issue: tuple[int, ...] = (1,)
    l1_bytes: int = 32 << 10
    l2_bytes: int = 1 << 20

    @property
    def offset(self) -> int:
        """stored value - int8 value."""
        return 128 if self.storage == "uint8" else 0

    @property
    def whole_words(self) -> bool:
        """Whether its kernels read four bytes of a pixel at once, so that every pixel takes a multiple of them."""
        return self.matrix is not None

    def dot_for(self, weight: np.ndarray) -> DotProduct:
        """The fastest dot product that is exact for `weight` (..., channels, 4)."""
        return next(dot for dot in self.dots if dot.exact_for(weight))

    def narrows_for(self, vectors: int) -> list[Narrow | None]:
        """How a row of `vectors` is stored: None stands for one vector by itself."""
        taken: list[Narrow | None] = []
        for narrow in self.narrows:
            taken += [narrow] * (vectors // narrow.count)
            vectors %= narrow.count
        return taken + [None] * vectors


@dataclass(frozen=True)
class Target:
    """A processor to compile for.

    Attributes:
        name: as the user writes it.
        machine: "x86_64" or "aarch64", as `platform.machine()` names it.
        features: processor features that an artifact for it needs (see `qcompile.device`).
        tvm: the TVM target, as the dict that tvm.target.Target takes.
        isa: drives the kernel generators.
        linkers: commands that can link its objects, in order of preference.
        rank: which of several targets a device can run is best: the highest.
    """

    name: str
    machine: str
    features: tuple[str, ...]
    tvm: dict[str, Any]
    isa: InstructionSet
    linkers: tuple[str, ...]
    rank: int
