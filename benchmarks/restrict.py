"""A library that chooses its kernels by the cpuid instruction, made to see a processor with AVX2 and no more.

Where neither the library nor the system has a switch for this, its instructions are: in a copy of the
library every `cpuid` becomes an invalid instruction of the same length, and a signal handler
(`cpuid.c`) answers in its place, with AVX512, AVX-VNNI and AMX left out. All else stays as it was.
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import ExtensionFileLoader
from pathlib import Path

CPUID, INVALID = b"\x0f\xa2", b"\x0f\x0a"
HANDLER = Path(__file__).with_name("cpuid.c")


def restrict(library: Path, folder: Path) -> Path:
    """Write to `folder` a copy of `library` that takes the processor for one with AVX2, and what it needs."""
    copy = folder / library.name
    if not copy.exists():
        code = bytearray(library.read_bytes())
        for place in _places(library):
            assert code[place : place + 2] == CPUID
            code[place : place + 2] = INVALID
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", _handler(copy), HANDLER], check=True)
        copy.write_bytes(code)
    return copy


def import_restricted(name: str, copy: Path) -> None:
    """Import the extension module `name` from what `restrict` wrote, before its package would import the original."""
    if name in sys.modules:
        assert sys.modules[name].__file__ == str(copy), f"{name} is loaded already, without restriction"
        return
    ctypes.CDLL(str(_handler(copy)))
    spec = importlib.util.spec_from_file_location(name, copy, loader=ExtensionFileLoader(name, str(copy)))
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def _handler(copy: Path) -> Path:
    return copy.with_name("cpuid.so")


def _places(library: Path) -> list[int]:
    """Where in the file each cpuid stands: found by disassembling, because its bytes also occur inside others."""
    starts = {}  # of each section: from its addresses to places in the file
    for line in _objdump("-h", library):
        match line.split():
            case [number, section, _size, address, _, offset, _] if number.isdigit():
                starts[section] = int(offset, 16) - int(address, 16)
    places, start = [], 0
    for line in _objdump("-d", library):
        if line.startswith("Disassembly of section "):
            start = starts[line.split()[-1].rstrip(":")]
        elif line.endswith("\tcpuid"):
            places.append(int(line.split(":")[0], 16) + start)
    return places


def _objdump(what: str, library: Path) -> Iterator[str]:
    with subprocess.Popen(["objdump", what, library], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from (line.rstrip() for line in process.stdout)
