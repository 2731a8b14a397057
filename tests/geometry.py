"""Convolutions of random geometry, numbers and halos for tests of single kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from direct import call
from execution import skip_unless_runnable
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from samples import weighted_numbers
from torch import Tensor

from qcompile.ops.conv import CONV2D
from qcompile.ops.row import random_int8
from qcompile.targets import get
from qcompile.targets.base import Target
from qcompile.targets.cpu.epilogue import Requantize
from qcompile.targets.filters import ConvShape, Filters
from qcompile.targets.function import Kernel
from qcompile.targets.layout import NO_HALO, Layout, align
from qcompile.targets.stored import stored, wrong

bounded = settings(
    max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
Halo = tuple[int, int, int, int]
Generate = Callable[[ConvShape, Filters, Requantize, Any], Kernel]
Run = Callable[[Kernel, Target, list[np.ndarray], int, np.random.Generator], np.ndarray]
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


def without_bytes_between(shape: ConvShape) -> ConvShape:
    """`shape` with pixels of its input that have no bytes between them, where a kernel for CPUs can take these."""
    tight = replace(shape, x=replace(shape.x, pitch=shape.x.channels))
    return tight if tight.joined > 1 else shape


def mismatching(
    geometry: Geometry,
    target: str,
    generate: Generate,
    run: Run = call,
    tighten: Callable[[ConvShape], ConvShape] = without_bytes_between,
) -> int:
    """How many elements of the output of the kernel that `generate` makes, halo included, are not the reference's.

    `run`: calls a kernel. `tighten`: what becomes of the geometry where its input shall be tight.
    """
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
    if geometry.tight:
        shape = tighten(shape)
    requantize = Requantize(zp, lo, hi, numbers.get("residual_m", 0.0), numbers.get("residual_zero_point", 0))
    filters = Filters(weight.numpy(), bias.numpy(), m.numpy(), x_zp)
    kernel = generate(shape, filters, requantize, isa)
    inputs = [stored(x.numpy(), shape.x, x_zp, isa, rng)]
    if residual is not None and other is not None:
        inputs.append(stored(residual.numpy(), other, 0, isa, rng))
    return wrong(run(kernel, where, inputs, y_layout.size, rng), y_layout, want.contiguous().numpy(), zp, isa)


def _layout(x: Tensor, halo: tuple[int, ...], slack: int) -> Layout:
    top, bottom, left, right = halo
    return Layout(tuple(x.shape), True, align(x.shape[1], 16) + 16 * slack, (top, bottom, left, right))
