"""AMX: the tile registers of x86, as instructions that a kernel may call.

Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18. There are eight registers of up
to 16 rows x 64 bytes; TDPBUSD adds the product of rows of uint8 words and columns of int8 words to sums of int32.
TVM has no type for such a register, so each instruction is a function in LLVM IR, its registers written into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

TILES, ROWS, LINE = 8, 16, 64  # registers; rows of one; bytes of a row
_PALETTE = 1

_MOVES = """
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.tilerelease()
declare void @llvm.x86.tileloadd64(i8, ptr, i64)
declare void @llvm.x86.tilestored64(i8, ptr, i64)
declare void @llvm.x86.tdpbusd(i8, i8, i8)
define internal i32 @qcompile_amx_end() alwaysinline {
  call void @llvm.x86.tilerelease()
  ret i32 0
}
"""

_PREFETCH = """
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
define internal i32 @qcompile_amx_prefetch(ptr %memory) alwaysinline {
  call void @llvm.prefetch.p0(ptr %memory, i32 0, i32 2, i32 1)
  ret i32 0
}
"""

_ROW = """
define internal ptr @qcompile_amx_aligned(ptr %memory) alwaysinline {
  %address = ptrtoint ptr %memory to i64
  %below = sub i64 0, %address
  %skip = and i64 %below, 63
  %aligned = getelementptr i8, ptr %memory, i64 %skip
  ret ptr %aligned
}
define internal <16 x i32> @qcompile_amx_row(ptr %memory, i64 %row) alwaysinline {
  %place = getelementptr <16 x i32>, ptr %memory, i64 %row
  %sums = load <16 x i32>, ptr %place, align 64
  ret <16 x i32> %sums
}
"""

_LOAD = """
define internal i32 @qcompile_amx_load_{tile}(ptr %memory, i64 %stride) alwaysinline {{
  call void @llvm.x86.tileloadd64(i8 {tile}, ptr %memory, i64 %stride)
  ret i32 0
}}
"""

_STORE = """
define internal i32 @qcompile_amx_store_{tile}(ptr %memory, i64 %row) alwaysinline {{
  %place = getelementptr <16 x i32>, ptr %memory, i64 %row
  call void @llvm.x86.tilestored64(i8 {tile}, ptr %place, i64 64)
  ret i32 0
}}
"""

_DOT = """
define internal i32 @qcompile_amx_dot_{acc}_{x}_{w}() alwaysinline {{
  call void @llvm.x86.tdpbusd(i8 {acc}, i8 {x}, i8 {w})
  ret i32 0
}}
"""

_BEGIN = """
@{name}_shapes = internal constant [64 x i8] c"{shapes}", align 64
define internal i32 @{name}() alwaysinline {{
  call void @llvm.x86.ldtilecfg(ptr @{name}_shapes)
  ret i32 0
}}
"""


def _call(name: str, *args: Any) -> None:
    T.evaluate(T.call_extern("int32", f"qcompile_amx_{name}", *args))


@dataclass(frozen=True)
class AmxRegisters:
    """The registers of a block of `tall` x `wide` sums, each `rows` x 16, over steps of `depth` words.

    First the sums, then the pixels of each row of the block; the weights take turns in what is left.
    """

    tall: int
    wide: int
    rows: int
    depth: int

    def _sum(self, i: int, j: int) -> int:
        return i * self.wide + j

    def _pixels(self, i: int) -> int:
        return self.tall * self.wide + i

    def _weights(self, j: int) -> int:
        first = self.tall * (self.wide + 1)
        return first + j % (TILES - first)

    @property
    def _begin(self) -> str:
        return f"begin_{self.tall}_{self.wide}_{self.rows}_{self.depth}"

    @property
    def code(self) -> str:
        """LLVM IR of the functions that the methods call; functions of one name are the same."""
        shapes = dict.fromkeys((self._sum(i, j) for i in range(self.tall) for j in range(self.wide)), (self.rows, LINE))
        shapes |= {self._pixels(i): (self.rows, 4 * self.depth) for i in range(self.tall)}
        shapes |= {self._weights(j): (self.depth, LINE) for j in range(self.wide)}
        words = bytearray(64)  # the palette; from byte 16 the bytes of a row of each register; from byte 48 its rows
        words[0] = _PALETTE
        for tile, (rows, width) in shapes.items():
            words[16 + 2 * tile], words[48 + tile] = width, rows
        text = "".join(f"\\{byte:02X}" for byte in words)
        return "".join(
            [
                _MOVES,
                _PREFETCH,
                _ROW,
                _BEGIN.format(name=f"qcompile_amx_{self._begin}", shapes=text),
                *(move.format(tile=tile) for move in (_LOAD, _STORE) for tile in range(TILES)),
                *(
                    _DOT.format(acc=self._sum(i, j), x=self._pixels(i), w=self._weights(j))
                    for i in range(self.tall)
                    for j in range(self.wide)
                ),
            ]
        )

    def begin(self) -> None:
        """Shape the registers; whatever they held is lost."""
        _call(self._begin)

    def end(self) -> None:
        """Give them back: the system need not save them any more."""
        _call("end")

    def load_sum(self, i: int, j: int, memory: Any, stride: Any) -> None:
        """From int32 at `memory`, rows `stride` bytes apart."""
        _call(f"load_{self._sum(i, j)}", memory, T.int64(stride))

    def load_pixels(self, i: int, memory: Any, stride: Any) -> None:
        """From uint8 at `memory`, pixels `stride` bytes apart."""
        _call(f"load_{self._pixels(i)}", memory, T.int64(stride))

    def load_weights(self, j: int, memory: Any, stride: Any) -> None:
        """From int8 at `memory`, groups of four channels `stride` bytes apart."""
        _call(f"load_{self._weights(j)}", memory, T.int64(stride))

    def prefetch(self, memory: Any) -> None:
        """Ask for a line of memory in the second-level cache; it need not exist."""
        _call("prefetch", memory)

    def multiply(self, i: int, j: int) -> None:
        """Add the products of pixels i and weights j to sum (i, j)."""
        _call(f"dot_{self._sum(i, j)}_{self._pixels(i)}_{self._weights(j)}")

    def memory(self, count: int) -> Any:
        """On the stack, for the sums of `count` registers, a line of memory for each row. (Of what TVM allocates by
        itself, only less than 1 KiB is on the stack.)"""
        words = count * self.rows * LINE // 8 + 7
        place = T.tvm_stack_alloca("shape", words)
        return T.bind(T.call_extern("handle", "qcompile_amx_aligned", place))

    def store_sum(self, i: int, j: int, memory: Any, slot: Any) -> None:
        """To register number `slot` of `memory`."""
        _call(f"store_{self._sum(i, j)}", memory, T.cast(slot * self.rows, "int64"))

    def sums(self, memory: Any, slot: Any, row: Any) -> Any:
        """A row of register number `slot` of `memory`: int32x16."""
        return T.call_extern("int32x16", "qcompile_amx_row", memory, T.cast(slot * self.rows + row, "int64"))
