"""Convolution kernels of GPUs of random geometry, numbers, tiles and halos, each called by itself on the emulated GPU:
every element of the output, its halo included, is the reference's, whatever was in memory before."""

from __future__ import annotations

from dataclasses import replace

import cuda_emulator
import numpy as np
import pytest
from geometry import Geometry, bounded, geometries, mismatching
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.targets.base import Target
from qcompile.targets.cpu.epilogue import Requantize
from qcompile.targets.cuda.compile import source_of
from qcompile.targets.cuda.convolution import TILES, Tile, convolution, generator_for
from qcompile.targets.cuda.launch import Long
from qcompile.targets.filters import ConvShape, Filters
from qcompile.targets.function import Kernel
from qcompile.targets.layout import NO_HALO, Layout
from qcompile.targets.nvidia import SM_80, SM_90, Gpu

pytestmark = pytest.mark.skipif(cuda_emulator.available() is not None, reason=str(cuda_emulator.available()))
CONSTANTS = ("weight", "bias", "m", "tickets")
DOTS, TENSORS, TURING = "cuda-sm_61", "cuda-sm_80", "cuda-sm_75"
# Every entry point that an example needs is compiled by g++, which takes longer than to run it.
few = settings(bounded, max_examples=5)
TARGETS = [TENSORS, DOTS, pytest.param(TURING, marks=pytest.mark.slow)]


def launched(
    kernel: Kernel, target: Target, inputs: list[np.ndarray], size: int, rng: np.random.Generator
) -> np.ndarray:
    """The output of `kernel`, whose memory held random bytes."""
    output = rng.integers(-128, 128, size, np.int8)
    names = dict(zip(("x", "residual"), inputs, strict=False)) | dict(zip(CONSTANTS, kernel.constants, strict=False))
    for entry, launch in kernel.launches:
        library = cuda_emulator.compile_device(source_of([entry]), [entry.name])
        arrays = [np.array(names[name]) for name in launch.buffers]
        numbers = [n.value if isinstance(n, Long) else n for n in launch.numbers]
        blocks = [int(extent) for extent in launch.blocks]
        scratch = [rng.integers(-(1 << 31), 1 << 31, kernel.scratch, np.int32)] if kernel.scratch else []
        parameters = [*arrays, output, *scratch, *numbers]
        cuda_emulator.run(library, entry.name, blocks, launch.threads, launch.shared_bytes, parameters)
        tickets = [array for name, array in zip(launch.buffers, arrays, strict=True) if name == "tickets"]
        assert not any(array.any() for array in tickets), "counters are not zero again"
    return output


def words(shape: ConvShape) -> ConvShape:
    """`shape` with pixels of four bytes where these are enough, as the first convolution of a network has them."""
    few = shape.x.channels <= 4 and shape.groups == 1
    return replace(shape, x=replace(shape.x, pitch=4)) if few else shape


def mistakes(geometry: Geometry, target: str, number: int | None) -> int:
    """How many elements are wrong with a config: the default, or one that `number` chooses."""

    def generate(shape: ConvShape, filters: Filters, numbers: Requantize, gpu: Gpu) -> Kernel:
        generator = generator_for(shape, gpu)
        configs = generator.configs(shape, filters, gpu)
        config = None if number is None else configs[number % len(configs)]
        return generator.kernel(shape, filters, numbers, gpu, (), config)

    return mismatching(geometry, target, generate, launched, words)


@pytest.mark.parametrize("target", TARGETS)
@few
@given(geometry=geometries(), number=st.none() | st.integers(0, 39))
def test_a_convolution_is_right_for_every_shape_and_tile(target: str, geometry: Geometry, number: int | None) -> None:
    assert mistakes(geometry, target, number) == 0


@pytest.mark.parametrize("target", TARGETS)
@few
@given(geometry=geometries(), channels=st.integers(1, 4), number=st.none() | st.integers(0, 39))
def test_a_first_layer_is_right(target: str, geometry: Geometry, channels: int, number: int | None) -> None:
    assert mistakes(replace(geometry, channels=channels, groups=1, tight=True), target, number) == 0


@pytest.mark.parametrize("target", [TENSORS, DOTS])
@few
@given(geometry=geometries(), groups=st.integers(2, 4), per_group=st.tuples(st.integers(1, 3), st.integers(1, 4)))
def test_groups_of_whole_chunks_go_by_tiles(
    target: str, geometry: Geometry, groups: int, per_group: tuple[int, int]
) -> None:
    channels, outputs = (16 * groups * chunks for chunks in per_group)
    geometry = replace(geometry, channels=channels, out_channels=outputs, groups=groups, slack=0)
    assert mistakes(geometry, target, geometry.seed) == 0


@few
@given(geometry=geometries(depthwise=True))
def test_a_depthwise_convolution_is_right_for_every_shape(geometry: Geometry) -> None:
    assert mistakes(geometry, TENSORS, None) == 0


@pytest.mark.parametrize("target", [TENSORS, DOTS])
@few
@given(geometry=geometries(), rows=st.integers(1, 8), channels=st.integers(1, 300), outputs=st.integers(1, 70))
def test_a_product_of_few_rows_is_right(
    target: str, geometry: Geometry, rows: int, channels: int, outputs: int
) -> None:
    geometry = replace(
        geometry,
        batch=rows,
        channels=channels,
        out_channels=outputs,
        size=(1, 1),
        kernel=(1, 1),
        stride=(1, 1),
        padding=NO_HALO,
        dilation=(1, 1),
        groups=1,
        extra=NO_HALO,
        halo=NO_HALO,
        tight=False,
    )
    assert mistakes(geometry, target, None) == 0


@pytest.mark.slow
@pytest.mark.parametrize("target", [TENSORS, DOTS, TURING])
@pytest.mark.parametrize("residual", [False, True])
def test_every_tile_and_share_is_right(target: str, residual: bool) -> None:
    deep = Geometry(
        batch=2,
        channels=300,
        size=(9, 11),
        out_channels=200,
        kernel=(3, 3),
        stride=(1, 1),
        padding=(1, 1, 1, 1),
        dilation=(1, 1),
        groups=1,
        residual=residual,
        extra=NO_HALO,
        halo=(1, 0, 2, 1),
        slack=0,
        tight=False,
        seed=5,
    )
    numbers = range(40 if target == TENSORS else 12)
    assert [number for number in numbers if mistakes(deep, target, number)] == []


def test_counters_are_written_to_and_share_their_memory_with_no_constant() -> None:
    """Equal constants of one type are one in memory: biases that are all zero, where there are as many as tiles."""
    layout = Layout((1, 64, 32, 32), True, 64, NO_HALO)
    shape = ConvShape(layout, layout, None, (1, 1), (1, 1), (0, 0), (1, 1), 1)
    filters = Filters(np.ones((64, 64, 1, 1), np.int8), np.zeros(64, np.int32), np.ones(64, np.float32), 0)
    *others, tickets = convolution(shape, filters, Requantize(0), SM_80, (), Tile(16, 64, 1, 4, 2)).constants
    assert len(others) == 3
    assert tickets.dtype not in {constant.dtype for constant in others}


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "shared"),
    [(8192, 8192, 8192, False), (6144, 6144, 6144, False), (4096, 3072, 768, False), (49, 4608, 512, True)],
)
@pytest.mark.parametrize("gpu", [SM_80, SM_90])
def test_blocks_share_a_sum_only_where_there_are_few_of_them(
    gpu: Gpu, rows: int, inputs: int, outputs: int, shared: bool
) -> None:
    """What they write of it for one another goes through memory."""
    x, y = (Layout((rows, channels), False, channels) for channels in (inputs, outputs))
    shape = ConvShape(x, y, None, (1, 1), (1, 1), (0, 0), (1, 1), 1)
    any_filters = Filters(np.ones((1, 1, 1, 1), np.int8), np.zeros(1, np.int32), np.ones(1, np.float32), 0)
    best = TILES.configs(shape, any_filters, gpu)[0]
    assert (best.shares > 1) == shared
