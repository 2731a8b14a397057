"""Shape inference keeps a dynamic batch symbolic: no row turns it into a number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qcompile import ops
from qcompile.ops import Act, Row


class Call(nn.Module):
    """One integer operator whose activations are the inputs."""

    def __init__(self, row: Row, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.row = row
        leaves, self.structure = pytree.tree_flatten((args, kwargs))
        self.leaves = leaves
        self.at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Act)]

    def forward(self, *xs: Tensor) -> Tensor:
        leaves = list(self.leaves)
        for i, x in zip(self.at, xs, strict=True):
            leaves[i] = x
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        result = self.row.op(*args, **kwargs)
        assert isinstance(result, Tensor)
        return result


@pytest.mark.parametrize("row", ops.integer_rows(), ids=lambda row: row.name)
def test_the_batch_of_an_integer_operator_may_be_dynamic(row: Row) -> None:
    sample = next(s for s in row.samples(torch.Generator().manual_seed(1)) if "x" in s.label)
    call = Call(row, sample.args, sample.kwargs)
    # Three images of each activation: torch.export takes a batch of one for a number.
    xs = tuple(torch.cat([call.leaves[i].tensor[:1]] * 3) for i in call.at)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(call, xs, dynamic_shapes={"xs": tuple({0: batch} for _ in xs)})
    (output,) = (n for n in exported.graph.nodes if n.op == "output")
    value = output.args[0][0].meta["val"]
    assert not isinstance(value.shape[0], int)
    assert all(isinstance(size, int) for size in value.shape[1:])
    assert torch.equal(exported.module()(*(torch.cat([x, x]) for x in xs))[:3], call(*xs))
