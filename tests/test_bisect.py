"""Looking into a pipeline: the graph after each pass as text, and the limit that bisects a wrong rewrite."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from passing import Block, passes_until, randn, randomize
from torch import Tensor, fx, nn

from qcompile import rewrite
from qcompile.capture import capture
from qcompile.errors import PassError
from qcompile.ir import Program, call_nodes
from qcompile.manager import PassManager
from qcompile.passes import Context, Pass
from qcompile.quantizer import quantize
from qcompile.text import graph_text

aten = torch.ops.aten
X = randn(1, 4, 6, 6)


def captured() -> Program:
    return capture(randomize(Block()), (X,))


@dataclass(frozen=True)
class Fails(Pass):
    name: ClassVar[str] = "fails"

    def run(self, program: Program, context: Context) -> bool:
        raise RuntimeError("boom")


# --- dump --------------------------------------------------------------------------------------------


def test_a_dump_to_a_callable_gets_the_graph_after_each_pass() -> None:
    dumped: list[tuple[int, str, str]] = []
    program = captured()
    first = graph_text(program)
    PassManager(passes_until("fold_batchnorm"), lambda *args: dumped.append(args)).run(program, Context())
    assert [entry[:2] for entry in dumped] == [(0, "capture"), (1, "canonicalize"), (2, "fold_batchnorm")]
    assert dumped[0][2] == first
    assert "batch_norm" in dumped[1][2]
    assert dumped[2][2] == graph_text(program)


def test_a_dump_to_a_folder_is_one_file_per_pass(tmp_path: Path) -> None:
    program = captured()
    PassManager(passes_until("fold_batchnorm"), tmp_path / "new" / "folder").run(program, Context())
    files = sorted((tmp_path / "new" / "folder").iterdir())
    assert [f.name for f in files] == ["00_capture.txt", "01_canonicalize.txt", "02_fold_batchnorm.txt"]
    assert files[-1].read_text() == graph_text(program)


def test_a_dump_ends_before_the_pass_that_fails() -> None:
    dumped: list[str] = []
    with pytest.raises(PassError):
        PassManager((*passes_until("canonicalize"), Fails()), lambda _, name, __: dumped.append(name)).run(
            captured(), Context()
        )
    assert dumped == ["capture", "canonicalize"]


# --- the rewrite limit ---------------------------------------------------------------------------------


class Rewritten(nn.Module):
    """Takes several rewrites: dropouts, casts, and two batch norms to fold."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.block(self.drop(x)))
        return (y * torch.sigmoid(y)).mean((2, 3))


def limited(limit: int | None) -> tuple[Program, Context]:
    program, context = capture(randomize(Rewritten()), (X,)), Context(rewrite_limit=limit)
    PassManager(passes_until("fold_batchnorm")).run(program, context)
    return program, context


def test_a_growing_limit_goes_from_the_captured_graph_to_the_whole_one() -> None:
    whole, context = limited(None)
    total = len(context.rewrites)
    assert total >= 6
    texts = []
    for limit in range(total + 2):
        program, spent = limited(limit)
        assert spent.rewrites == context.rewrites[:limit]
        torch.testing.assert_close(program(X), whole(X))
        texts.append(graph_text(program))
    assert texts[0] == graph_text(capture(randomize(Rewritten()), (X,)))
    assert len(set(texts[: total + 1])) == total + 1  # each rewrite changed something
    assert texts[total] == texts[total + 1] == graph_text(whole)


@dataclass(frozen=True)
class Sloppy(Pass):
    """relu(x) -> hardtanh(x, 0, 1000), but for the relu of the module `wrong`, which becomes a sigmoid."""

    wrong: str

    name: ClassVar[str] = "sloppy"

    def run(self, program: Program, context: Context) -> bool:
        rule = rewrite.Rule("sloppy", (aten.relu.default,), lambda program, node: None, self.replace)
        return rewrite.apply([rule], program, context)

    def replace(self, program: Program, node: fx.Node) -> fx.Node:
        if self.wrong in str(node.meta["nn_module_stack"]):
            return rewrite.call(program, node, aten.sigmoid.default, node.args[0])
        return rewrite.call(program, node, aten.hardtanh.default, node.args[0], 0.0, 1000.0)


def test_halving_the_limit_finds_the_wrong_rewrite() -> None:
    model = randomize(nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(7))))
    x = randn(3, 6)
    with torch.no_grad():
        expected = model(x)

    def is_right(limit: int) -> tuple[bool, Context]:
        program, context = capture(model, (x,)), Context(rewrite_limit=limit)
        PassManager((Sloppy("'4.1'"),)).run(program, context)
        return torch.allclose(program(x)[0], expected), context

    good, bad = 0, 7
    assert is_right(good)[0]
    assert not is_right(bad)[0]
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if is_right(middle)[0] else (good, middle)
    relus = list(call_nodes(capture(model, (x,)).graph, [aten.relu.default]))
    assert is_right(bad)[1].rewrites[-1] == ("sloppy", relus[4].name)


def test_quantize_takes_the_limit_and_the_dump(tmp_path: Path) -> None:
    quantize(randomize(Block()), calibration=[X], rewrite_limit=1, dump=tmp_path)
    assert (tmp_path / "02_fold_batchnorm.txt").read_text().count("batch_norm_legit_no_training(") == 1
