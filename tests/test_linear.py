"""Models whose linear layers have integer weights and activations that nobody calibrated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile import QuantConfig
from qcompile.errors import CalibrationError, ConfigError, StrictError

KINDS: dict[str, dict[str, Any]] = {
    "dynamic": {"activations": "dynamic"},
    "int8 weights": {"activations": "float"},
    "int4 weights": {"activations": "float", "weight_bits": 4, "group_size": 32},
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return make().eval()


def mlp() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(50, 70), nn.ReLU(), nn.Linear(70, 33, bias=False)))


def kinds(model: Any) -> dict[str, str]:
    """Module path -> kind, of the linear layers."""
    return {row.where: row.kind for row in model.coverage if "linear" in row.op}


def noise(model: nn.Module, compiled: Any, x: Tensor) -> float:
    """The error's norm as a part of the output's."""
    with torch.no_grad():
        return float((compiled(x) - model(x)).norm() / model(x).norm())


@pytest.mark.parametrize("kind", KINDS)
def test_an_mlp_compiles_without_calibration_and_gives_the_reference_s_bits(kind: str) -> None:
    model, x = mlp(), randn(5, 50)
    # The one float operator is a relu, which is exact.
    compiled = qcompile.compile(model, config=QuantConfig(**KINDS[kind]), example_inputs=x)
    assert torch.equal(compiled(x), compiled.reference(x))
    assert 1e-4 < noise(model, compiled, x) < (0.15 if "4" in kind else 0.02)
    wanted = "integer" if kind == "dynamic" else "weight-only"
    assert kinds(compiled) == {"0": wanted, "2": wanted}


def test_a_single_layer_is_exact_and_strict() -> None:
    for options in KINDS.values():
        layer, x = seeded(lambda: nn.Linear(40, 24)), randn(2, 3, 40)
        compiled = qcompile.compile(layer, config=QuantConfig(**options), example_inputs=x, strict=True)
        assert compiled.artifact.tolerance == 0.0
        assert torch.equal(compiled(x), compiled.reference(x))
        assert compiled.selftest().passed


def test_the_ledger_says_what_the_weights_are() -> None:
    quantized = qcompile.quantize(mlp(), config=QuantConfig(**KINDS["int4 weights"]), example_inputs=randn(5, 50))
    first, relu, _ = quantized.coverage
    assert (first.kernel, first.reason) == (
        "linear_weight_only",
        "4-bit weights in groups of 32, float arithmetic",
    )
    assert relu.kind == "float"
    assert "only linear layers" in relu.reason
    with pytest.raises(StrictError, match="relu"):
        qcompile.compile(mlp(), config=QuantConfig(activations="dynamic"), example_inputs=randn(5, 50), strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_and_sequence_may_be_dynamic(kind: str) -> None:
    model = mlp()
    sizes = {0: torch.export.Dim("batch", max=4), 1: torch.export.Dim("sequence", max=32)}
    compiled = qcompile.compile(
        model, config=QuantConfig(**KINDS[kind]), example_inputs=randn(2, 7, 50), dynamic_shapes=(sizes,)
    )
    for shape in ((1, 1, 50), (3, 13, 50), (4, 32, 50)):
        x = randn(*shape, seed=shape[1])
        assert torch.equal(compiled(x), compiled.reference(x))


class Matmul(nn.Module):
    """The ways to write a linear layer, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(randn(20, 30)), nn.Parameter(randn(30, 20, seed=1))
        self.bias = nn.Parameter(randn(20, seed=2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x @ self.first, self.second)


def test_products_with_a_constant_are_linear_layers() -> None:
    x = randn(3, 20)
    compiled = qcompile.compile(Matmul().eval(), config=QuantConfig(**KINDS["dynamic"]), example_inputs=x, strict=True)
    assert [row.kernel.split("_")[:2] for row in compiled.coverage] == [["linear", "dynamic"]] * 2
    assert torch.equal(compiled(x), compiled.reference(x))


def test_static_convolutions_and_other_heads_work_together() -> None:
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 24), nn.Linear(24, 16), nn.Linear(16, 9)
        )
    )
    overrides: dict[Any, Any] = {"3": KINDS["dynamic"], "4": KINDS["int4 weights"]}
    images = [randn(4, 3, 8, 8, seed=i) for i in range(4)]
    compiled = qcompile.compile(model, calibration=images, config=QuantConfig(overrides=overrides), strict=True)
    assert kinds(compiled) == {"3": "integer", "4": "weight-only", "5": "integer"}
    assert Counter(row.kernel.split("_")[0] for row in compiled.coverage if "conv" in row.op) == {"conv3x3": 1}
    assert torch.equal(compiled(images[0]), compiled.reference(images[0]))
    assert noise(model, compiled, images[0]) < 0.15


@pytest.mark.parametrize("kind", ["dynamic", "int4 weights"])
def test_a_transformer_block_keeps_its_float_parts(kind: str) -> None:
    block = seeded(lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu"))
    x = randn(2, 9, 32)
    compiled = qcompile.compile(block, config=QuantConfig(**KINDS[kind]), example_inputs=x)
    found = Counter(row.kind for row in compiled.coverage)
    assert found["integer" if kind == "dynamic" else "weight-only"] == 4  # q, k and v in one, out, and two of the MLP
    assert all(row.reason for row in compiled.coverage if row.kind == "float")
    difference = (compiled(x) - compiled.reference(x)).abs().max()
    assert difference < 1e-5 * compiled.reference(x).abs().max()
    assert noise(block, compiled, x) < (0.1 if "4" in kind else 0.02)


def test_a_saved_model_runs_and_int4_is_half_of_int8(tmp_path: Path) -> None:
    layer, x = seeded(lambda: nn.Linear(512, 256)), randn(1, 512)
    sizes = {}
    for kind in ("int8 weights", "int4 weights"):
        options = KINDS[kind] | ({"group_size": 512} if "4" in kind else {})
        compiled = qcompile.compile(layer, config=QuantConfig(**options), example_inputs=x)
        compiled.save(tmp_path / "model.qcm")
        assert torch.equal(qcompile.load(tmp_path / "model.qcm")(x), compiled.reference(x))
        sizes[kind] = sum(array.nbytes for array in compiled.artifact.variants[0].constants.values())
    assert sizes["int8 weights"] - sizes["int4 weights"] == pytest.approx(512 * 256 / 2, abs=256)


def test_rows_are_independent_and_a_bad_one_spoils_itself_alone() -> None:
    layer, x = seeded(lambda: nn.Linear(50, 33)), randn(4, 50)
    compiled = qcompile.compile(layer, config=QuantConfig(activations="dynamic"), example_inputs=x)
    clean = compiled(x)
    spoiled = x.clone()
    spoiled[2, 7] = torch.inf
    y = compiled(spoiled)
    assert torch.isnan(y[2]).all()
    assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])
    assert not torch.equal(compiled(x * 1000)[0], clean[0])


def test_4_bits_in_groups_keep_the_accuracy_of_digits() -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    model = seeded(lambda: nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10)))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(4))
    known, held_out = order[:1200], order[1200:]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[known]), y[known]).backward()
        optimizer.step()

    def right(answer: Tensor) -> float:
        return float((answer.argmax(1) == y[held_out]).float().mean())

    answers = model(x[held_out])
    assert right(answers) > 0.94
    for bits, loss in ((4, 0.01), (2, 0.2)):
        config = QuantConfig(activations="float", weight_bits=bits, group_size=32)
        quantized = qcompile.quantize(model, config=config, example_inputs=x[held_out])(x[held_out])
        assert right(quantized) > right(answers) - loss
        changed = float((quantized.argmax(1) != answers.argmax(1)).float().mean())
        assert changed < loss * 2
    assert changed > 0  # two bits are not enough to change nothing


def test_groups_help_where_a_few_columns_are_large() -> None:
    layer, x = seeded(lambda: nn.Linear(256, 32)), randn(16, 256)
    with torch.no_grad():
        layer.weight[:, ::97] *= 20  # type: ignore[operator,index]
    found = []
    for group_size in (256, 32):
        config = QuantConfig(activations="float", weight_bits=4, group_size=group_size)
        found.append(noise(layer, qcompile.quantize(layer, config=config, example_inputs=x), x))
    assert found[1] < 0.8 * found[0]


def test_excluded_layers_stay_float() -> None:
    config = QuantConfig(activations="dynamic", exclude=("2",))
    quantized = qcompile.quantize(mlp(), config=config, example_inputs=randn(5, 50))
    assert kinds(quantized) == {"0": "integer", "2": "float"}
    assert "excluded" in quantized.coverage[-1].reason


def test_what_is_asked_of_a_convolution_is_refused_in_the_ledger() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)))
    config = QuantConfig(overrides={"1": {"activations": "float"}})
    quantized = qcompile.quantize(model, config=config, calibration=[randn(16, 3, 8, 8)])
    assert [row.kind for row in quantized.coverage] == ["integer", "float"]
    assert "only linear layers" in quantized.coverage[1].reason


def test_a_layer_that_is_left_static_needs_calibration() -> None:
    config = QuantConfig(activations="dynamic", overrides={"0": {"activations": "static"}})
    with pytest.raises(CalibrationError, match="no calibration data"):
        qcompile.quantize(mlp(), config=config, example_inputs=randn(5, 50))
    with pytest.raises(CalibrationError, match="no calibration data"):
        qcompile.quantize(mlp(), config=QuantConfig(activations="dynamic"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"activations": "dynamics"}, "did you mean dynamic"),
        ({"activations": "float", "group_size": 12}, "multiple of 8"),
        ({"activations": "float", "group_size": 32.0}, "multiple of 8"),
        ({"group_size": 32}, "add activations='float'"),
        ({"activations": "dynamic", "group_size": 32}, "add activations='float'"),
        ({"overrides": {"0": {"group_size": 32}}}, "add 'activations': 'float'"),
    ],
)
def test_settings_that_contradict_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        QuantConfig(**options)


def test_a_layer_may_leave_the_groups_of_all_others() -> None:
    config = QuantConfig(activations="float", group_size=16, overrides={"2": {"activations": "dynamic"}})
    quantized = qcompile.quantize(mlp(), config=config, example_inputs=randn(5, 50))
    assert kinds(quantized) == {"0": "weight-only", "2": "integer"}
