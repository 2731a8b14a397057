"""The references against a second formulation: loops over Python integers, NumPy float32, libm's fmaf.

Nothing of `qcompile.arith` is used here, so a slip in the contract's arithmetic shows too.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from qcompile import ops
from qcompile.ops import Act, Sample

Array = NDArray[Any]

_LIBM = ctypes.CDLL(ctypes.util.find_library("m"))
_LIBM.fmaf.argtypes, _LIBM.fmaf.restype = [ctypes.c_float] * 3, ctypes.c_float


def finish(real: np.float32, zero_point: int, lo: int, hi: int) -> int:
    """Clamp, round half to even, add the zero point."""
    clamped = min(max(real, np.float32(lo - zero_point)), np.float32(hi - zero_point))
    return int(np.rint(clamped)) + zero_point


def requantized(acc: int, m: Any, zero_point: int, lo: int = -128, hi: int = 127) -> int:
    return finish(np.float32(acc) * np.float32(m), zero_point, lo, hi)


def epilogue(
    acc: int,
    m: Any,
    zero_point: int,
    lo: int,
    hi: int,
    residual: int | None,
    residual_zero_point: int,
    residual_m: float,
) -> int:
    if residual is None:
        return requantized(acc, m, zero_point, lo, hi)
    real = _LIBM.fmaf(float(residual - residual_zero_point), residual_m, float(np.float32(acc) * np.float32(m)))
    return finish(np.float32(real), zero_point, lo, hi)


def samples(name: str, largest: int = 40_000) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], Array]]:
    """Arguments (tensors as int64 or float32 arrays) and the reference's answer, for the small samples."""

    def array(tensor: Tensor) -> Array:
        values = tensor.numpy()
        return values.astype(np.int64) if values.dtype.kind == "i" else values

    row = ops.row(name)
    found = 0
    for sample in row.samples(torch.Generator().manual_seed(11)):
        args, kwargs = pytree.tree_map_only(Act, lambda act: act.tensor, (sample.args, sample.kwargs))
        result = row.op(*args, **kwargs)
        if work(sample, result) <= largest:
            found += 1
            yield *pytree.tree_map_only(Tensor, array, (args, kwargs)), result.numpy().astype(np.int64)
    assert found >= 3


def work(sample: Sample, result: Tensor) -> int:
    """Roughly how many products the loops below make."""
    weights = [t for t in pytree.tree_leaves(sample.args) if isinstance(t, Tensor) and t.dim() > 1]
    return result.numel() * max([w[0].numel() for w in weights], default=1)


def indices(array: Array) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, array.shape))


def at(array: Array | None, index: tuple[int, ...]) -> int | None:
    return None if array is None else int(array[index])


def test_conv2d_is_the_sum_over_taps_and_channels() -> None:
    for args, kwargs, expected in samples("conv2d", largest=300_000):
        x, weight, bias, m, x_zp, zp, lo, hi, stride, padding, dilation, groups = args
        out_channels, in_channels, kh, kw = weight.shape
        for n, o, i, j in indices(expected):
            first = o // (out_channels // groups) * in_channels
            acc = int(bias[o])
            for r, s in itertools.product(range(kh), range(kw)):
                row, column = i * stride[0] - padding[0] + r * dilation[0], j * stride[1] - padding[2] + s * dilation[1]
                if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
                    taps = x[n, first : first + in_channels, row, column] - x_zp
                    acc += int(taps @ weight[o, :, r, s])
            residual = at(kwargs.get("residual"), (n, o, i, j))
            other = residual, kwargs.get("residual_zero_point", 0), kwargs.get("residual_m", 0.0)
            assert epilogue(acc, m[o], zp, lo, hi, *other) == expected[n, o, i, j]


def test_conv1d_is_the_sum_over_taps_and_channels() -> None:
    for args, kwargs, expected in samples("conv1d"):
        x, weight, bias, m, x_zp, zp, lo, hi, stride, padding, dilation, groups = args
        out_channels, in_channels, taps = weight.shape
        for n, o, i in indices(expected):
            first = o // (out_channels // groups) * in_channels
            positions = [(k, i * stride - padding[0] + k * dilation) for k in range(taps)]
            acc = int(bias[o]) + sum(
                int((x[n, first : first + in_channels, p] - x_zp) @ weight[o, :, k])
                for k, p in positions
                if 0 <= p < x.shape[2]
            )
            residual = at(kwargs.get("residual"), (n, o, i))
            other = residual, kwargs.get("residual_zero_point", 0), kwargs.get("residual_m", 0.0)
            assert epilogue(acc, m[o], zp, lo, hi, *other) == expected[n, o, i]


def test_linear_is_a_dot_product_per_output() -> None:
    for args, kwargs, expected in samples("linear"):
        x, weight, bias, m, x_zp, zp, lo, hi = args
        for index in indices(expected):
            o = index[-1]
            acc = int(bias[o]) + int((x[index[:-1]] - x_zp) @ weight[o])
            residual = at(kwargs.get("residual"), index)
            other = residual, kwargs.get("residual_zero_point", 0), kwargs.get("residual_m", 0.0)
            assert epilogue(acc, m[o], zp, lo, hi, *other) == expected[index]


def test_add_is_one_product_then_one_fused_multiply_add() -> None:
    for (a, b, a_zp, a_m, b_zp, b_m, zp, lo, hi), _, expected in samples("add"):
        a, b = np.broadcast_arrays(a, b)
        for index in indices(expected):
            assert epilogue(int(a[index]) - a_zp, a_m, zp, lo, hi, int(b[index]), b_zp, b_m) == expected[index]


def test_mul_is_an_integer_product() -> None:
    for (a, b, a_zp, b_zp, m, zp, lo, hi), _, expected in samples("mul"):
        a, b = np.broadcast_arrays(a, b)
        for index in indices(expected):
            assert requantized((int(a[index]) - a_zp) * (int(b[index]) - b_zp), m, zp, lo, hi) == expected[index]


def test_cat_requantizes_each_operand() -> None:
    for (xs, zero_points, ms, dim, zp), _, expected in samples("cat"):
        parts = [
            np.array([requantized(int(q) - z, m, zp) for q in x.flat]).reshape(x.shape)
            for x, z, m in zip(xs, zero_points, ms, strict=True)
        ]
        assert np.array_equal(np.concatenate(parts, dim), expected)


def windows(size: int, outputs: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> list[list[int]]:
    """The in-image positions of each window along one axis."""
    starts = [i * stride - padding for i in range(outputs)]
    return [[p for p in range(s, s + dilation * kernel, dilation) if 0 <= p < size] for s in starts]


def test_max_pool2d_is_the_largest_value_inside_the_image() -> None:
    for (x, kernel, stride, padding, dilation, _), _, expected in samples("max_pool2d"):
        rows, columns = (
            windows(x.shape[2 + a], expected.shape[2 + a], kernel[a], stride[a], padding[a], dilation[a])
            for a in (0, 1)
        )
        for n, c, i, j in indices(expected):
            assert max(x[n, c, r, s] for r in rows[i] for s in columns[j]) == expected[n, c, i, j]


def test_max_pool2d_of_padding_alone_is_the_smallest_value() -> None:
    # The only window reads rows -1 and 2 of an image of two rows.
    x = torch.full((1, 1, 2, 3), 5, dtype=torch.int8)
    pooled = torch.ops.qcompile.max_pool2d(x, [2, 1], [1, 1], [1, 0], [3, 1], False)
    assert torch.equal(pooled, torch.full((1, 1, 1, 3), -128, dtype=torch.int8))


def test_avg_pool2d_divides_as_float_pooling_does() -> None:
    for args, _, expected in samples("avg_pool2d"):
        x, x_zp, kernel, stride, padding, ceil_mode, count_include_pad, divisor, ratio, zp = args
        # What ATen divides by: pool ones, whose windows sum to the number of in-image positions.
        ones = torch.ones(1, 1, *x.shape[2:], dtype=torch.float64)
        geometry = kernel, stride, padding, ceil_mode
        inside = torch.nn.functional.avg_pool2d(ones, *geometry, divisor_override=1)[0, 0]
        mean = torch.nn.functional.avg_pool2d(ones, *geometry, count_include_pad, divisor)[0, 0]
        rows, columns = (
            windows(x.shape[2 + a], expected.shape[2 + a], kernel[a], stride[a], padding[a]) for a in (0, 1)
        )
        for n, c, i, j in indices(expected):
            count = round(float(inside[i, j] / mean[i, j]))
            acc = sum(int(x[n, c, r, s]) - x_zp for r in rows[i] for s in columns[j])
            assert requantized(acc, np.float32(ratio / count), zp) == expected[n, c, i, j]


def test_adaptive_avg_pool2d_uses_the_windows_of_float_pooling() -> None:
    for (x, x_zp, output_size, ratio, zp), _, expected in samples("adaptive_avg_pool2d"):
        height, width = x.shape[2:]
        # Float pooling of one-hot images tells which positions each window averages.
        one_hot = torch.eye(height * width, dtype=torch.float64).reshape(-1, 1, height, width)
        share = torch.nn.functional.adaptive_avg_pool2d(one_hot, output_size)[:, 0].numpy()
        for n, c, i, j in indices(expected):
            inside = np.flatnonzero(share[:, i, j])
            acc = int((x[n, c].reshape(-1)[inside] - x_zp).sum())
            assert requantized(acc, np.float32(ratio / len(inside)), zp) == expected[n, c, i, j]


def test_lookup_reads_the_table_of_its_channel() -> None:
    for (x, table), _, expected in samples("lookup"):
        for index in indices(expected):
            entries = table if table.ndim == 1 else table[index[1]]
            assert entries[x[index] + 128] == expected[index]


def small(name: str) -> Iterator[tuple[tuple[Any, ...], Array]]:
    """Arguments as arrays, and the reference's float answer, for the samples of few products."""
    for sample in ops.row(name).samples(torch.Generator().manual_seed(11)):
        args = [arg.tensor if isinstance(arg, Act) else arg for arg in sample.args]
        result = ops.row(name).op(*args)
        if result.numel() * args[1].shape[1] <= 20_000:
            x = args[0].flatten(0, -2)
            arrays = [arg.numpy() if isinstance(arg, Tensor) else arg for arg in (x, *args[1:])]
            yield tuple(arrays), result.flatten(0, -2).numpy()


def test_linear_dynamic_quantizes_each_row_by_its_largest_magnitude() -> None:
    seen = 0
    for (x, weight, scale, bias), expected in small("linear_dynamic"):
        for row, answers in zip(x, expected, strict=True):
            seen += 1
            a = np.max(np.abs(row))
            if not np.isfinite(a):
                assert np.isnan(answers).all()
                continue
            zero = a <= np.float32(2.0**-100)
            q = [0 if zero else int(np.rint(v * (np.float32(127) / a))) for v in row]
            assert zero or max(map(abs, q)) == 127
            s = np.float32(0) if zero else a / np.float32(127)
            for n, answer in enumerate(answers):
                acc = sum(int(w) * v for w, v in zip(weight[n], q, strict=True))
                assert answer == np.float32(_LIBM.fmaf(float(acc), float(s * scale[n]), float(bias[n])))
    assert seen > 20


def test_linear_weight_only_is_a_chain_of_fused_multiply_adds_per_group() -> None:
    seen = 0
    for (x, weight, scale, bias, size), expected in small("linear_weight_only"):
        for r, n in indices(expected):
            seen += 1
            total = float(bias[n])
            for group, start in enumerate(range(0, x.shape[1], size)):
                acc = 0.0
                for v, w in zip(x[r, start : start + size], weight[n, start : start + size], strict=True):
                    acc = _LIBM.fmaf(float(v), float(w), acc)
                total = _LIBM.fmaf(acc, float(scale[n, group]), total)
            assert np.float32(total) == expected[r, n]
    assert seen > 200


def test_quantize_and_dequantize_follow_the_formulas() -> None:
    row = ops.row("quantize")
    for sample in row.samples(torch.Generator().manual_seed(5)):
        (act, inv_scale, zp) = sample.args
        for value, q in zip(
            act.tensor.flatten().tolist(), row.op(act.tensor, inv_scale, zp).flatten().tolist(), strict=True
        ):
            with np.errstate(over="ignore"):
                real = np.float32(value) * np.float32(inv_scale)
            assert q == finish(np.float32(0) if np.isnan(real) else real, zp, -128, 127)
    for (x, scale, zp), _, _ in samples("dequantize"):
        real = torch.ops.qcompile.dequantize(torch.from_numpy(x).to(torch.int8), scale, zp)
        assert np.array_equal(real.numpy(), (x - zp).astype(np.float32) * np.float32(scale))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_linear_treats_leading_dimensions_as_a_batch(lead: tuple[int, ...]) -> None:
    (args, _, _) = next(iter(samples("linear")))
    weight, bias, m = (torch.from_numpy(v) for v in args[1:4])
    x = torch.randint(-128, 128, (*lead, weight.shape[1]), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    constants = weight.to(torch.int8), bias.to(torch.int32), m, *args[4:]
    whole = torch.ops.qcompile.linear(x, *constants)
    flat = torch.ops.qcompile.linear(x.reshape(-1, x.shape[-1]), *constants)
    assert torch.equal(whole.reshape(-1, whole.shape[-1]), flat)
