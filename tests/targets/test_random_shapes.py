"""Convolution kernels of random geometry, numbers, tiles and halos, each called by itself: every element
of the output, its halo included, is the reference's, whatever was in memory before."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import get_args
from unittest import mock

import pytest
from execution import X86
from geometry import Geometry, bounded, geometries, mismatching
from hypothesis import assume, given
from hypothesis import strategies as st

from qcompile.targets import get
from qcompile.targets.base import InstructionSet
from qcompile.targets.cpu import matrix
from qcompile.targets.cpu.conv import conv
from qcompile.targets.cpu.depthwise import DepthwiseConfig, depthwise
from qcompile.targets.cpu.depthwise_dot import DepthwiseDotConfig, depthwise_dot
from qcompile.targets.cpu.epilogue import Requantize
from qcompile.targets.cpu.tasks import Order
from qcompile.targets.cpu.tiles import ConvConfig
from qcompile.targets.filters import ConvShape, Filters
from qcompile.targets.function import Kernel
from qcompile.targets.layout import align

WITHOUT_MATRIX = ["x86-avx512-vnni", "x86-avx2"]  # what others do without a matrix unit, one of these does
WITH_MATRIX = [name for name in X86 if get(name).isa.matrix is not None]


def legal_configs(geometry: Geometry, lanes: int) -> st.SearchStrategy[ConvConfig]:
    """Tiles whose blocks of channels divide the output's vectors; too large ones spill, and are still right."""
    vectors = align(geometry.out_channels, lanes) // lanes
    return st.builds(
        ConvConfig,
        rows=st.integers(1, 12),
        vectors=st.sampled_from([v for v in range(1, 5) if vectors % v == 0]),
        order=st.sampled_from(get_args(Order)),
    )


@pytest.mark.parametrize("target", WITHOUT_MATRIX)
@bounded
@given(data=st.data(), geometry=geometries())
def test_a_convolution_is_right_for_every_shape_and_tile(target: str, geometry: Geometry, data: st.DataObject) -> None:
    config = data.draw(st.none() | legal_configs(geometry, get(target).isa.lanes))
    assert mismatching(geometry, target, partial(conv, config=config)) == 0


@pytest.mark.parametrize("target", WITHOUT_MATRIX)
@bounded
@given(data=st.data(), geometry=geometries(), channels=st.integers(1, 18))
def test_a_row_of_taps_without_bytes_between_them_is_summed_as_one(
    target: str, geometry: Geometry, channels: int, data: st.DataObject
) -> None:
    (rows, columns), (down, _) = geometry.kernel, geometry.dilation
    kernel, size = (rows, columns + 1), (geometry.size[0], geometry.size[1] + 1)
    geometry = replace(geometry, channels=channels, size=size, kernel=kernel, dilation=(down, 1), groups=1, tight=True)
    config = data.draw(st.none() | legal_configs(geometry, get(target).isa.lanes))
    assert mismatching(geometry, target, partial(conv, config=config)) == 0


@pytest.mark.parametrize("target", [name for name in WITHOUT_MATRIX if get(name).isa.tap_dots])
@bounded
@given(
    geometry=geometries(depthwise=True),
    config=st.builds(DepthwiseDotConfig, rows=st.integers(1, 4), columns=st.integers(1, 9)),
)
def test_a_depthwise_convolution_by_dot_products_is_right_for_every_shape_and_tile(
    target: str, geometry: Geometry, config: DepthwiseDotConfig
) -> None:
    rows = min(config.rows, geometry.out[0])
    generate = partial(depthwise_dot, config=DepthwiseDotConfig(rows, config.columns))
    assert mismatching(geometry, target, generate) == 0


@pytest.mark.parametrize("target", WITHOUT_MATRIX)
@bounded
@given(geometry=geometries(depthwise=True), config=st.builds(DepthwiseConfig, pixels=st.integers(1, 16)))
def test_a_depthwise_convolution_is_right_for_every_shape_and_tile(
    target: str, geometry: Geometry, config: DepthwiseConfig
) -> None:
    assert mismatching(geometry, target, partial(depthwise, config=config)) == 0


@pytest.mark.parametrize("target", WITH_MATRIX)
@bounded
@given(
    geometry=geometries(),
    width=st.integers(0, 40),
    channels=st.integers(1, 150),
    number=st.integers(0, 60),
    order=st.sampled_from(get_args(Order)),
)
def test_a_convolution_on_a_matrix_unit_is_right_for_every_shape_block_and_order(
    target: str, geometry: Geometry, width: int, channels: int, number: int, order: Order
) -> None:
    size = geometry.size[0], geometry.size[1] + width
    geometry = replace(geometry, size=size, channels=channels, groups=1, tight=False)

    def generate(shape: ConvShape, filters: Filters, numbers: Requantize, isa: InstructionSet) -> Kernel:
        assume(matrix.suits(shape, isa))
        blocks = matrix.configs(shape, filters, isa)
        with mock.patch.object(matrix, "best_order", return_value=order):
            return matrix.conv(shape, filters, numbers, isa, config=blocks[number % len(blocks)])

    assert mismatching(geometry, target, generate) == 0
