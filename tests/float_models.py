"""Small models that mix a layer which becomes integer with an operator that stays float, by name.

`h` is what the layer gives; `y` is a second input that only float code reads. Quantized values have ties,
which sorting may order either way: what asks for an order takes `y`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from passing import randn, randomize
from torch import Tensor, nn
from torch.nn import functional


class Rows(nn.Module):
    """`apply` behind a linear layer: x (2, 5, 12), h (2, 5, 8), y (2, 5, 8)."""

    def __init__(self, apply: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.linear, self.apply_to, self.layers = nn.Linear(12, 8), apply, nn.ModuleList(layers)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.apply_to(self.linear(x), y, *self.layers)

    @staticmethod
    def inputs(seed: int) -> tuple[Tensor, ...]:
        return randn(2, 5, 12, seed=seed), randn(2, 5, 8, seed=seed + 100)


class Images(nn.Module):
    """`apply` behind a convolution: x (2, 3, 6, 10), h (2, 8, 6, 10), y (2, 8, 6, 10)."""

    def __init__(self, apply: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.conv, self.apply_to, self.layers = nn.Conv2d(3, 8, 3, padding=1), apply, nn.ModuleList(layers)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.apply_to(self.conv(x), y, *self.layers)

    @staticmethod
    def inputs(seed: int) -> tuple[Tensor, ...]:
        return randn(2, 3, 6, 10, seed=seed), randn(2, 8, 6, 10, seed=seed + 100)


def row(apply: Callable[..., Any], *layers: nn.Module) -> Rows:
    model = Rows(apply, *layers)
    randomize(model)
    return model


def image(apply: Callable[..., Any], *layers: nn.Module) -> Images:
    model = Images(apply, *layers)
    randomize(model)
    return model


def heads(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of two heads of four features: (2, 2, 5, 4)."""
    q, k, v = (t.reshape(2, 5, 2, 4).transpose(1, 2) for t in (h, y, h + y))
    return q, k, v


def positive(y: Tensor) -> Tensor:
    return y.square() + 0.1


def indices(y: Tensor) -> Tensor:
    return (y > 0).long() + (y > 1).long()


attend = functional.scaled_dot_product_attention
CAUSAL = torch.ones(5, 5).tril().bool()
NEGATIVE = torch.where(CAUSAL, 0.0, -torch.inf)

# What the name says, and the model.
MODELS: dict[str, Callable[[], Rows | Images]] = {
    # normalization
    "layer_norm": lambda: row(lambda h, y, f: f(h + y), nn.LayerNorm(8)),
    "group_norm": lambda: image(lambda h, y, f: f(h), nn.GroupNorm(4, 8)),
    "instance_norm": lambda: image(lambda h, y, f: f(h), nn.InstanceNorm2d(8, affine=True)),
    # attention
    "attention": lambda: row(lambda h, y, f: f(h, h, h)[0], nn.MultiheadAttention(8, 2, batch_first=True)),
    "sdpa 3-d": lambda: row(lambda h, y: attend(h, y, h + y)),
    "sdpa mask": lambda: row(lambda h, y: attend(*heads(h, y), attn_mask=CAUSAL)),
    "sdpa scale": lambda: row(lambda h, y: attend(*heads(h, y), scale=0.3)),
    # recurrence
    "lstm": lambda: row(lambda h, y, f: f(h)[0], nn.LSTM(8, 6, batch_first=True)),
    "lstm both ways": lambda: row(lambda h, y, f: f(h)[0], nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True)),
    "gru": lambda: row(lambda h, y, f: f(h)[0], nn.GRU(8, 6, batch_first=True)),
    "rnn relu both ways": lambda: row(lambda h, y, f: f(h), nn.RNN(8, 6, 2, nonlinearity="relu", bidirectional=True)),
    "lstm cell": lambda: row(lambda h, y, f: f(h[:, 0]), nn.LSTMCell(8, 6)),
    # indices
    "embedding": lambda: row(lambda h, y, f: f(indices(y)) + h[..., None, :], nn.Embedding(3, 8)),
    "gather": lambda: row(lambda h, y: h.softmax(-1).gather(1, indices(y))),
    "one_hot": lambda: row(lambda h, y: functional.one_hot(indices(y), 3).float() * h.exp()[..., None]),
    "topk": lambda: row(lambda h, y: (*y.topk(3), h)),
    "argmax": lambda: row(lambda h, y: (h.argmax(-1), h.argmin(1, keepdim=True))),
    "max": lambda: row(lambda h, y: (h.max(1), h.min(-1, keepdim=True))),
    "amax": lambda: row(lambda h, y: (h.amax((0, 2)), h.amin(1, keepdim=True))),
    # reductions
    "cummax": lambda: row(lambda h, y: (*y.cummax(1), h)),
    "select": lambda: row(lambda h, y: (h.exp().select(1, -1), y.select(0, -2), h.exp().select(-1, 3))),
    "negative index": lambda: row(lambda h, y: h.exp()[:, torch.tensor([1, -1])] + y[:, [-2]]),
    "antialias": lambda: image(lambda h, y: functional.interpolate(h, (4, 5), mode="bilinear", antialias=True)),
    "divided by zero": lambda: row(lambda h, y: h / 0),
    "mask": lambda: row(lambda h, y: h[y > 0]),
    "pixel_shuffle quantized": lambda: image(lambda h, y: functional.pixel_shuffle(h, 2)),
    "constant": lambda: row(lambda h, y, f: (h, f.weight, y), nn.Linear(3, 4)),
    # matrix products
    "matmul broadcast": lambda: row(lambda h, y: h[:, None] @ y[0].t()),
    "einsum": lambda: row(lambda h, y: torch.einsum("bic,bjc->bij", h, y)),
    # choice
    "where": lambda: row(lambda h, y: torch.where(y > 0, h, y)),
    "where scalar": lambda: row(lambda h, y: torch.where(h > 0, h, 0.5)),
    "masked_fill": lambda: row(lambda h, y: h.masked_fill(y > 0, -1.5)),
    "clamp tensors": lambda: row(lambda h, y: torch.clamp(h, y - 1, y + 1)),
    "comparisons": lambda: row(lambda h, y: (h > y, h >= y, h < 0.1, h <= y, h == y, h != 0.0)),
    "logic": lambda: row(
        lambda h, y: ((h > 0) & (y > 0), (h > 0) | (y > 0), ~(h > 0), torch.logical_xor(h > 0, y > 0))
    ),
    "isnan": lambda: row(lambda h, y: (torch.isnan(y.log()), torch.isinf(y * 1e30 * 1e30), torch.isfinite(y.log()), h)),
    # arithmetic
    "pow": lambda: row(lambda h, y: (h.pow(2), h.exp().pow(1.5), positive(y).pow(h), 2**h, h.pow(3))),
    "log": lambda: row(
        lambda h, y: (positive(y).log(), positive(y).log2(), positive(y).log1p(), positive(y).log10(), h)
    ),
    "sqrt": lambda: row(lambda h, y: (positive(h).sqrt(), positive(y).rsqrt(), positive(h).reciprocal())),
    "erf": lambda: row(lambda h, y: (h.erf(), y.erf(), y.erfc())),
    "round": lambda: row(lambda h, y: ((y * 4).floor(), (y * 4).ceil(), (y * 4).round(), (y * 4).trunc(), y.frac(), h)),
    "trigonometry": lambda: row(lambda h, y: (h.sin(), h.cos(), h.tanh(), h.atan(), torch.atan2(h, y), y.sinh())),
    "remainder": lambda: row(lambda h, y: (y % 0.3, torch.fmod(y, 0.3), y // 0.3, h)),
    "alpha": lambda: row(lambda h, y: (torch.add(h, y, alpha=2), torch.sub(h, y, alpha=0.5), 1 - h, 1 / positive(h))),
    "types": lambda: row(lambda h, y: (y.int().float() + h, (h > 0).float(), (y * 3).long(), y.to(torch.float64))),
    # activations
    "more activations": lambda: row(
        lambda h, y: (
            functional.softsign(y),
            functional.tanhshrink(y),
            functional.hardshrink(y),
            functional.softshrink(y),
            functional.logsigmoid(y),
            functional.threshold(y, 0.1, 0.5),
            functional.softmin(y, -1),
            h,
        )
    ),
    "glu": lambda: row(lambda h, y: functional.glu(h, -1)),
    "prelu": lambda: row(lambda h, y, f: f(h.exp() - 1), nn.PReLU(5)),
    "rrelu": lambda: row(lambda h, y, f: f(h.exp() - 1), nn.RReLU()),
    # images
    "pixel_shuffle": lambda: image(lambda h, y: functional.pixel_shuffle(h.softmax(1), 2)),
    "nearest sizes": lambda: image(lambda h, y: functional.interpolate(h, (7, 13))),
    "bilinear image": lambda: image(lambda h, y: functional.interpolate(h, scale_factor=2, mode="bilinear")),
    "reflect": lambda: image(lambda h, y: functional.pad(h.softmax(1), (2, 1, 1, 3), mode="reflect")),
    "conv_transpose2d": lambda: image(
        lambda h, y, f: f(h), nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1)
    ),
    "conv3d": lambda: image(lambda h, y, f: f(h[:, None]), nn.Conv3d(1, 4, 3, padding=1, stride=(2, 1, 1))),
    "conv_transpose3d": lambda: image(lambda h, y, f: f(h[:, None]), nn.ConvTranspose3d(1, 4, 2, stride=2)),
    "max_pool1d": lambda: image(lambda h, y: functional.max_pool1d(h[:, :, 0].softmax(1), 3, 2, 1)),
    "max_pool2d indices": lambda: image(lambda h, y: (*functional.max_pool2d(y, 2, return_indices=True), h)),
    "adaptive_max_pool uneven": lambda: image(lambda h, y: functional.adaptive_max_pool2d(h.softmax(1), (4, 3))),
    "adaptive_avg_pool": lambda: image(lambda h, y: functional.adaptive_avg_pool2d(h.softmax(1), (4, 3))),
    "grid_sample": lambda: image(
        lambda h, y: functional.grid_sample(h, y[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=False)
    ),
    # views and copies
    "stack": lambda: row(lambda h, y: torch.stack([h, y], 1)),
    "cat": lambda: row(lambda h, y: torch.cat([h.exp(), y.exp()], -1)),
    "tril": lambda: row(lambda h, y: (h.exp().tril(), h.exp().triu(1))),
    "roll": lambda: row(lambda h, y: (h.roll(2, 1), h.roll((1, -2), (0, 2)), h.roll(3))),
    "flip": lambda: row(lambda h, y: (h.flip(1), h.flip((0, 2)))),
    "repeat": lambda: row(lambda h, y: (h.repeat(1, 2, 3), h.tile(2), h.repeat_interleave(2, 1))),
    "expand": lambda: row(lambda h, y: h.exp()[:, None].expand(-1, 3, -1, -1)),
    "assignment": lambda: row(lambda h, y: assigned(h.exp(), y)),
    # new tensors
    "arange": lambda: row(lambda h, y: h + torch.arange(8) * 0.1 + torch.arange(1, 9, dtype=torch.float32)),
    "eye": lambda: row(lambda h, y: h.exp() @ torch.eye(8)),
    "softmax": lambda: row(lambda h, y: (h.softmax(-1), functional.log_softmax(h, 1), h.logsumexp(-1))),
    "rms_norm": lambda: row(lambda h, y, f: (f(h + y), functional.normalize(h, dim=-1)), nn.RMSNorm(8)),
    "scatter_add": lambda: row(
        lambda h, y: (
            h.softmax(-1).scatter_add(1, indices(y)[:, :1], h.sigmoid()),
            h.exp().scatter(1, indices(y)[:1, :1, :4], y),
        )
    ),
    "sort": lambda: row(
        lambda h, y: (*y.sort(1), *y.sort(descending=True), y.argsort(-1), *y.median(1), *y.kthvalue(2, 1), h)
    ),
    "cumsum": lambda: row(lambda h, y: (h.cumsum(1), h.cumprod(-1), (h > 0).cumsum(1) * h.exp())),
    "std": lambda: row(lambda h, y: (h.std(-1), h.std(), torch.std_mean(h, 1, correction=0))),
    "var": lambda: row(
        lambda h, y: (h.var(1, keepdim=True), h.var(dim=(0, 2), unbiased=False), torch.var_mean(h, -1), h.var())
    ),
    "norm": lambda: row(lambda h, y: (h.norm(dim=-1), h.norm(1, dim=1), torch.linalg.norm(h, torch.inf, 1))),
    "sum": lambda: row(lambda h, y: (h.sum(), h.mean(1), h.sum((0, 2), keepdim=True), h.prod(1), (h > 0).sum(-1))),
    "any and all": lambda: row(lambda h, y: ((h > 0).any(1), (h > 0).all(-1), (h > 9).any())),
    "bmm": lambda: row(lambda h, y: (torch.bmm(h, y.mT), torch.cdist(h, y))),
    "bilinear": lambda: row(lambda h, y, f: f(h, y), nn.Bilinear(8, 8, 3)),
    "assignment by mask": lambda: row(lambda h, y: masked(h.exp(), y)),
    "assignment by index": lambda: row(lambda h, y: indexed(h.exp(), y)),
    "clamp": lambda: row(lambda h, y: (h.exp().clamp(0.5, 2), torch.maximum(h, y), indices(y).clamp(min=1))),
    "exp": lambda: row(lambda h, y: (h.exp(), h.expm1(), h.exp2(), y.exp2(), torch.hypot(h, y), h.sign())),
    "unfold": lambda: image(lambda h, y: (functional.unfold(h.softmax(1), 3, padding=1, stride=2), y.unfold(3, 4, 2))),
    "fold": lambda: image(lambda h, y: functional.fold(h.softmax(1).reshape(2, 8, 60), (7, 11), 2)),
}


def assigned(x: Tensor, y: Tensor) -> Tensor:
    x = x.clone()
    x[:, 1] = y[:, 0]
    x[:, :, 2:4] += 1
    return x


def masked(x: Tensor, y: Tensor) -> Tensor:
    x[x > y] = 0.25
    return x


def indexed(x: Tensor, y: Tensor) -> Tensor:
    x[:, torch.tensor([0, 3])] = y[:, 1:3]
    return x.index_put((torch.tensor([1, -1]),), y[:1, :1, :1], accumulate=True)
