"""Rules: shuffles of pixels and channels, as what they are: views and a permutation, which stay int8.

pixel_shuffle(x, r)      ->  (N, C r r, H, W) as (N, C, r, r, H, W), permuted to (N, C, H, r, W, r), as one image
pixel_unshuffle(x, r)    ->  (N, C, H r, W r) as (N, C, H, r, W, r), permuted to (N, C, r, r, H, W), as one image
channel_shuffle(x, g)    ->  (N, g C, H, W) as (N, g, C, H, W), transposed to (N, C, g, H, W), as one image
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qcompile.ir import Program, shape_of
from qcompile.rewrite import Rule, call

aten = torch.ops.aten


def _check(program: Program, node: fx.Node) -> str | None:
    x: Any = node.args[0]
    dynamic = [d for d, size in enumerate(shape_of(x)) if not isinstance(size, int)]
    if len(shape_of(x)) < 3:
        return "its input is no image"
    return None if len(dynamic) <= 1 else "several of its dimensions are dynamic"


def _reshape(program: Program, node: fx.Node, x: fx.Node, sizes: list[Any]) -> fx.Node:
    """`x` as `sizes`, of which the dynamic one (there is at most one) is inferred."""
    return call(program, node, aten.reshape.default, x, [size if isinstance(size, int) else -1 for size in sizes])


def _shuffle(program: Program, node: fx.Node) -> fx.Node:
    x: Any = node.args[0]
    r: Any = node.args[1]
    *batch, channels, height, width = shape_of(x)
    n = len(batch)
    split = _reshape(program, node, x, [*batch, channels // (r * r), r, r, height, width])
    order = [*range(n), n, n + 3, n + 1, n + 4, n + 2]
    permuted = call(program, node, aten.permute.default, split, order)
    return _reshape(program, node, permuted, [*batch, channels // (r * r), height * r, width * r])


def _unshuffle(program: Program, node: fx.Node) -> fx.Node:
    x: Any = node.args[0]
    r: Any = node.args[1]
    *batch, channels, height, width = shape_of(x)
    n = len(batch)
    split = _reshape(program, node, x, [*batch, channels, height // r, r, width // r, r])
    order = [*range(n), n, n + 2, n + 4, n + 1, n + 3]
    permuted = call(program, node, aten.permute.default, split, order)
    return _reshape(program, node, permuted, [*batch, channels * r * r, height // r, width // r])


def _shuffle_channels(program: Program, node: fx.Node) -> fx.Node:
    x: Any = node.args[0]
    groups: Any = node.args[1]
    batch, channels, *spatial = shape_of(x)
    split = _reshape(program, node, x, [batch, groups, channels // groups, *spatial])
    swapped = call(program, node, aten.transpose.int, split, 1, 2)
    return _reshape(program, node, swapped, [batch, channels, *spatial])


RULES = (
    Rule("pixel_shuffle", (aten.pixel_shuffle.default,), _check, _shuffle),
    Rule("pixel_unshuffle", (aten.pixel_unshuffle.default,), _check, _unshuffle),
    Rule("channel_shuffle", (aten.channel_shuffle.default,), _check, _shuffle_channels),
)
