"""Code for GPUs, as NVIDIA's cuobjdump shows it: machine code, the PTX beside it, and what a thread takes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

_FUNCTION = re.compile(r"\s*Function : (\S+)")
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_ENTRY = re.compile(r"^\.visible \.entry (\w+)\(")
_RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)")
_BACK = re.compile(r"0x([0-9a-f]+)\s*$")


@dataclass(frozen=True)
class Instruction:
    """One instruction; `predicate`: under which it is executed, such as "!P0"."""

    address: int
    predicate: str
    mnemonic: str
    operands: str

    def __str__(self) -> str:
        return f"{self.address:x}: {self.mnemonic} {self.operands}"

    def is_a(self, name: str) -> bool:
        """Whether it is `name`, or that with modifiers."""
        return self.mnemonic == name or self.mnemonic.startswith(f"{name}.")


@dataclass(frozen=True)
class Resources:
    """Of a thread: registers, and bytes of memory that stand in for them."""

    registers: int
    stack: int
    local: int


Code = Sequence[Instruction]


def machine_code(device_code: bytes) -> dict[str, list[Instruction]]:
    """Entry point -> instructions."""
    found: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in _shown(device_code, "-sass").splitlines():
        if function := _FUNCTION.match(line):
            code = found.setdefault(function[1], [])
        elif part := _INSTRUCTION.match(line):
            code.append(Instruction(int(part[1], 16), part[2] or "", part[3], part[4].strip()))
    return found


def ptx(device_code: bytes) -> dict[str, list[str]]:
    """Entry point -> lines of PTX."""
    text = device_code.decode() if device_code.startswith(b"//") else _shown(device_code, "-ptx")
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if entry := _ENTRY.match(line):
            lines = found.setdefault(entry[1], [])
        lines.append(line.strip())
    return found


def resources(device_code: bytes) -> dict[str, Resources]:
    """Entry point -> what it takes."""
    rows = _RESOURCES.findall(_shown(device_code, "-res-usage"))
    return {name: Resources(*map(int, numbers)) for name, *numbers in rows}


def main_loop(code: Code, holds: str) -> list[Instruction]:
    """The smallest loop that holds all the instructions `holds` that any loop holds."""
    loops = []
    for last in code:
        target = _BACK.search(last.operands) if last.is_a("BRA") else None
        if target and int(target[1], 16) < last.address:
            loops.append([i for i in code if int(target[1], 16) <= i.address <= last.address])
    return max(loops, key=lambda loop: (sum(i.is_a(holds) for i in loop), -len(loop)), default=[])


def _shown(device_code: bytes, option: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "code.fatbin")
        path.write_bytes(device_code)
        command = [_tool("cuobjdump"), option, str(path)]
        environment = {**os.environ, "PATH": f"{Path(_tool('nvdisasm')).parent}{os.pathsep}{os.environ['PATH']}"}
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def _tool(name: str) -> str:
    """The path of a program of NVIDIA's packages. Skips the test where it is missing."""
    spec = PathFinder.find_spec("nvidia")
    folders = list((spec.submodule_search_locations if spec else None) or ())
    path = os.pathsep.join(os.path.join(folder, "cu13", "bin") for folder in folders)
    found = shutil.which(name, path=path) or shutil.which(name)
    if found is None:
        pytest.skip(f"not installed: {name} (pip install nvidia-cuda-{name})")
    return found
