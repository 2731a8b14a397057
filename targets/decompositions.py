"""Decompositions that PyTorch lacks, or has only into operators outside ATen: each is the operator's meaning,
in simpler operators. Arguments are those of the ATen operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

aten, prims = torch.ops.aten, torch.ops.prims


def _dims(x: Tensor, dim: int | Sequence[int] | None) -> list[int]:
    dims = list(range(x.dim())) if dim is None or dim == [] else [dim] if isinstance(dim, int) else list(dim)
    return [d % max(1, x.dim()) for d in dims]


# --- reductions -----------------------------------------------------------------------------------


def _moments(
    x: Tensor, dim: int | Sequence[int] | None, correction: float | None, keepdim: bool
) -> tuple[Tensor, Tensor]:
    """Variance and mean; two passes, as PyTorch takes them."""
    dims = _dims(x, dim)
    sizes = [x.shape[d] for d in dims]
    static = all(isinstance(size, int) for size in sizes)
    count: Any = prod(sizes) if static else torch.ones_like(x).sum(dims, keepdim)  # a tensor: a number is fixed
    mean = x.mean(dims, True)
    variance = (x - mean).square().sum(dims, keepdim) / (count - (1 if correction is None else correction))
    return variance, x.mean(dims, keepdim)


Moments = Callable[..., tuple[Tensor, Tensor]]


def _by_correction(x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Any:
    return _moments(x, dim, correction, keepdim)


def _by_dim(x: Tensor, dim: Any, unbiased: bool = True, keepdim: bool = False) -> Any:
    return _moments(x, dim, 1 if unbiased else 0, keepdim)


def _of_all(x: Tensor, unbiased: bool = True) -> Any:
    return _moments(x, None, 1 if unbiased else 0, False)


_OVERLOADS: dict[str, Moments] = {"correction": _by_correction, "dim": _by_dim, "default": _of_all}
_FROM_MOMENTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "var": lambda variance, mean: variance,
    "std": lambda variance, mean: variance.sqrt(),
    "var_mean": lambda variance, mean: (variance, mean),
    "std_mean": lambda variance, mean: (variance.sqrt(), mean),
}


def _logsumexp(x: Tensor, dim: int | Sequence[int], keepdim: bool = False) -> Tensor:
    dims = _dims(x, dim)
    largest = x.amax(dims, True)
    shift = torch.where(largest.abs() == torch.inf, torch.zeros_like(largest), largest)
    return (x - shift).exp().sum(dims, keepdim).log() + (shift if keepdim else shift.squeeze(dims))


def _max_dim(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return x.amax(dim, keepdim), x.argmax(dim, keepdim)


def _min_dim(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return x.amin(dim, keepdim), x.argmin(dim, keepdim)


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    scaled = x * (x.square().mean(list(range(-len(shape), 0)), True) + eps).rsqrt()
    return scaled if weight is None else scaled * weight


# --- orders: all by the one stable sort ---------------------------------------------------------------


def _sorted(x: Tensor, dim: int, descending: bool = False) -> tuple[Tensor, Tensor]:
    return aten.sort.stable(x, stable=True, dim=dim, descending=descending)


def _sort(x: Tensor, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    return _sorted(x, dim, descending)


def _argsort(x: Tensor, dim: int = -1, descending: bool = False) -> Tensor:
    return _sorted(x, dim, descending)[1]


def _argsort_stable(x: Tensor, *, stable: bool, dim: int = -1, descending: bool = False) -> Tensor:
    return _sorted(x, dim, descending)[1]


def _topk(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Tensor, Tensor]:
    dim %= max(1, x.dim())
    return tuple(aten.slice(part, dim, 0, k) for part in _sorted(x, dim, largest))


def _kthvalue(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    dim %= max(1, x.dim())
    values, indices = (aten.slice(part, dim, k - 1, k) for part in _sorted(x, dim))
    return (values, indices) if keepdim else (values.squeeze(dim), indices.squeeze(dim))


def _median_dim(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return _kthvalue(x, (x.shape[dim] + 1) // 2, dim, keepdim)


def _median(x: Tensor) -> Tensor:
    return _median_dim(x.flatten(), 0)[0]


# --- pools --------------------------------------------------------------------------------------------


def _pair(value: Sequence[int], default: Sequence[int] = ()) -> list[int]:
    values = list(value) or list(default)
    return values * 2 if len(values) == 1 else values


def _outputs(size: Any, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool = False) -> Any:
    """How many windows there are along one dimension."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (room + (stride - 1 if ceil_mode else 0)) // stride + 1
    # The last window must begin inside the image or its left padding.
    return count - 1 if ceil_mode and (count - 1) * stride >= size + padding else count


def _taps(x: Tensor, geometry: Sequence[Sequence[int]], sizes: Sequence[Any], fill: float) -> list[Tensor]:
    """For each tap of a window, the values that it meets in all windows: slices of the padded image.

    `geometry`: kernel, stride, padding, dilation of rows and columns; `sizes`: how many windows.
    """
    amounts: list[Any] = []
    for size, outputs, (k, s, p, d) in zip(reversed(x.shape[-2:]), reversed(sizes), reversed(geometry), strict=True):
        amounts += [p, max(0, (outputs - 1) * s + (k - 1) * d + 1 - size - p)]
    padded = aten.constant_pad_nd(x, amounts, fill)
    (kh, sh, _, dh), (kw, sw, _, dw) = geometry
    return [
        padded[..., i * dh : i * dh + (sizes[0] - 1) * sh + 1 : sh, j * dw : j * dw + (sizes[1] - 1) * sw + 1 : sw]
        for i, j in product(range(kh), range(kw))
    ]


def _max_pool2d_with_indices(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """The first largest tap wins."""
    geometry = list(zip(_pair(kernel), _pair(stride, kernel), _pair(padding), _pair(dilation), strict=True))
    sizes = [_outputs(size, *axis, ceil_mode) for size, axis in zip(x.shape[-2:], geometry, strict=True)]
    (_, sh, ph, dh), (kw, sw, pw, dw) = geometry
    stacked = torch.stack(_taps(x, geometry, sizes, -torch.inf))
    tap = stacked.argmax(0)
    row = torch.arange(sizes[0])[:, None] * sh - ph + tap // kw * dh
    column = torch.arange(sizes[1]) * sw - pw + tap % kw * dw
    return stacked.amax(0), row * x.shape[-1] + column


def _im2col(
    x: Tensor, kernel: Sequence[int], dilation: Sequence[int], padding: Sequence[int], stride: Sequence[int]
) -> Tensor:
    geometry = list(zip(_pair(kernel), _pair(stride), _pair(padding), _pair(dilation), strict=True))
    sizes = [_outputs(size, *axis) for size, axis in zip(x.shape[-2:], geometry, strict=True)]
    return torch.stack(_taps(x, geometry, sizes, 0.0), -3).flatten(-2).flatten(-3, -2)


def _col2im(
    x: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Tensor:
    """Each tap's values, spread by the stride and moved to where the tap lies; then the sum of all."""
    geometry = list(zip(_pair(kernel), _pair(stride), _pair(padding), _pair(dilation), strict=True))
    rows, columns = (_outputs(extent, *axis) for extent, axis in zip(size, geometry, strict=True))
    (kh, sh, ph, dh), (kw, sw, pw, dw) = geometry
    taps = x.unflatten(-1, (rows, columns)).unflatten(-3, (-1, kh * kw)).unbind(-3)
    total: Any = 0.0
    for (i, j), tap in zip(product(range(kh), range(kw)), taps, strict=True):
        spread = aten.constant_pad_nd(tap[..., :, None, :, None], [0, sw - 1, 0, 0, 0, sh - 1]).flatten(-4, -3)
        spread = spread.flatten(-2)
        left, top = j * dw - pw, i * dh - ph
        amounts = [left, size[1] - spread.shape[-1] - left, top, size[0] - spread.shape[-2] - top]
        total = total + aten.constant_pad_nd(spread, amounts)
    return total


def _adaptive_max_pool2d(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    height, width = x.shape[-2:]
    values, indices = [], []
    for i, j in product(range(sizes[0]), range(sizes[1])):
        top, bottom = i * height // sizes[0], -(-(i + 1) * height // sizes[0])
        left, right = j * width // sizes[1], -(-(j + 1) * width // sizes[1])
        window = x[..., top:bottom, left:right].flatten(-2)
        at = window.argmax(-1)
        values.append(window.amax(-1))
        indices.append((at // (right - left) + top) * width + at % (right - left) + left)
    return tuple(torch.stack(part, -1).unflatten(-1, tuple(sizes)) for part in (values, indices))


def _unfold(x: Tensor, dim: int, size: int, step: int) -> Tensor:
    count = (x.shape[dim] - size) // step + 1
    return torch.stack([aten.slice(x, dim, k, k + (count - 1) * step + 1, step) for k in range(size)], -1)


# --- assignment by index ------------------------------------------------------------------------------


def _index_put(x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    """By a mask it is a choice; by integers it scatters to the positions that the indices mean."""
    masks = [index for index in indices if index is not None and index.dtype is torch.bool]
    if not masks:
        positions = torch.arange(x.numel()).reshape(x.shape)[tuple(slice(None) if i is None else i for i in indices)]
        spread = values.broadcast_to(positions.shape).flatten()
        scattered = aten.scatter_add if accumulate else aten.scatter
        return scattered(x.flatten(), 0, positions.flatten(), spread).reshape(x.shape)
    if len(indices) > 1 or values.numel() != 1 or accumulate:
        raise NotImplementedError("it assigns several values to where a mask holds")
    mask = masks[0].reshape(*masks[0].shape, *[1] * (x.dim() - masks[0].dim()))
    return torch.where(mask, values.reshape(()), x)


# --- products -----------------------------------------------------------------------------------------


def _bilinear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    each = torch.matmul(x[..., None, None, :], weight)[..., 0, :]  # (..., out, features of y)
    result = (each * y[..., None, :]).sum(-1)
    return result if bias is None else result + bias


def _cdist(x: Tensor, y: Tensor, p: float, mode: int | None) -> Tensor:
    return torch.linalg.vector_norm(x[..., :, None, :] - y[..., None, :, :], p, -1)


# --- one value at a time --------------------------------------------------------------------------------


def _exp2(x: Tensor) -> Tensor:
    return torch.pow(2.0, x)


def _erfc(x: Tensor) -> Tensor:
    return 1.0 - x.erf()


def _hypot(x: Tensor, y: Tensor) -> Tensor:
    return (x.square() + y.square()).sqrt()


OWN: dict[Any, Callable[..., Any]] = {
    **{
        getattr(getattr(aten, name), overload): (lambda *a, _read=read, _made=made, **k: _made(*_read(*a, **k)))
        for name, made in _FROM_MOMENTS.items()
        for overload, read in _OVERLOADS.items()
    },
    aten.logsumexp.default: _logsumexp,
    aten.max.dim: _max_dim,
    aten.min.dim: _min_dim,
    aten.rms_norm.default: _rms_norm,
    aten.sort.default: _sort,
    aten.argsort.default: _argsort,
    aten.argsort.stable: _argsort_stable,
    aten.topk.default: _topk,
    aten.kthvalue.default: _kthvalue,
    aten.median.dim: _median_dim,
    aten.median.default: _median,
    aten.max_pool2d_with_indices.default: _max_pool2d_with_indices,
    aten.adaptive_max_pool2d.default: _adaptive_max_pool2d,
    aten.im2col.default: _im2col,
    aten.col2im.default: _col2im,
    aten.unfold.default: _unfold,
    aten.index_put.default: _index_put,
    aten.bilinear.default: _bilinear,
    aten._cdist_forward.default: _cdist,
    aten.exp2.default: _exp2,
    aten.special_exp2.default: _exp2,
    aten.erfc.default: _erfc,
    aten.hypot.default: _hypot,
    prims.add.default: aten.add.Tensor,
    prims.sub.default: aten.sub.Tensor,
    prims.mul.default: aten.mul.Tensor,
    prims.div.default: aten.div.Tensor,
}
