"""Rules: averages over space and one-dimensional pooling, in the forms of the op table.

mean(x, (2, 3))                ->  adaptive_avg_pool2d(x, 1)  (-> squeeze)      any order, negative or not
mean(x, 2), x 3-d              ->  the same behind an unsqueeze
pool1d(x)                      ->  squeeze(pool2d(unsqueeze(x, 2)), 2)
max_pool2d_with_indices(x)[0]  ->  max_pool2d(x)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from qcompile.ir import Program, shape_of
from qcompile.passes.rules_weighted import argument, per_dim
from qcompile.rewrite import Rule, call

aten = torch.ops.aten


def _mean_dims(node: fx.Node) -> tuple[int, ...]:
    rank = len(shape_of(node.args[0]))  # type: ignore[arg-type]
    dims: Any = argument(node, 1, None)
    return tuple(sorted(d % rank for d in per_dim(dims, 1))) if dims is not None else ()


def _check_mean(program: Program, node: fx.Node) -> str | None:
    rank = len(shape_of(node.args[0]))  # type: ignore[arg-type]
    if node.kwargs.get("dtype") not in (None, torch.float32):
        return f"it sums in {node.kwargs['dtype']}"
    wanted = {4: (2, 3), 3: (2,)}.get(rank)
    if _mean_dims(node) != wanted:
        return f"it averages dimensions {_mean_dims(node)} of {rank}, which are not all of space"
    return None


def _mean_to_pool(program: Program, node: fx.Node) -> fx.Node:
    x: Any = node.args[0]
    keep, flat = argument(node, 2, False), len(shape_of(x)) == 3
    if flat:
        x = call(program, node, aten.unsqueeze.default, x, 2)
    pooled = call(program, node, aten.adaptive_avg_pool2d.default, x, [1, 1])
    if flat:
        pooled = call(program, node, aten.squeeze.dim, pooled, 2)
        return pooled if keep else call(program, node, aten.squeeze.dim, pooled, 2)
    return pooled if keep else call(program, node, aten.squeeze.dims, pooled, [2, 3])


def _check_pool1d(program: Program, node: fx.Node) -> str | None:
    rank = len(shape_of(node.args[0]))  # type: ignore[arg-type]
    return None if rank == 3 else f"its input has {rank} dimensions, not batch, channels and length"


def _pool1d(target: Any, fillers: tuple[Any, ...]) -> Any:
    """Replace a 1-d pooling by `target`; `fillers` are what each argument is along the new dimension
    of length 1, or None for an argument that is the same in both."""

    def replace(program: Program, node: fx.Node) -> fx.Node:
        x = call(program, node, aten.unsqueeze.default, node.args[0], 2)
        args = [
            given if filler is None else ([filler, *per_dim(given, 1)] if given != [] else [])
            for given, filler in zip(node.args[1:], fillers, strict=False)
        ]
        return call(program, node, aten.squeeze.dim, call(program, node, target, x, *args), 2)

    return replace


def _check_indices(program: Program, node: fx.Node) -> str | None:
    pool: Any = node.args[0]
    if pool.target is not aten.max_pool2d_with_indices.default:
        return ""
    return None if node.args[1] == 0 else "its indices are used"


def _without_indices(program: Program, node: fx.Node) -> fx.Node:
    pool: Any = node.args[0]
    return call(program, node, aten.max_pool2d.default, *pool.args, **pool.kwargs)


def _always(program: Program, node: fx.Node) -> str | None:
    return None


def _public_name(program: Program, node: fx.Node) -> fx.Node:
    return call(program, node, aten.adaptive_avg_pool2d.default, *node.args)


RULES = (
    Rule("mean_to_pool", (aten.mean.dim,), _check_mean, _mean_to_pool),
    Rule("pool_without_indices", (operator.getitem,), _check_indices, _without_indices),
    Rule("adaptive_pool_name", (aten._adaptive_avg_pool2d.default,), _always, _public_name),
    # kernel, stride, padding, dilation, ceil_mode
    Rule("max_pool1d", (aten.max_pool1d.default,), _check_pool1d, _pool1d(aten.max_pool2d.default, (1, 1, 0, 1, None))),
    # kernel, stride, padding, ceil_mode, count_include_pad
    Rule(
        "avg_pool1d", (aten.avg_pool1d.default,), _check_pool1d, _pool1d(aten.avg_pool2d.default, (1, 1, 0, None, None))
    ),
    Rule(
        "adaptive_avg_pool1d",
        (aten.adaptive_avg_pool1d.default,),
        _check_pool1d,
        _pool1d(aten.adaptive_avg_pool2d.default, (1,)),
    ),
)
