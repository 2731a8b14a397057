"""Convolution kernels of random geometry, numbers, tiles and halos, each called by itself: every element
of the output, its halo included, is the reference's, whatever was in memory before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from direct import call
from execution import X86, skip_unless_runnable
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from samples import weighted_numbers
from torch import Tensor

from qcompile.ops.conv import CONV2D
from qcompile.ops.row import random_int8
from qcompile.targets import get
from qcompile.targets.base import InstructionSet
from qcompile.targets.cpu import matrix
from qcompile.targets.cpu.conv import conv
from qcompile.targets.cpu.depthwise import DepthwiseConfig, depthwise
from qcompile.targets.cpu.depthwise_dot import DepthwiseDotConfig, depthwise_dot
from qcompile.targets.cpu.epilogue import Requantize
from qcompile.targets.cpu.tiles import ConvConfig
from qcompile.targets.filters import ConvShape, Filters
from qcompile.targets.function import Kernel
from qcompile.targets.layout import NO_HALO, Layout, align
from qcompile.targets.stored import stored, wrong

bounded = settings(
    max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
WITHOUT_MATRIX = ["x86-avx512-vnni", "x86-avx2"]  # what others do without a matrix unit, one of these does
WITH_MATRIX = [name for name in X86 if get(name).isa.matrix is not None]
Halo = tuple[int, int, int, int]
Generate = Callable[[ConvShape, Filters, Requantize, InstructionSet], Kernel]
HALOS = st.one_of(st.just(NO_HALO), st.tuples(*[st.integers(0, 3)] * 4))


@dataclass(frozen=True)
class Geometry:
    """One convolution, and the margins of memory around its input, output and residual."""

    batch: int
    channels: int
    size: tuple[int, int]
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    residual: bool
    extra: Halo  # of the input, beyond the padding
    halo: Halo  # of the output
    slack: int  # vectors of unused channels in every pixel of the output
    tight: bool  # no unused channels in any pixel of the input, where the kernel allows that
    seed: int

    @property
    def out(self) -> tuple[int, int]:
        spans = (
            self.size[i] + self.padding[2 * i] + self.padding[2 * i + 1] - self.dilation[i] * (self.kernel[i] - 1) - 1
            for i in (0, 1)
        )
        height, width = (span // s + 1 for span, s in zip(spans, self.stride, strict=True))
        return height, width


@st.composite
def geometries(draw: st.DrawFn, depthwise: bool = False) -> Geometry:
    """Mostly small; kernels may be larger than the image, strides larger than the kernel."""
    pair = lambda most: (draw(st.integers(1, most)), draw(st.integers(1, most)))  # noqa: E731
    groups = draw(st.integers(2, 150)) if depthwise else draw(st.sampled_from([1, 1, 2, 3, 5, 7]))
    per_in, per_out = (1, 1) if depthwise else (draw(st.integers(1, 40)), draw(st.integers(1, 70 // groups)))
    geometry = Geometry(
        batch=draw(st.integers(1, 7)),
        channels=groups * per_in,
        size=pair(14),
        out_channels=groups * per_out,
        kernel=pair(5),
        stride=pair(4),
        padding=draw(st.tuples(*[st.integers(0, 4)] * 4)),
        dilation=pair(3),
        groups=groups,
        residual=draw(st.booleans()),
        extra=draw(HALOS),
        halo=draw(HALOS),
        slack=draw(st.integers(0, 1)),
        tight=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )
    assume(all(extent > 0 for extent in geometry.out))
    return geometry


def legal_configs(geometry: Geometry, lanes: int) -> st.SearchStrategy[ConvConfig]:
    """Tiles whose blocks of channels divide the output's vectors; too large ones spill, and are still right."""
    vectors = align(geometry.out_channels, lanes) // lanes
    return st.builds(
        ConvConfig,
        rows=st.integers(1, 12),
        vectors=st.sampled_from([v for v in range(1, 5) if vectors % v == 0]),
        channels_outer=st.booleans(),
    )


def mismatching(geometry: Geometry, target: str, generate: Generate) -> int:
    """How many elements of the output of the kernel that `generate` makes, halo included, are not the reference's."""
    skip_unless_runnable(target)
    where = get(target)
    isa, g, rng = where.isa, torch.Generator().manual_seed(geometry.seed), np.random.default_rng(geometry.seed)
    x = random_int8(g, geometry.batch, geometry.channels, *geometry.size)
    weight_shape = (geometry.out_channels, geometry.channels // geometry.groups, *geometry.kernel)
    residual = random_int8(g, geometry.batch, geometry.out_channels, *geometry.out) if geometry.residual else None
    (weight, bias, m, x_zp, zp, lo, hi), numbers = weighted_numbers(g, weight_shape, residual is not None)
    places = (list(v) for v in (geometry.stride, geometry.padding, geometry.dilation))
    want = CONV2D.op(
        x,
        weight,
        bias,
        m,
        x_zp,
        zp,
        lo,
        hi,
        *places,
        geometry.groups,
        **({"residual": residual} if residual is not None else {}),
        **numbers,
    )
    x_layout = _layout(x, tuple(p + e for p, e in zip(geometry.padding, geometry.extra, strict=True)), 0)
    y_layout = _layout(want, geometry.halo, geometry.slack)
    other = None if residual is None else _layout(residual, geometry.extra, 1 - geometry.slack)
    shape = ConvShape(
        x_layout,
        y_layout,
        other,
        geometry.kernel,
        geometry.stride,
        (geometry.padding[0], geometry.padding[2]),
        geometry.dilation,
        geometry.groups,
    )
    tight = replace(shape, x=replace(x_layout, pitch=geometry.channels))
    if geometry.tight and tight.joined > 1:
        shape = tight
    requantize = Requantize(zp, lo, hi, numbers.get("residual_m", 0.0), numbers.get("residual_zero_point", 0))
    filters = Filters(weight.numpy(), bias.numpy(), m.numpy(), x_zp)
    kernel = generate(shape, filters, requantize, isa)
    inputs = [stored(x.numpy(), shape.x, x_zp, isa, rng)]
    if residual is not None and other is not None:
        inputs.append(stored(residual.numpy(), other, 0, isa, rng))
    return wrong(call(kernel, where, inputs, y_layout.size, rng), y_layout, want.contiguous().numpy(), zp, isa)


def _layout(x: Tensor, halo: tuple[int, ...], slack: int) -> Layout:
    top, bottom, left, right = halo
    return Layout(tuple(x.shape), True, align(x.shape[1], 16) + 16 * slack, (top, bottom, left, right))


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
@given(geometry=geometries(), width=st.integers(0, 40), channels=st.integers(1, 150), number=st.integers(0, 60))
def test_a_convolution_on_a_matrix_unit_is_right_for_every_shape_and_block(
    target: str, geometry: Geometry, width: int, channels: int, number: int
) -> None:
    size = geometry.size[0], geometry.size[1] + width
    geometry = replace(geometry, size=size, channels=channels, groups=1, tight=False)

    def generate(shape: ConvShape, filters: Filters, numbers: Requantize, isa: InstructionSet) -> Kernel:
        assume(matrix.suits(shape, isa))
        blocks = matrix.configs(shape, filters, isa)
        return matrix.conv(shape, filters, numbers, isa, config=blocks[number % len(blocks)])

    assert mismatching(geometry, target, generate) == 0
