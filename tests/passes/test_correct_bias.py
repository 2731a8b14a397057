"""correct_bias: what comes out of a layer has the mean that it has in float, from samples or from batch norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from passing import Block, images, network, randn, randomize, refusal, sqnr
from torch import Tensor, nn

import qcompile
from qcompile.capture import capture
from qcompile.config import QuantConfig
from qcompile.ir import MOMENTS, Moments, Program, finish
from qcompile.manager import PassManager
from qcompile.passes import Context, Pass, default_pipeline
from qcompile.passes.correct_bias import CorrectBias
from qcompile.passes.correct_bias_analytic import CorrectBiasAnalytic, clipped_mean
from qcompile.passes.equalize import Equalize
from qcompile.passes.round_weights import RoundWeights
from qcompile.twins import Layer, layers

EMPIRICAL, ANALYTIC = CorrectBias(), CorrectBiasAnalytic()


def quantized(
    model: nn.Module, data: list[Tensor], *, bits: int = 8, equalize: bool = False
) -> tuple[Program, Context]:
    """The qdq graph of `model`, and its context."""
    program = capture(model.eval(), (data[0],))
    context = Context(QuantConfig(weight_bits=bits), [(x,) for x in data])
    pipeline = default_pipeline().after("fold_batchnorm", Equalize()) if equalize else default_pipeline()
    PassManager(tuple(pipeline)[: pipeline.names.index("quantize") + 1]).run(program, context)
    return program, context


def corrected(program: Program, context: Context, step: Pass = EMPIRICAL) -> bool:
    changed = step.run(program, context)
    finish(program)
    return changed


def conv(inputs: int, outputs: int, *behind: nn.Module, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups), *behind)


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "convolution": (conv(3, 6), (2, 3, 7, 6)),
    "relu": (conv(3, 6, nn.ReLU()), (2, 3, 7, 6)),
    "relu6": (conv(3, 6, nn.BatchNorm2d(6), nn.ReLU6()), (2, 3, 7, 6)),
    "silu": (conv(3, 6, nn.SiLU()), (2, 3, 7, 6)),
    "slopes": (conv(3, 6, nn.PReLU(6)), (2, 3, 7, 6)),
    "depthwise": (conv(6, 6, nn.ReLU(), groups=6), (1, 6, 9, 9)),
    "no bias": (nn.Sequential(nn.Conv1d(4, 6, 3, bias=False), nn.ReLU()), (2, 4, 11)),
    "linear": (nn.Sequential(nn.Linear(9, 4), nn.ReLU()), (2, 5, 9)),
    "a chain": (nn.Sequential(conv(3, 8, nn.ReLU6()), conv(8, 8, nn.ReLU6(), groups=8), conv(8, 5)), (2, 3, 8, 8)),
}


@pytest.mark.parametrize("case", MODELS)
def test_behind_the_clamp_every_channel_has_its_float_mean(case: str) -> None:
    model, shape = MODELS[case]
    randomize(model)
    data = [randn(*shape, seed=i) for i in range(20)]
    program, context = quantized(model, data, bits=4)
    clamp = model[-1] if not isinstance(model[-1], (nn.Conv2d, nn.Sequential)) else nn.Identity()

    def largest_shift() -> float:
        """Of the last layer, in deviations of the channel; computed with the layer's own operator."""
        found: list[Layer] = []
        for _ in layers(program, context.samples, context.originals, found.append):
            pass
        layer = found[-1]
        weight = layer.q.float() * layer.scale.reshape(-1, *[1] * (layer.q.dim() - 1))
        target: Any = layer.node.target
        made = [clamp(target(x, weight, layer.bias, *layer.node.args[3:])) for x in layer.inputs]
        axis = -1 if "linear" in str(target) else 1
        ours, theirs = (
            torch.cat([y.movedim(axis, 0).flatten(1) for y in each], 1)
            for each in (made, [clamp(y) for y in layer.outputs])
        )
        return float(((ours.mean(1) - theirs.mean(1)).abs() / (theirs.std(1) + 1e-6)).max())

    before = largest_shift()
    assert corrected(program, context)
    assert before > 1e-3
    assert largest_shift() < 1e-4
    assert not corrected(program, context)


def test_a_sum_that_a_relu_reads_is_left_to_itself() -> None:
    program, context = quantized(randomize(Block()), [randn(2, 4, 6, 6, seed=i) for i in range(8)], bits=4)
    assert corrected(program, context)
    ((node, reason),) = [(name, why) for rule, name, why in program.ledger.declined if rule == "correct_bias"]
    assert "reads the sum" in reason
    convolutions = [n.name for n in program.graph.nodes if str(n.target) == "aten.conv2d.default"]
    assert node == convolutions[1]


@pytest.mark.parametrize("step", [EMPIRICAL, RoundWeights()])
def test_without_samples_there_is_an_error(step: Pass) -> None:
    pipeline, config = default_pipeline().after("quantize", step), QuantConfig(preset="fast")
    error = refusal(network(), images(16), config=config, pipeline=pipeline)
    assert "kept no samples" in str(error)


def test_a_second_recovery_is_held_to_the_float_network_too() -> None:
    """A bias that one pass has set is not what the next takes for float."""
    model = randomize(conv(3, 6, nn.ReLU()))
    data = [randn(2, 3, 7, 6, seed=i) for i in range(8)]
    program, context = quantized(model, data, bits=3)
    RoundWeights().run(program, context)
    finish(program)
    found: list[Layer] = []
    for _ in layers(program, context.samples, context.originals, found.append):
        pass
    for x, y in zip(data, found[0].outputs, strict=True):
        torch.testing.assert_close(y, model.get_submodule("0")(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bounds", [(None, None), (0.0, None), (0.0, 6.0), (-1.0, 0.5), (None, 1.0)])
def test_the_mean_of_clipped_normal_values(bounds: tuple[float | None, float | None]) -> None:
    mean, deviation = torch.tensor([-2.0, 0.0, 0.7, 5.0, 1.0]), torch.tensor([1.0, 0.3, 2.0, 3.0, 0.0])
    values = mean + deviation * torch.randn(2_000_000, 5, generator=torch.Generator().manual_seed(0))
    sampled = values if bounds == (None, None) else values.clamp(*bounds)
    found = clipped_mean(Moments(mean.double(), deviation.double()), *bounds)
    torch.testing.assert_close(found.float(), sampled.mean(0), rtol=0, atol=8e-3)


def trained_like(seed: int = 0) -> nn.Module:
    """A batch norm's statistics are those of its data, as after training: (N, 3, 16, 16) to (N, 5)."""
    model = nn.Sequential(
        conv(3, 24, nn.BatchNorm2d(24), nn.ReLU6()),
        conv(24, 24, nn.BatchNorm2d(24), nn.ReLU(), groups=24),
        conv(24, 12, nn.BatchNorm2d(12)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )
    randomize(model, seed)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
            norm.reset_running_stats()
    with torch.no_grad():
        model.train()(randn(64, 3, 16, 16, seed=1))
    return model.eval()


@pytest.mark.parametrize("equalize", [False, True])
def test_analytic_shifts_are_those_that_data_shows(equalize: bool) -> None:
    """Of every layer behind a batch norm; also where equalization has scaled its channels. The first reads the input,
    of which nothing is known."""
    data = [randn(16, 3, 16, 16, seed=i) for i in range(2, 6)]
    program, context = quantized(trained_like(), data, bits=5, equalize=equalize)
    found: list[Layer] = []
    for _ in layers(program, context.samples, context.originals, found.append):
        pass
    shown, biases = dict[str, Tensor](), dict[str, Tensor]()
    for layer in found:
        weight = layer.q.double() * layer.scale.double().reshape(-1, *[1] * (layer.q.dim() - 1))
        target: Any = layer.node.target
        lost = [target(x.double(), layer.original - weight, None, *layer.node.args[3:]) for x in layer.inputs]
        shown[layer.node.name] = torch.cat([y.movedim(1, 0).flatten(1) for y in lost], 1).mean(1)
        assert layer.bias is not None
        biases[layer.node.name] = layer.bias
    assert corrected(program, context, ANALYTIC)
    first, *rest = [n for n in program.graph.nodes if n.name in shown]
    assert len(rest) == 3
    for node in rest:
        after = getattr(program.graph_module, node.args[2].target).double()
        shift = after - biases[node.name].double()
        error = (shift - shown[node.name]).norm() / shown[node.name].norm()
        assert error < 0.35, (node.name, error)
    ((node, reason),) = [(name, why) for rule, name, why in program.ledger.declined if rule == "correct_bias_analytic"]
    assert (node, "no batch norm made it" in reason) == (first.name, True)
    assert not corrected(program, context, ANALYTIC)


def test_a_batch_norm_leaves_its_moments_with_the_layer() -> None:
    model = trained_like()
    program, _ = quantized(model, [randn(4, 3, 16, 16)])
    made = [node.meta[MOMENTS] for node in program.graph.nodes if MOMENTS in node.meta]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for moments, norm in zip(made, norms, strict=True):
        assert torch.equal(moments.mean.float(), norm.bias)
        assert torch.equal(moments.deviation.float(), norm.weight.abs())


@pytest.mark.parametrize("step", [EMPIRICAL, ANALYTIC])
def test_a_corrected_model_is_exact(step: Pass) -> None:
    pipeline = default_pipeline().after("quantize", step)
    compiled = qcompile.compile(network(), calibration=images(16), pipeline=pipeline)
    for image in randn(4, 3, 10, 10, seed=5).split(1):
        assert torch.equal(compiled(image), compiled.reference(image))


def test_few_bits_become_better() -> None:
    """On data that calibration did not see."""
    model, x = trained_like(), randn(64, 3, 16, 16, seed=9)
    data = [randn(1, 3, 16, 16, seed=i) for i in range(20, 52)]
    want, config = model(x).detach(), QuantConfig(weight_bits=4)
    plain = default_pipeline()
    found = [
        sqnr(want, torch.cat([q(one) for one in x.split(1)]))
        for q in (
            qcompile.quantize(model, calibration=data, config=config, pipeline=pipeline)
            for pipeline in (plain, *(plain.after("quantize", step) for step in (ANALYTIC, EMPIRICAL)))
        )
    ]
    assert found[0] < found[1] < found[2]
