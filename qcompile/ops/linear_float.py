"""Linear layers between float tensors: integer weights, and activations that nobody calibrated.

linear_dynamic: each row of the input is quantized when it is there (see `arith.quantize_rows`).

    acc[r, n] = sum_k q[r, k] * weight[n, k]                               int32
    y[r, n]   = fma(f32(acc[r, n]), s[r] * scale[n], bias[n])

linear_weight_only: the input stays float. Along K the weights come in groups, each with a scale per output; there
may be one group only.

    acc = 0;         for k in group g, in order:  acc   = fma(x[r, k], f32(weight[n, k]), acc)
    total = bias[n]; for g, in order:             total = fma(acc[g], scale[n, g], total)

No ATen operator maps to them: `quantize_linear_weights` puts them where the configuration asks for them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qcompile import arith
from qcompile.ops.row import Act, Call, Row, Sample, Site, no_examples, random_int8

_IN_CACHE = 1 << 14  # outputs that are summed at once: an emulated fma makes a dozen passes over them


def linear_dynamic(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Reference. x (..., K) float32, weight (N, K) int8, scale and bias (N,) float32 -> (..., N) float32.

    Products of int8 and their sums fit float64 exactly, hence a float64 product.
    """
    q, s = arith.quantize_rows(x)
    acc = (q.to(torch.float64) @ weight.to(torch.float64).T).to(torch.int32)
    return arith.fma(acc.to(torch.float32), s * scale, bias.expand(acc.shape))


def linear_dynamic_fake(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def linear_weight_only(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, group_size: int) -> Tensor:
    """Reference. x (..., K) float32, weight (N, K) int8, scale (N, ceil(K / group_size)) float32, bias (N,)
    float32 -> (..., N) float32. The last group may be shorter.
    """
    rows, columns = x.flatten(0, -2).to(torch.float32), weight.to(torch.float32).T
    few = max(1, _IN_CACHE // max(1, len(weight)))
    parts = [_chains(part, columns, scale, bias, group_size) for part in rows.split(few)]
    return torch.cat(parts).reshape(*x.shape[:-1], len(weight))


def _chains(rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, group_size: int) -> Tensor:
    """(rows, K) and (K, N) -> (rows, N)."""
    total = bias.expand(len(rows), len(bias))
    for group, start in enumerate(range(0, len(columns), group_size)):
        acc = torch.zeros(total.shape)
        for k in range(start, min(start + group_size, len(columns))):
            acc = arith.fma(rows[:, k, None], columns[k], acc)
        total = arith.fma(acc, scale[:, group].expand(acc.shape), total)
    return total


def linear_weight_only_fake(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, group_size: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fuse(site: Site) -> Call:
    raise AssertionError("no ATen operator maps to it")


# (shape of x, out features)
_GEOMETRIES: tuple[tuple[tuple[int, ...], int], ...] = (
    ((1, 64), 64),
    ((1, 33), 100),
    ((3, 100), 10),
    ((2, 1), 9),
    ((7, 33), 17),
    ((2, 13, 64), 48),
    ((3, 5, 31), 7),
    ((2, 3, 5, 40), 100),
    ((1, 517), 130),
)


def _numbers(g: torch.Generator, *shape: int) -> Tensor:
    """Scales of weights, four powers of two apart."""
    return torch.rand(shape, generator=g) * 2.0 ** torch.randint(-9, -5, shape, generator=g)


def _bias(g: torch.Generator, features: int) -> Tensor:
    return torch.randn(features, generator=g)


def _label(shape: tuple[int, ...], features: int) -> str:
    return f"{'x'.join(map(str, shape))}->{features}"


def _samples_dynamic(g: torch.Generator) -> Iterator[Sample]:
    for shape, features in _GEOMETRIES:
        x = torch.randn(shape, generator=g) * 2.0 ** torch.randint(-8, 9, (*shape[:-1], 1), generator=g)
        constants = random_int8(g, features, shape[-1], lo=-127), _numbers(g, features), _bias(g, features)
        yield Sample((Act(x), *constants), label=_label(shape, features))
    # Rows of zeros, denormal and huge values, ties (a is 127), infinity and NaN.
    x = torch.randint(-253, 254, (8, 37), generator=g) / 2.0
    x[:, 5] = 127.0
    hard = torch.tensor([1.0, 0.0, 1e-44, 1e-31, 3e36, 2.0**-93, torch.inf, 1.0])
    x = torch.where(hard[:, None] == torch.inf, x, x * hard[:, None])
    x[6, 20], x[7, 36] = -torch.inf, torch.nan
    constants = random_int8(g, 21, 37, lo=-127), _numbers(g, 21), _bias(g, 21)
    yield Sample((Act(x), *constants), label="special values")


def _samples_weight_only(g: torch.Generator) -> Iterator[Sample]:
    for i, (shape, features) in enumerate(_GEOMETRIES):
        k, most = shape[-1], (127, 7, 7)[i % 3]
        group_size = (k, 32, 8)[i % 3]
        x = torch.randn(shape, generator=g)
        weight, scale = random_int8(g, features, k, lo=-most, hi=most), _numbers(g, features, -(-k // group_size))
        label = f"{_label(shape, features)} up to {most} in groups of {group_size}"
        yield Sample((Act(x), weight, scale, _bias(g, features), group_size), label=label)
    # The order of a chain, and each rounding in it: terms that cancel, tiny ones, and sums beyond float32.
    x = torch.randn(5, 67, generator=g) * 2.0 ** torch.randint(-60, 60, (5, 67), generator=g)
    x[3] *= 1e-30
    x[4, 9] = 3e38
    weight, scale = random_int8(g, 19, 67, lo=-127), _numbers(g, 19, 3)
    yield Sample((Act(x), weight, scale, _bias(g, 19), 24), label="special values")


LINEAR_DYNAMIC = Row(
    name="linear_dynamic",
    schema="(Tensor x, Tensor weight, Tensor scale, Tensor bias) -> Tensor",
    aten=(),
    reference=linear_dynamic,
    fake=linear_dynamic_fake,
    fuse=_fuse,
    samples=_samples_dynamic,
    examples=no_examples,
)

LINEAR_WEIGHT_ONLY = Row(
    name="linear_weight_only",
    schema="(Tensor x, Tensor weight, Tensor scale, Tensor bias, int group_size) -> Tensor",
    aten=(),
    reference=linear_weight_only,
    fake=linear_weight_only_fake,
    fuse=_fuse,
    samples=_samples_weight_only,
    examples=no_examples,
)

ROWS = (LINEAR_DYNAMIC, LINEAR_WEIGHT_ONLY)
