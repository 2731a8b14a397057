"""reconstruct: blocks end where one tensor is left, begin as what they are, and keep what helps samples held back."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from passing import images, network, passes_until, randn, randomize, refusal, sqnr
from torch import Tensor, nn

import qcompile
from examples import digits
from qcompile.blocks import Block, blocks, cut
from qcompile.capture import capture
from qcompile.config import QuantConfig
from qcompile.errors import ConfigError
from qcompile.ir import Program, finish
from qcompile.manager import PassManager
from qcompile.passes import Context, Pass, default_pipeline, reconstruct
from qcompile.passes.reconstruct import Reconstruct
from qcompile.passes.round_weights import RoundWeights
from qcompile.passes.smooth import Smooth
from qcompile.qdq import is_quantize, params
from qcompile.trainable import TrainableBlock

BITS = 4


class Branches(nn.Module):
    """A max pool and a reshape that share scales with what they read, a concatenation, a sum and a sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(16 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.cat([torch.sigmoid(self.left(x)), self.right(x) + x], 1)
        return self.head(torch.max_pool2d(x, 3).flatten(1))


@cache
def trained() -> tuple[nn.Module, digits.Digits]:
    data = digits.load()
    return digits.train(digits.network(), data.images, data.labels, epochs=4), data


def with_digits(bits: int, step: Pass | None, size: int = 1, **options: Any) -> tuple[Program, Context]:
    """The qdq graph of the network that is trained on digits, behind `step`; calibrated in batches of `size`."""
    model, data = trained()
    program = capture(model, (data.images[:2],), ({0: torch.export.Dim("batch", min=1, max=1024)},))
    context = Context(QuantConfig(weight_bits=bits), [(x,) for x in data.images[:64].split(size)], **options)
    PassManager((*passes_until("quantize"), *([step] if step else []))).run(program, context)
    return program, context


def unseen_sqnr(program: Program) -> float:
    model, data = trained()
    with torch.no_grad():
        return sqnr(model(data.held_out_images), program(data.held_out_images)[0])


def quantized(model: nn.Module, data: list[Tensor]) -> tuple[Program, Context]:
    """The qdq graph of `model`, and its context."""
    program = capture(model.eval(), (data[0],))
    context = Context(QuantConfig(weight_bits=BITS), [(x,) for x in data])
    PassManager(passes_until("quantize")).run(program, context)
    return program, context


def visited(program: Program, context: Context) -> list[Block]:
    found: list[Block] = []

    def visit(block: Block) -> bool:
        found.append(block)
        return False

    for _ in blocks(program, context.samples, context.originals, lambda layer: None, visit):
        pass
    return found


def values(program: Program, x: Tensor) -> dict[torch.fx.Node, Tensor]:
    """Of every node of the graph."""
    found: dict[torch.fx.Node, Tensor] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Tensor:
            found[n] = super().run_node(n)
            return found[n]

    with torch.no_grad():
        Recorder(program.graph_module).run(x)
    return found


def nearly_equal(one: Tensor, two: Tensor) -> bool:
    """But for values that lie half way between two steps: a qdq graph does not round biases as an int32 sum does."""
    return bool(torch.isclose(one, two, rtol=1e-4, atol=1e-5).double().mean() > 0.95)


def test_a_residual_block_is_one_block_and_other_layers_have_their_own() -> None:
    program, context = quantized(network(), images(8))
    assert [len(block.layers) for block in visited(program, context)] == [1, 2, 1, 1]
    pieces = cut(program, context.originals)
    assert [n for piece in pieces for n in piece] == [n for n in program.graph.nodes if n.op != "output"]


def test_a_block_has_what_the_quantized_graph_hands_to_it_and_what_it_makes_in_float() -> None:
    model, data = network(), images(8)
    program, context = quantized(model, data)
    stem, residual, *_, last = visited(program, context)
    ((entry, read),) = [(n, v) for n, v in residual.inputs.items() if n.op == "call_function"]
    ((_, made),), ((_, logits),) = stem.outputs.items(), last.outputs.items()
    for i, x in enumerate(data):
        assert torch.equal(read[i], values(program, x)[entry])
        torch.testing.assert_close(made[i], model.get_submodule("2")(model[1](model[0](x))), rtol=1e-4, atol=1e-5)  # type: ignore[index]
        torch.testing.assert_close(logits[i], model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", [network(), randomize(Branches())], ids=["residual", "branches"])
def test_a_trainable_block_begins_as_the_block_and_what_it_learned_can_be_written(model: nn.Module) -> None:
    data = [randn(1, 3, 10, 10, seed=i) for i in range(8)]
    program, context = quantized(model, data)
    generator = torch.Generator().manual_seed(3)
    for block in visited(program, context):
        block.inputs |= {n: [values(program, x)[n] for x in data] for n in block.inputs if n.op == "call_function"}
        learner = TrainableBlock(block)
        before = values(program, data[5])
        for node, made in learner(5).items():
            assert nearly_equal(made, before[node])
        for parameter in learner.parameters:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        learned = learner(5)
        learner.write()
        after = values(program, data[5])
        for node, made in learned.items():
            assert not nearly_equal(after[node], before[node])
            assert nearly_equal(made, after[node])
    finish(program)
    pool = next(n for n in program.graph.nodes if "max_pool2d" in n.name and not is_quantize(n))
    (behind,) = pool.users
    assert params(behind) == params(pool.args[0].args[0])


def test_few_bits_come_closer_to_the_float_network_on_unseen_data() -> None:
    """Than without, and at three bits than by least squares alone."""
    assert unseen_sqnr(with_digits(4, Reconstruct(epochs=4))[0]) > unseen_sqnr(with_digits(4, None)[0]) + 5
    assert unseen_sqnr(with_digits(3, Reconstruct())[0]) > unseen_sqnr(with_digits(3, RoundWeights())[0]) + 0.3


def test_what_does_not_help_unseen_samples_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """With steps that are much too long, every block stays as least squares made it, and the ledger says why."""
    monkeypatch.setattr(reconstruct, "_WEIGHT_RATE", 30.0)
    monkeypatch.setattr(reconstruct, "_SCALE_RATE", 3.0)
    program, context = quantized(network(), images(16))
    PassManager((Reconstruct(epochs=2),)).run(program, context)
    plain, other = quantized(network(), images(16))
    PassManager((RoundWeights(),)).run(plain, other)
    x = randn(1, 3, 10, 10, seed=5)
    assert torch.equal(program(x)[0], plain(x)[0])
    reasons = [reason for rule, _, reason in program.ledger.declined if rule == "reconstruct"]
    assert len(reasons) == 4
    assert all("4 samples that were held back" in reason for reason in reasons)


@pytest.mark.parametrize("rate", [0.02, 0.5, 30.0])
def test_no_block_becomes_worse_on_the_samples_that_are_held_back(monkeypatch: pytest.MonkeyPatch, rate: float) -> None:
    monkeypatch.setattr(reconstruct, "_WEIGHT_RATE", rate)
    program, context = quantized(network(), images(24))
    for block in visited(program, context):
        learner = TrainableBlock(block)
        before = reconstruct._errors(learner, [1, 4, 9, 16]).mean()
        kept = reconstruct._fit(learner, torch.arange(10, 24), [1, 4, 9, 16], 3, torch.Generator().manual_seed(0))
        after = reconstruct._errors(learner, [1, 4, 9, 16]).mean()
        assert after < before if kept else after <= before


@pytest.mark.parametrize("model", [network(), randomize(Branches())], ids=["residual", "branches"])
def test_a_reconstructed_model_is_exact_and_integer_throughout(model: nn.Module) -> None:
    pipeline = default_pipeline().after("quantize", Reconstruct(epochs=2))
    config = QuantConfig(weight_bits=BITS)
    compiled = qcompile.compile(model, calibration=images(16), config=config, pipeline=pipeline, strict=True)
    for image in randn(4, 3, 10, 10, seed=5).split(1):
        assert torch.equal(compiled(image), compiled.reference(image))


def test_the_same_seed_gives_the_same_bits() -> None:
    x = trained()[1].held_out_images
    one, two, other = (with_digits(3, Reconstruct(epochs=2, seed=seed))[0](x)[0] for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_batches_of_a_dynamic_size_are_taken_apart_and_others_are_not() -> None:
    program, context = with_digits(3, None, size=16)
    single = reconstruct._single(program, context.samples)
    assert torch.equal(torch.stack([x for (x,) in single]), trained()[1].images[:64, None])
    program, context = quantized(network(), images(8, batch=2))
    assert [x.shape[0] for (x,) in reconstruct._single(program, context.samples)] == [2] * 8


def test_a_rewrite_limit_leaves_later_blocks_as_least_squares_made_them() -> None:
    before = len(with_digits(3, None)[1].rewrites)
    made = []
    for limit in (before, before + 1, None):
        _, context = with_digits(3, Reconstruct(epochs=2), rewrite_limit=limit)
        made.append([rule for rule, _ in context.rewrites].count("reconstruct"))
    assert made[:2] == [0, 1]
    assert made[2] > 1


def test_too_few_samples_and_no_epochs_are_errors() -> None:
    pipeline = default_pipeline().after("quantize", Reconstruct())
    assert "kept 7 samples in 7 batches; 8 in two are needed" in str(refusal(network(), images(7), pipeline=pipeline))
    one_batch = [randn(64, 3, 10, 10)]
    assert "kept 64 samples in 1 batch;" in str(refusal(network(), one_batch, pipeline=pipeline))
    fast = QuantConfig(preset="fast")
    assert "kept 0 samples" in str(refusal(network(), images(16), config=fast, pipeline=pipeline))
    with pytest.raises(ConfigError, match="epochs is 0"):
        Reconstruct(epochs=0)


def test_samples_of_a_large_static_batch_are_counted_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruct, "_WEIGHT_RATE", 30.0)  # much too long steps: no block is kept
    program, context = quantized(network(), [randn(8, 3, 10, 10, seed=i) for i in range(4)])
    PassManager((Reconstruct(epochs=1),)).run(program, context)
    reasons = [reason for rule, _, reason in program.ledger.declined if rule == "reconstruct"]
    assert len(reasons) == 4
    assert all("8 samples that were held back" in reason for reason in reasons)
    block = visited(program, context)[0]
    assert len(reconstruct._errors(TrainableBlock(block), [1, 3])) == 16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Reconstruct(epochs=1.5), "epochs is 1.5"),  # type: ignore[arg-type]
        (lambda: Reconstruct(epochs="a"), "epochs is 'a'"),  # type: ignore[arg-type]
        (lambda: Reconstruct(seed=-1), "seed is -1"),
        (lambda: Reconstruct(decay=-3), "decay is -3"),
        (lambda: RoundWeights(decay=float("nan")), "decay is nan"),
        (lambda: RoundWeights(decay=float("inf")), "decay is inf"),
        (lambda: RoundWeights(decay="x"), "decay is 'x'"),  # type: ignore[arg-type]
        (lambda: Smooth(alpha="x"), "alpha is 'x'"),  # type: ignore[arg-type]
        (lambda: Smooth(alpha=1.1), r"alpha is 1.1(.|\n)*a number from 0 to 1"),
        (lambda: Smooth(samples=True), "samples is True"),
    ],
)
def test_options_of_passes_are_checked_when_they_are_made(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_model_without_layers_is_left_alone() -> None:
    program, context = quantized(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), images(8))
    assert not PassManager((Reconstruct(),)).run(program, context)[0].changed
