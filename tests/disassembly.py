"""The instructions of a shared object, as binutils' objdump shows them."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from qcompile.artifact import Variant

_SYMBOL = re.compile(r"[0-9a-f]+ <(.+)>:")
_LINE = re.compile(r"\s*([0-9a-f]+):\t([0-9a-f ]+)\t(\S+)\s*([^#/<]*)(?:<|#|//|$)")
# A jump's own target comes last: "ne 4f20", "w3, 4f20" or "x3, #5, 4f20".
_TARGET = re.compile(r"([0-9a-f]+)\s*$")
_JUMP = re.compile(r"j[a-z]+|b|b\..+|cbn?z|tbn?z")


@dataclass(frozen=True)
class Instruction:
    """One instruction; `encoding` holds its bytes as objdump prints them."""

    address: int
    encoding: str
    mnemonic: str
    operands: str

    def __str__(self) -> str:
        return f"{self.address:x}: {self.mnemonic} {self.operands}"

    @property
    def jumps_to(self) -> int | None:
        found = _TARGET.search(self.operands) if _JUMP.fullmatch(self.mnemonic) else None
        return int(found[1], 16) if found else None


Code = Sequence[Instruction]


def functions(variant: Variant) -> dict[str, list[Instruction]]:
    """Symbol -> instructions. Skips the test where binutils for the machine are missing."""
    command = f"{variant.machine}-linux-gnu-objdump"
    if shutil.which(command) is None:
        pytest.skip(f"{command} is not installed")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "library.so")
        path.write_bytes(variant.library)
        shown = subprocess.run([command, "-d", "-w", path], capture_output=True, text=True, check=True).stdout
    found: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in shown.splitlines():
        if symbol := _SYMBOL.match(line):
            code = found.setdefault(symbol[1], [])
        elif part := _LINE.match(line):
            code.append(Instruction(int(part[1], 16), part[2].strip(), part[3], part[4].strip()))
    return found


def innermost_loops(code: Code) -> list[list[Instruction]]:
    """The bodies of the loops that hold no other loop: what lies between a backward jump and its target."""
    spans = [(i.jumps_to, i.address) for i in code if i.jumps_to is not None and i.jumps_to <= i.address]
    inner = [
        span
        for span in spans
        if not any(other != span and span[0] <= other[0] and other[1] <= span[1] for other in spans)
    ]
    return [[i for i in code if first <= i.address <= last] for first, last in inner]
