"""What a GPU is told to do, as its own compiler puts it: every entry point that kernels have, with every tile.

No GPU is needed. What no compiler or disassembler here knows is skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from unittest import mock

import gpu_disassembly as shown
import pytest
import torch
from execution import CUDA, operator, program_of
from networks import FULL, Network, images

import qcompile
from qcompile import ops, weights
from qcompile.errors import BuildError
from qcompile.targets import get
from qcompile.targets.cuda import compile as cuda
from qcompile.targets.cuda import convolution, move
from qcompile.targets.cuda.launch import Entry
from qcompile.targets.emitters import emitters_for
from qcompile.targets.layout import Layout, dense
from qcompile.targets.lower import lower
from qcompile.targets.nvidia import Gpu

# sm_89 is compiled like sm_80.
ALL = [pytest.param(name, marks=pytest.mark.slow) if name == "cuda-sm_89" else name for name in CUDA]
TENSOR_CORES = [p for p in ALL if p != "cuda-sm_61"]
# By GPU, one after the other: what is compiled for one is kept by the process that looks at it.
every_gpu = pytest.mark.parametrize("target", ALL, scope="module")
every_tensor_core = pytest.mark.parametrize("target", TENSOR_CORES, scope="module")
# Every way that PTX has to join a float product and a sum.
FUSED = re.compile(r"(?:@!?%p\d+ )?(fma|mad)\.(?!lo|hi|wide)\S*f(16|32|64)")
TILE = re.compile(r"qcompile_(?:split_)?convolution_tile_(\w+?)_(\d+)_(\d+)_(\d+)_(\d+)_(\d+)_(\d+)_(true|false)")


def gpu(target: str) -> Gpu:
    isa = get(target).isa
    assert isinstance(isa, Gpu)
    return isa


@cache
def entries(target: str) -> tuple[Entry, ...]:
    """Of every sample of the op table, and of every tile in place of those that the samples take."""
    emitters = emitters_for(get(target))
    generator = torch.Generator().manual_seed(2026)
    rows = [row for row in ops.ROWS if operator(row) in emitters]
    program, _ = program_of([(operator(row), sample) for row in rows for sample in row.samples(generator)])
    found = lower(program, get(target), emitters).entries
    pixels = Layout((1, 3, 8, 8), True, 4)
    kernels = [move.quantize(dense((1, 3, 8, 8)), "float32", pixels, 1.0, 0, gpu(target)), move.copied((8,), "float32")]
    found += [entry for kernel in kernels for entry, _ in kernel.launches]
    tiled = next(entry for entry in found if entry.function.startswith("convolution<"))
    split = replace(tiled, pointers=(*tiled.pointers[:5], "uint8", "int8", "int32"), read=6)
    depthwise = next(entry for entry in found if entry.function.startswith("depthwise"))
    tiles = [(tile, 16) for tile in convolution.tiles(gpu(target))]
    tiles += [(tiles[-1][0], access) for access in (4, 8)]
    for residual in (False, True):
        for tile, access in tiles:
            shared = tile == tiles[0][0] or tile.tall * tile.wide <= 64 * 64  # few blocks, as few pixels make
            for shares, entry in ((1, tiled), (2, split)) if shared else ((1, tiled),):
                function = replace(tile, shares=shares).function(gpu(target), access, residual)
                found.append(replace(entry, function=function, threads=tile.threads))
        for size, stride in ((3, 1), (3, 2), (5, 1), (5, 2), (0, 0)):
            function = f"depthwise<{convolution.PIXELS}, {size}, {stride}, {str(residual).lower()}>"
            found.append(replace(depthwise, function=function))
    return tuple({entry.name: entry for entry in found}.values())


@cache
def code(target: str) -> bytes:
    try:
        return cuda.compiled(entries(target), gpu(target))
    except BuildError as error:
        if not str(error).startswith("no compiler"):
            raise
        pytest.skip(str(error).splitlines()[0])


@cache
def machine_code(target: str) -> dict[str, list[shown.Instruction]]:
    if target == "cuda-sm_61":
        pytest.skip("no disassembler of today knows sm_61")
    return shown.machine_code(code(target))


def count(code: shown.Code, name: str) -> int:
    return sum(i.is_a(name) for i in code)


def tensor_core_tiles(target: str) -> dict[str, re.Match[str]]:
    return {name: tile for name in machine_code(target) if (tile := TILE.fullmatch(name)) and tile[1] == "tensorcores"}


@every_tensor_core
def test_every_tile_is_multiplied_on_tensor_cores(target: str) -> None:
    """A warp's 16 x 8 sums take two instructions for 64 bytes, and eight of those that Turing has."""
    shape, times = ("IMMA.8816.S8.S8", 8) if target == "cuda-sm_75" else ("IMMA.16832.S8.S8", 2)
    for name, tile in tensor_core_tiles(target).items():
        tall, wide, down, right = map(int, tile.groups()[1:5])
        loop = shown.main_loop(machine_code(target)[name], "IMMA")
        sums = (tall // down // 16) * (wide // right // 8)
        assert count(loop, shape) == count(loop, "IMMA") == times * sums, name
        assert count(loop, "LDSM") == 2 * (tall // down // 16) + 2 * (wide // right // 16), name


@every_tensor_core
def test_tiles_are_copied_past_the_registers_where_the_gpu_can(target: str) -> None:
    for name in tensor_core_tiles(target):
        loop = shown.main_loop(machine_code(target)[name], "IMMA")
        assert (count(loop, "LDGSTS") > 0) == (target != "cuda-sm_75"), name
        assert (count(loop, "LDG") > 0) == (target == "cuda-sm_75"), name


@every_gpu
def test_other_products_are_dot_products_of_four(target: str) -> None:
    others = ("qcompile_linear_rows", "qcompile_depthwise", "qcompile_convolution_tile_dotproducts")
    found = {name: lines for name, lines in shown.ptx(code(target)).items() if name.startswith(others)}
    assert len(found) >= 6
    for name, lines in found.items():
        assert any("dp4a.s32.s32" in line for line in lines), name
        if target != "cuda-sm_61":
            assert count(machine_code(target)[name], "IDP"), name


@every_gpu
def test_floats_are_multiplied_and_added_in_one_step_only_where_the_contract_says_so(target: str) -> None:
    """Once for each result of an addition. (So it is in PTX; machine code also divides integers by such steps.)"""
    found = shown.ptx(code(target))
    assert set(found) == {entry.name for entry in entries(target)}
    for name, lines in found.items():
        fused = [line for line in lines if FUSED.match(line)]
        rounded = [line for line in lines if "cvt.rni.s32.f32" in line]
        adds = name.endswith("_true") or name == "qcompile_binary_add"
        assert len(fused) == (len(rounded) if adds else 0), name
        assert all(line.startswith("fma.rn.f32") for line in fused), name
        assert rounded or not adds, name


@every_gpu
def test_all_that_a_thread_holds_is_in_registers(target: str) -> None:
    found = shown.resources(code(target))
    assert set(found) == {entry.name for entry in entries(target)}
    assert [name for name, taken in found.items() if taken.stack or taken.local] == []


@pytest.mark.slow
@pytest.mark.parametrize("network", FULL, ids=str)
def test_networks_have_no_other_entry_points(network: Network) -> None:
    """But for the bytes that a tile is copied by, which are tried with one tile."""
    with mock.patch.object(weights, "_RATIOS", 1):  # any weights will do
        program = qcompile.quantize(network.build().eval(), calibration=[images(1, network.size, seed=4)]).program

    def names(found: Iterable[Entry]) -> set[str]:
        return {re.sub(r"(tile_.*)_(4|8)_(true|false)", r"\1_16_\3", entry.name) for entry in found}

    for target in CUDA:
        assert names(lower(program, get(target), emitters_for(get(target))).entries) <= names(entries(target))
