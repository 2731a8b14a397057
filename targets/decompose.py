"""One ATen operator -> a small graph of simpler ones, by PyTorch's decompositions and a few of our own.

This is for float operators that TVM's frontend does not take, or gets wrong. It happens while lowering:
the integer graph keeps the operator as the model has it, runs it eagerly, and has one row of the ledger for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import fx
from torch._decomp import core_aten_decompositions, decomposition_table
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from qcompile.ir import copy_meta
from qcompile.targets.decompositions import OWN

Table = Mapping[Any, Callable[..., Any]]


@cache
def _tables() -> tuple[Table, Table]:
    """What may be used, the preferred one first: torch's reference library decomposes into operators of its
    own (prims), so it is asked last."""
    known = {**decomposition_table, **core_aten_decompositions()}
    plain = {op: rule for op, rule in known.items() if not str(rule.__module__).startswith("torch._refs")}
    return {**plain, **OWN}, {**known, **OWN}


def decomposed(node: fx.Node, takes: Callable[[Any], bool]) -> fx.GraphModule | None:
    """`node` in terms of operators that `takes` accepts, as far as there are decompositions.

    The placeholders of the graph stand for `node.all_input_nodes`, in order; its nodes have the origin
    (module, source line) of `node`. None where nothing simpler is known.

    Raises:
        Exception: PyTorch's own, for example where a decomposition needs a dynamic size as a number.
    """
    found = None
    for table in _tables():
        traced = _trace(node, {op: rule for op, rule in table.items() if op is node.target or not takes(op)})
        calls = [n.target for n in traced.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
        if node.target not in calls:
            found = traced
            if all(map(takes, calls)):
                break
    return found


@contextmanager
def _without_onednn() -> Iterator[None]:
    """Its recurrent layer is an operator of its own."""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def _trace(node: fx.Node, table: Table) -> fx.GraphModule:
    operands = node.all_input_nodes

    def apply(*values: Any) -> Any:
        given = dict(zip(operands, values, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), given.__getitem__)
        target: Any = OWN.get(node.target, node.target)
        return target(*args, **kwargs)

    values = [operand.meta["val"] for operand in operands]
    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None) or FakeTensorMode()
    # A new guard would fix a dynamic size to the example's.
    guarded = mode.shape_env.error_on_new_guards() if mode.shape_env is not None else nullcontext()
    with mode, enable_python_dispatcher(), torch.no_grad(), _without_onednn(), guarded:
        traced = make_fx(functionalize(apply, remove="mutations"), decomposition_table=dict(table))(*values)
    traced.graph.eliminate_dead_code()
    for inner in traced.graph.nodes:
        copy_meta(inner, node)
    return traced
