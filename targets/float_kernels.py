"""Float operators that are lowered here, because TVM's frontend has no way, or a wrong one, and no decomposition
helps. Arguments are read by their names in the operator's schema.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from tvm import relax

from qcompile.targets.cpu.along import accumulate, argsort

if TYPE_CHECKING:
    from qcompile.targets.float_ops import FloatOps
    from qcompile.targets.lowering import Lowering

aten = torch.ops.aten


def argument(node: fx.Node, name: str) -> Any:
    """The argument called `name`, or its default."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    for i, declared in enumerate(schema.arguments):
        if declared.name == name:
            return node.args[i] if i < len(node.args) else node.kwargs.get(name, declared.default_value)
    raise KeyError(name)


def dtype_of(node: fx.Node) -> str:
    return str(node.meta["val"].dtype).removeprefix("torch.")


def _along(low: Lowering, node: fx.Node) -> tuple[Any, int]:
    """Shape and dimension of an operator along one dimension; a scalar has one line of one element."""
    shape = low.shape(argument(node, "self"))
    return (shape, argument(node, "dim") % len(shape)) if shape else ((1,), 0)


def _accumulate(operation: str) -> Callable[[FloatOps, fx.Node], Any]:
    def convert(ops: FloatOps, node: fx.Node) -> Any:
        x: fx.Node = argument(node, "self")
        types = (dtype_of(x), dtype_of(node))
        kernel = accumulate(operation, *_along(ops.low, node), types, ops.low.symbol_args)
        return ops.call(node, kernel, x, types[1])

    return convert


def _sort(ops: FloatOps, node: fx.Node) -> Any:
    x: fx.Node = argument(node, "self")
    shape, dim = _along(ops.low, node)
    if not isinstance(shape[dim], int):
        raise NotImplementedError("it sorts a dynamic dimension")
    if dtype_of(x) == "bool":
        raise NotImplementedError("it sorts booleans")
    kernel = argsort(shape, dim, dtype_of(x), bool(argument(node, "descending")), ops.low.symbol_args)
    indices = ops.call(node, kernel, x, "int64")
    values = relax.op.gather_elements(ops.value(x), indices, dim) if ops.low.shape(x) else ops.value(x)
    return [ops.low.builder.emit(values), indices]


def _extreme(reduce: Callable[..., relax.Expr]) -> Callable[[FloatOps, fx.Node], Any]:
    def convert(ops: FloatOps, node: fx.Node) -> Any:
        dim = argument(node, "dim")
        axes = [dim] if isinstance(dim, int) else list(dim) or None
        return ops.low.builder.emit(reduce(ops.value(argument(node, "self")), axes, bool(argument(node, "keepdim"))))

    return convert


def _clamp(ops: FloatOps, node: fx.Node) -> Any:
    """Unlike the frontend's, of integers too."""
    result = ops.value(argument(node, "self"))
    names = [declared.name for declared in node.target._schema.arguments]  # type: ignore[union-attr]
    for name, choose in (("min", relax.op.maximum), ("max", relax.op.minimum)):
        bound = argument(node, name) if name in names else None
        if isinstance(bound, float) and not dtype_of(node).startswith("float"):
            raise NotImplementedError("it bounds integers by a float")
        if bound is not None:
            result = ops.low.builder.emit(choose(result, relax.const(bound, dtype_of(node))))
    return result


def _within(ops: FloatOps, index: relax.Expr, dtype: str, size: Any) -> relax.Expr:
    """`index` clamped to a dimension of `size`: machine code reads and writes nothing outside of a tensor.

    PyTorch raises an error for such an index, which a kernel cannot.
    """
    emit = ops.low.builder.emit
    if isinstance(size, int):
        last = relax.const(size - 1, dtype)
    else:
        last = emit(relax.op.astype(relax.op.shape_to_tensor(relax.ShapeExpr([size - 1])), dtype))
    return emit(relax.op.maximum(emit(relax.op.minimum(index, last)), relax.const(0, dtype)))


def _along_indices(ops: FloatOps, node: fx.Node) -> relax.Expr:
    """What is at each index, along one dimension of a tensor."""
    table = "weight" if node.target is aten.embedding.default else "self"
    x, index = argument(node, table), argument(node, "indices" if table == "weight" else "index")
    shape = ops.low.shape(x)
    dim = 0 if table == "weight" else argument(node, "dim") % max(len(shape), 1)
    inside = _within(ops, ops.value(index), dtype_of(index), shape[dim]) if shape else ops.value(index)
    if node.target is aten.gather.default:
        return ops.low.builder.emit(relax.op.gather_elements(ops.value(x), inside, dim))
    return ops.low.builder.emit(relax.op.take(ops.value(x), inside, dim, mode="clip"))


def _index(ops: FloatOps, node: fx.Node) -> Any:
    """The frontend's, but a negative index counts from the end."""
    env, emit = ops.importer.env, ops.low.builder.emit
    indices = {i: n for i, n in enumerate(argument(node, "indices")) if n is not None}
    kept = {n: env[n] for n in indices.values()}
    shape = ops.low.shape(argument(node, "self"))
    try:
        for i, n in indices.items():
            if n.op == "get_attr" and n.meta["val"].numel() and (ops.constant(n) >= 0).all():
                continue
            if not isinstance(shape[i], int):
                raise NotImplementedError("it indexes a dynamic dimension by values that may be negative")
            index, zero = kept[n], relax.const(0, dtype_of(n))
            from_end = emit(relax.op.add(index, relax.const(shape[i], dtype_of(n))))
            counted = emit(relax.op.where(emit(relax.op.less(index, zero)), from_end, index))
            env[n] = _within(ops, counted, dtype_of(n), shape[i])
        return ops.importer.convert_map["index.Tensor"](node)
    finally:
        env.update(kept)


def _select(ops: FloatOps, node: fx.Node) -> Any:
    """One index of one dimension; a negative one counts from the end (the frontend would read out of bounds)."""
    x, index = argument(node, "self"), argument(node, "index")
    if not isinstance(index, int):
        raise NotImplementedError("its index is computed at run time")
    shape = ops.low.shape(x)
    dim = argument(node, "dim") % len(shape)
    start = index if index >= 0 else shape[dim] + index
    sliced = ops.low.builder.emit(relax.op.strided_slice(ops.value(x), [dim], [start], [start + 1]))
    return ops.low.builder.emit(relax.op.squeeze(sliced, [dim]))


def _scatter(reduction: str) -> Callable[[FloatOps, fx.Node], Any]:
    def convert(ops: FloatOps, node: fx.Node) -> Any:
        x, index, updates = (argument(node, name) for name in ("self", "index", "src"))
        shape, emit = ops.low.shape(index), ops.low.builder.emit
        source = ops.value(updates)
        if [str(d) for d in shape] != [str(d) for d in ops.low.shape(updates)]:
            axes = list(range(len(shape)))
            source = emit(relax.op.strided_slice(source, axes, [0] * len(axes), list(shape)))
        dim, whole = argument(node, "dim"), ops.low.shape(x)
        inside = _within(ops, ops.value(index), dtype_of(index), whole[dim]) if whole else ops.value(index)
        return emit(relax.op.scatter_elements(ops.value(x), inside, source, dim, reduction))

    return convert


CONVERSIONS: dict[Any, Callable[[FloatOps, fx.Node], Any]] = {
    aten.cumsum.default: _accumulate("cumsum"),
    aten.cumprod.default: _accumulate("cumprod"),
    aten.sort.stable: _sort,
    aten.amax.default: _extreme(relax.op.max),
    aten.amin.default: _extreme(relax.op.min),
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
    aten.clamp_max.default: _clamp,
    aten.embedding.default: _along_indices,
    aten.gather.default: _along_indices,
    aten.index_select.default: _along_indices,
    aten.index.Tensor: _index,
    aten.select.int: _select,
    aten.scatter.src: _scatter("update"),
    aten.scatter_add.default: _scatter("add"),
}
