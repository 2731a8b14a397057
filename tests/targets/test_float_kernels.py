"""Convolutions and linear layers of real numbers, on every target: within rounding of their references, odd shapes
and what joins their epilogues included."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from execution import CPUS, artifact_of, program_of, reshuffled, run_on, skip_unless_runnable

from qcompile.ops import Act, Sample
from qcompile.ops.real import BFLOAT16, FLOAT32, FLOAT_CONV2D, FLOAT_LINEAR, NUMERICS
from qcompile.targets import get
from qcompile.targets.cpu.products import pairs
from qcompile.targets.cpu.real import bfloat16_bits

# Of sums of a few hundred products of float32: 2^-24 for each, of which most cancel. bfloat16 factors are the same in
# reference and kernel, and a result that is rounded to 8 bits may be rounded the other way.
TOLERANCE = {FLOAT32: 1e-5, BFLOAT16: 2.0**-8}

# N, C, H, W, channels out, kernel, stride, padding (top, bottom, left, right), dilation, groups
CONVOLUTIONS = (
    (2, 3, 9, 11, 17, (3, 3), (2, 1), (1, 1, 0, 2), (1, 1), 1),
    (1, 16, 7, 7, 48, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    (1, 5, 12, 5, 70, (2, 4), (1, 2), (0, 3, 2, 1), (2, 1), 1),
    (2, 12, 6, 5, 18, (3, 2), (1, 1), (1, 1, 1, 0), (1, 2), 3),
    (1, 19, 8, 23, 19, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 19),
    (1, 40, 5, 6, 20, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 4),
)


def convolutions(g: torch.Generator, numerics: str) -> Iterator[tuple[object, Sample]]:
    for i, (n, c, h, w, oc, kernel, stride, padding, dilation, groups) in enumerate(CONVOLUTIONS):
        x, weight = torch.randn(n, c, h, w, generator=g), torch.randn(oc, c // groups, *kernel, generator=g)
        lo, hi = ((-math.inf, math.inf), (0.0, math.inf), (-1.0, 2.5))[i % 3]
        args: tuple[Any, ...] = (
            Act(x),
            weight,
            torch.randn(oc, generator=g),
            list(stride),
            list(padding),
            list(dilation),
            groups,
        )
        args += (lo, hi, numerics, numerics == BFLOAT16 and i % 2 == 0)
        kwargs = {}
        if i % 2:
            shape = torch.ops.qcompile.float_conv2d(x, *args[1:]).shape
            kwargs["residual"] = Act(torch.randn(*shape, generator=g))
        yield FLOAT_CONV2D, Sample(args, kwargs, label=f"convolution {i}")


def linears(g: torch.Generator, numerics: str) -> Iterator[tuple[object, Sample]]:
    for i, (shape, out) in enumerate((((1, 64), 32), ((3, 5, 7), 33), ((9, 1), 16), ((2, 13), 1))):
        args: tuple[Any, ...] = (Act(torch.randn(*shape, generator=g)), torch.randn(out, shape[-1], generator=g))
        args += (torch.randn(out, generator=g), -0.5, math.inf, numerics, False)
        residual = {"residual": Act(torch.randn(*shape[:-1], out, generator=g))} if i % 2 else {}
        yield FLOAT_LINEAR, Sample(args, residual, label=f"linear {i}")


@pytest.mark.parametrize("target", CPUS)
@pytest.mark.parametrize("numerics", NUMERICS)
def test_a_kernel_agrees_with_its_reference(numerics: str, target: str, request: pytest.FixtureRequest) -> None:
    g = torch.Generator().manual_seed(7)
    calls = [*convolutions(g, numerics), *linears(g, numerics)]
    program, inputs = program_of(calls)
    skip_unless_runnable(target)
    cases = [inputs, [reshuffled(x, g) for x in inputs]]
    for case, results in zip(cases, run_on(artifact_of(program, get(target)), cases, request), strict=True):
        for (_, sample), got, want in zip(calls, results, program(*case), strict=True):
            assert got.shape == want.shape
            bound = TOLERANCE[numerics] * float(want.abs().max())
            assert np.abs(got - want.numpy()).max() <= bound, sample.label


@pytest.mark.parametrize("numerics", NUMERICS)
def test_a_batch_may_be_dynamic(numerics: str, request: pytest.FixtureRequest) -> None:
    g = torch.Generator().manual_seed(3)
    program, inputs = program_of(list(convolutions(g, numerics))[:1], batch=(1, 4))
    (x,) = inputs
    for case in ([x], [torch.randn(3, *x.shape[1:], generator=g)]):
        ((got,),) = run_on(artifact_of(program, get("native")), [case], request)
        (want,) = program(*case)
        assert np.abs(got - want.numpy()).max() <= TOLERANCE[numerics] * float(want.abs().max())


def test_bfloat16_is_rounded_as_pytorch_does() -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(5)) * 10.0 ** torch.randint(-30, 30, (4096,))
    x = torch.cat([x, torch.tensor([0.0, -0.0, math.inf, -math.inf, 3.39e38, 1 + 2.0**-8, 1 + 3 * 2.0**-8])])
    assert np.array_equal(bfloat16_bits(x.numpy()), x.to(torch.bfloat16).view(torch.uint16).numpy())
    words = pairs(np.array([[1.0, -2.0]], np.float32)).view(np.uint32)
    assert words.tolist() == [0xC0003F80]
