"""smooth: outliers of a few channels go into the weights that read them; the values stay, and the bits are exact."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from passing import randn, randomize, refusal, run_until, same_values, sqnr
from torch import Tensor, nn

import qcompile
from qcompile.errors import CalibrationError, ConfigError
from qcompile.ir import Program
from qcompile.passes import Context, default_pipeline
from qcompile.passes.smooth import Smooth

PIPELINE = default_pipeline().after("fold_batchnorm", Smooth())
WIDTH, OUTLIERS = 16, [3, 10]


class Block(nn.Module):
    """A transformer block; two channels of its layer norms are far stronger than the others."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.out(nn.functional.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))
        return x + self.down(torch.relu(self.up(self.last(x))))


def block() -> nn.Module:
    model = Block()
    randomize(model)
    for norm in (model.norm, model.last):
        norm.weight.data[:] = 0.5 + torch.rand(WIDTH, generator=torch.Generator().manual_seed(1))
        norm.weight.data[OUTLIERS] *= 50
    for layer in (model.q, model.k, model.v, model.up):
        layer.weight.data[:, OUTLIERS] /= 30
    return model


def data(count: int = 32, seed: int = 0) -> list[Tensor]:
    return [randn(1, 6, WIDTH, seed=seed + i) for i in range(count)]


def smoothed(model: nn.Module, batches: list[Tensor], **options: float) -> tuple[Program, Context]:
    program = run_until("fold_batchnorm", model, (batches[0],))
    context = Context(calibration=iter([(batch,) for batch in batches]))
    assert Smooth(**options).run(program, context)  # type: ignore[arg-type]
    return program, context


def read_by(program: Program, name: str, x: Tensor) -> Tensor:
    """What the node called `name` reads."""
    seen: list[Tensor] = []

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Tensor:
            if n.name == name:
                seen.append(self.env[n.args[0]])  # type: ignore[index]
            return super().run_node(n)

    Recorder(program.graph_module).run(x)
    return seen[0]


MODELS = {
    "layer norm, linear": (lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 5)), (3, 8)),
    "over a sequence": (lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 5)), (2, 4, 8)),
    "rms norm": (lambda: nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 5)), (2, 4, 8)),
    "no bias": (lambda: nn.Sequential(nn.LayerNorm(8, bias=False), nn.Linear(8, 5, bias=False)), (3, 8)),
    "group norm, convolution": (
        lambda: nn.Sequential(nn.GroupNorm(2, 8), nn.LeakyReLU(), nn.Conv2d(8, 4, 3)),
        (1, 8, 6, 6),
    ),
    "linear, relu, linear": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)), (3, 6)),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8)), (1, 3, 7, 7)),
}


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_factors_are_the_papers_and_the_values_stay(case: str, alpha: float) -> None:
    build, shape = MODELS[case]
    model = randomize(build())
    batches = [randn(*shape, seed=i) for i in range(5)]
    plain = run_until("fold_batchnorm", model, (batches[0],))
    program, context = smoothed(model, batches, alpha=alpha)
    last = next(n for n in reversed(program.graph.nodes) if n.op == "call_function")
    linear = "linear" in str(last.target)

    def largest(made: Program) -> Tensor:
        read = torch.stack([read_by(made, last.name, x).movedim(-1 if linear else 1, 0).flatten(1) for x in batches])
        return read.abs().amax((0, 2)).detach()

    weight = model[-1].weight.detach()  # type: ignore[index]
    per_input = weight.abs().flatten(2).amax(2) if weight.dim() > 2 else weight.abs()
    columns = per_input[:, 0] if getattr(model[-1], "groups", 1) > 1 else per_input.amax(0)  # type: ignore[index]
    before = largest(plain)
    factors = before**alpha / columns ** (1 - alpha)
    torch.testing.assert_close(largest(program), before / factors, rtol=1e-4, atol=1e-6)
    assert same_values(program, model, (randn(*shape, seed=9),))
    assert not Smooth(alpha=alpha).run(program, Context(calibration=batches))
    assert len(context.maxima) == 1


def test_outliers_behind_a_layer_norm_are_won_back() -> None:
    model, x = block(), torch.cat(data(16, seed=100))
    want = model(x).detach()
    plain, better = (qcompile.quantize(model, calibration=data(), pipeline=p) for p in (default_pipeline(), PIPELINE))
    before, after = (sqnr(want, torch.cat([q(one) for one in x.split(1)])) for q in (plain, better))
    assert after > before + 6


def test_a_smoothed_model_is_exact_and_a_generator_is_read_once() -> None:
    taken = []

    def batches() -> Iterator[Tensor]:
        for batch in data():
            taken.append(1)
            yield batch

    compiled = qcompile.compile(block(), calibration=batches(), pipeline=PIPELINE)
    assert len(taken) == 32
    assert "smooth" in [step.name for step in compiled.artifact.passes]
    for x in data(4, seed=200):
        assert torch.equal(compiled(x), compiled.reference(x))


def test_its_layers_can_be_compared_with_those_of_the_float_model() -> None:
    """The graph is made again with what was measured, so that smoothed channels meet smoothed ones."""
    model = block()
    quantized = qcompile.quantize(model, calibration=data(), pipeline=PIPELINE)
    found = qcompile.diagnose(quantized, model, data(8, seed=50))
    assert min(row.accumulated for row in found.rows) > 15


def test_only_the_first_samples_are_measured() -> None:
    model = randomize(MODELS["layer norm, linear"][0]())
    batches = [randn(3, 8, seed=i) for i in range(6)]
    _, some = smoothed(model, batches, samples=7)
    _, three = smoothed(model, batches[:3])
    _, every = smoothed(model, batches)
    assert torch.equal(some.maxima["layer_norm"], three.maxima["layer_norm"])
    assert not torch.equal(some.maxima["layer_norm"], every.maxima["layer_norm"])


def test_a_silent_channel_counts_as_the_weakest() -> None:
    norm, linear = nn.LayerNorm(8), nn.Linear(8, 5)
    model = randomize(nn.Sequential(norm, linear))
    norm.weight.data[2] = norm.bias.data[2] = 0
    linear.weight.data[:, 5] = 0
    program, _ = smoothed(model, [randn(3, 8, seed=i) for i in range(4)])
    assert same_values(program, model, (randn(3, 8, seed=9),))
    for node in program.graph.nodes:
        if node.op == "get_attr":
            assert torch.isfinite(getattr(program.graph_module, node.target)).all()


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return y + self.linear(y)


DECLINES = {
    "a residual reads it": (PostNorm(), "aten.add.Tensor"),
    "no weights": (nn.Sequential(nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 4)), "no weights of its own"),
    "gelu": (nn.Sequential(nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4)), "aten.gelu"),
    "two dimensions": (nn.Sequential(nn.LayerNorm((3, 8)), nn.Linear(8, 4)), "more than one dimension"),
}


@pytest.mark.parametrize("case", DECLINES)
def test_declines_with_a_reason(case: str) -> None:
    model, reason = DECLINES[case]
    program = run_until("fold_batchnorm", randomize(model), (randn(2, 3, 8),))
    assert not Smooth().run(program, Context())
    assert any(rule == "smooth" and reason in why for rule, _, why in program.ledger.declined)


def test_mistakes_are_errors() -> None:
    for options in ({"alpha": 1.5}, {"samples": 0}):
        with pytest.raises(ConfigError):
            Smooth(**options)
    model = randomize(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)))
    with pytest.raises(CalibrationError, match="no calibration data"):
        Smooth().run(run_until("fold_batchnorm", model, (randn(2, 4),)), Context())
    error = refusal(model, [randn(2, 4), torch.full((2, 4), torch.nan)], pipeline=PIPELINE)
    assert "calibration batch 1" in str(error)
