"""The kernel that measures the machine's limit multiplies as often as it says."""

from __future__ import annotations

from itertools import takewhile

import pytest
from execution import CPUS
from tvm import tirx

from qcompile.targets import get
from qcompile.targets.cpu.peak import REPEAT, peak_instruction, peak_kernel

# Multiply-accumulates of one instruction: Intel's and Arm's manuals.
MACS = {"tdpbusd": 16 * 16 * 64, "vpdpbusd": 16 * 4, "sdot": 4 * 4}
INSTRUCTIONS = {
    "x86-amx": "tdpbusd",
    "x86-avx512-vnni": "vpdpbusd",
    "x86-avx512-bf16": "vpdpbusd",
    "arm64-dotprod": "sdot",
}


def products(func: tirx.PrimFunc) -> int:
    """How many there are in the loop of the function."""
    before, loop = str(func).split(f"range({REPEAT}):\n")
    indentation = len(before.splitlines()[-1]) - len(before.splitlines()[-1].lstrip())
    body = takewhile(lambda line: line.startswith(" " * (indentation + 1)), loop.splitlines())
    return sum("_dot_" in line or "vpdpbusd" in line or "sdot" in line for line in body)


@pytest.mark.parametrize("target", CPUS)
@pytest.mark.parametrize("threads", [1, 3])
def test_its_multiply_accumulates_are_those_of_its_instructions(target: str, threads: int) -> None:
    made, instruction = peak_kernel(get(target), threads), INSTRUCTIONS.get(target)
    assert peak_instruction(get(target).isa) == instruction
    assert (made is None) == (instruction is None)
    if made is not None and instruction is not None:
        assert made.macs == threads * REPEAT * products(made.func) * MACS[instruction]
