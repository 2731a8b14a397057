"""Passes that win back accuracy: each does what its formula says, and the compiled model stays exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from passing import Block, images, network, randn, randomize, sqnr
from torch import Tensor, nn

import qcompile
from qcompile.capture import capture
from qcompile.config import PRESETS, QuantConfig
from qcompile.ir import Program
from qcompile.leastsquares import Problem
from qcompile.manager import PassManager
from qcompile.passes import Context, Pass, default_pipeline
from qcompile.passes.round_weights import RoundWeights
from qcompile.twins import Layer, layers

SHAPES = [
    (nn.Conv2d(3, 6, 3, padding=1), (2, 3, 7, 6)),
    (nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2), groups=2), (1, 4, 9, 8)),
    (nn.Conv2d(5, 5, 3, groups=5, padding="same", bias=False), (2, 5, 6, 6)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 11)),
    (nn.Linear(9, 4), (3, 9)),
    (nn.Linear(9, 4, bias=False), (2, 5, 9)),
]


def visited(model: nn.Module, *batches: Tensor) -> tuple[Program, Context, list[Layer]]:
    """The qdq graph of `model`, and its layers as a pass meets them."""
    program = capture(model.eval(), (batches[0],))
    context = Context(QuantConfig(), [(batch,) for batch in batches])
    pipeline = tuple(default_pipeline())
    at = [step.name for step in pipeline].index("quantize") + 1
    PassManager(pipeline[:at]).run(program, context)
    found: list[Layer] = []
    for _ in layers(program, context.samples, context.originals, found.append):
        pass
    return program, context, found


@pytest.mark.parametrize(("model", "shape"), SHAPES, ids=lambda v: str(v) if isinstance(v, nn.Module) else "")
def test_an_output_is_its_patch_times_a_row_of_the_weight(model: nn.Module, shape: tuple[int, ...]) -> None:
    """For every geometry: float inputs times the float weight make the float outputs."""
    data = [randn(*shape, seed=i) for i in range(3)]
    _, _, (layer,) = visited(model, *data)
    weight = layer.original.flatten(1).unflatten(0, (layer.groups, -1))
    bias = layer.bias.unflatten(0, (layer.groups, 1, -1)) if layer.bias is not None else torch.zeros(1)
    for x, y in zip(data, layer.outputs, strict=True):
        made = layer.patches(x) @ weight.transpose(1, 2) + bias
        torch.testing.assert_close(made, layer.per_position(y), rtol=1e-4, atol=1e-5)


def test_layers_read_the_quantized_graph_and_are_held_to_the_float_one() -> None:
    model = randomize(Block())
    data = [randn(1, 4, 6, 6, seed=i) for i in range(4)]
    program, _, (first, second) = visited(model, *data)
    values: dict[str, Tensor] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            values[n.name] = super().run_node(n)
            return values[n.name]

    for i, x in enumerate(data):
        with torch.no_grad():
            Recorder(program.graph_module).run(x)
            for layer in (first, second):
                assert torch.equal(layer.inputs[i], values[str(layer.node.args[0])])
            convolution_and_norm = model.get_submodule("first")[:2]  # type: ignore[index]
            torch.testing.assert_close(first.outputs[i], convolution_and_norm(x), rtol=1e-4, atol=1e-5)


def problem(model: nn.Module, shape: tuple[int, ...], decay: float = 0.0) -> tuple[Layer, Problem]:
    _, _, (layer,) = visited(model, *[randn(*shape, seed=i) for i in range(4)])
    return layer, Problem.of(layer, decay)


@pytest.mark.parametrize(("model", "shape"), SHAPES, ids=lambda v: str(v) if isinstance(v, nn.Module) else "")
def test_the_loss_is_the_mean_squared_error_with_the_best_bias(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Up to what does not depend on the weights."""
    layer, it = problem(model, shape)

    def error(weight: Tensor) -> Tensor:
        total, count = torch.zeros_like(it.y_mean), 0
        for x, y in zip(layer.inputs, layer.outputs, strict=True):
            made = layer.patches(x).double() @ weight.transpose(1, 2) + it.bias(weight)[:, None, :]
            total += (made - layer.per_position(y)).square().sum(1)
            count += made.shape[1]
        return total / count

    torch.manual_seed(0)
    one, two = (torch.randn(it.c.shape, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(error(one) - error(two), it.loss(one) - it.loss(two), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_descending_ends_where_no_step_of_one_weight_helps(decay: float) -> None:
    layer, it = problem(nn.Conv2d(3, 6, 3, padding=1), (2, 3, 7, 6), decay)
    scale = layer.scale.double()[None]
    start = layer.q.double().flatten(1)[None]
    q = it.descend(start, scale, 1000)
    lowest = it.loss(q * scale[:, :, None])
    assert bool((lowest <= it.loss(start * scale[:, :, None])).all())
    assert bool((lowest < it.loss(start * scale[:, :, None])).any())
    assert int(q.abs().max()) <= 127
    assert torch.equal(q, q.round())
    for k in range(q.shape[2]):
        for step in (-1, 1):
            other = q.clone()
            other[:, :, k] += step
            allowed = other[:, :, k].abs() <= 127
            assert bool((it.loss(other * scale[:, :, None]) >= lowest - 1e-9)[allowed].all())


def compiled_with(*steps: Pass) -> tuple[nn.Module, Any]:
    model, pipeline, at = network(), default_pipeline(), "quantize"
    for step in steps:
        pipeline = pipeline.after(at, step)
        at = step.name
    return model, qcompile.compile(model, calibration=images(32), pipeline=pipeline)


def test_a_model_with_rounded_weights_is_exact_and_closer_to_the_float_one() -> None:
    x = randn(40, 3, 10, 10, seed=77)
    model, plain = compiled_with()
    _, better = compiled_with(RoundWeights())
    for image in x.split(1)[:5]:
        assert torch.equal(better(image), better.reference(image))
    want = model(x).detach()
    before, after = (sqnr(want, torch.cat([c(image) for image in x.split(1)])) for c in (plain, better))
    assert after > before


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_gives_an_exact_model(preset: str) -> None:
    model, x = network(), randn(4, 3, 10, 10, seed=5)
    compiled = qcompile.compile(model, calibration=images(32), config=QuantConfig(preset=preset))
    assert ("round_weights" in [step.name for step in compiled.artifact.passes]) == (preset != "fast")
    for image in x.split(1):
        assert torch.equal(compiled(image), compiled.reference(image))


def test_recovery_gives_the_same_bits_every_time() -> None:
    x = randn(1, 3, 10, 10)
    _, one = compiled_with(RoundWeights())
    _, two = compiled_with(RoundWeights())
    assert torch.equal(one(x), two(x))
