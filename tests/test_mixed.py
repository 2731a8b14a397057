"""Mixed precision: the layers that cost accuracy are found and left in float, and what cannot be reached is said."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from passing import randn, two_linears
from torch import Tensor, nn

import qcompile
from qcompile.choices import Choice
from qcompile.compiler import compile_program
from qcompile.config import QuantConfig
from qcompile.errors import AccuracyWarning, CalibrationError, ConfigError, QcompileError
from qcompile.ir import Program, Property
from qcompile.metrics import Predict
from qcompile.passes import Context, Pass, default_pipeline
from qcompile.passes.fuse_float import FuseFloat
from qcompile.quantizer import prepared
from qcompile.simulation import Simulation
from qcompile.stages import REASON, Stages
from qcompile.targets import get
from qcompile.targets.capability import objection

CALIBRATION = [randn(4, 3, 12, 12, seed=s) for s in range(5)]
HELD_OUT = [randn(4, 3, 12, 12, seed=s) for s in range(10, 14)]


@cache
def spoilt() -> nn.Module:
    """A network in which one channel between "4" and "6" is 300 times as large as the others."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(8, 24, 3), nn.ReLU()),
        *(nn.Conv2d(24, 8, 1), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 25, 10)),
    ).eval()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=g)
                nn.init.normal_(layer.bias, 0.0, 0.1, generator=g)  # type: ignore[arg-type]
        before, behind = (model.get_submodule(name) for name in ("4", "6"))
        for parameter in before.parameters():
            parameter[0] *= 300
        next(behind.parameters())[:, 0] /= 300
    return model


def error(model: nn.Module) -> Callable[[Predict], float]:
    """A metric: less the relative error on data that calibration does not see."""
    with torch.no_grad():
        wanted = torch.cat([model(x) for x in HELD_OUT])

    def metric(predict: Predict) -> float:
        return -float((torch.cat([predict(x) for x in HELD_OUT]) - wanted).norm() / wanted.norm())

    return metric


def search(model: nn.Module | None = None, **options: Any) -> qcompile.CompiledModel:
    model = model or spoilt()
    if "metric" not in options:
        options["metric"] = error(model)
    options = {"calibration": CALIBRATION, "max_accuracy_drop": 0.06, "threads": 1, **options}
    return qcompile.compile(model, **options)


@cache
def found() -> qcompile.CompiledModel:
    return search()


def stages(model: nn.Module, config: QuantConfig | None = None) -> Stages:
    return Stages(*prepared(model, None, CALIBRATION, None, config, None, objection(get("native")), None))


def gaining(compiled: qcompile.CompiledModel) -> dict[str, Choice]:
    """Layer -> its choice; without those that are there only because conversions around them would take longer."""
    assert compiled.choices is not None
    return {row.layer: row for row in compiled.choices.rows if row.gain > 0.06}


def test_the_layers_around_a_bad_activation_are_found() -> None:
    compiled = found()
    choices = compiled.choices
    assert choices is not None
    assert set(gaining(compiled)) == {"4", "6"}
    assert choices.met
    assert choices.drop <= 0.06 < choices.float_metric - choices.int8_metric
    assert choices.metric == error(spoilt())(compiled)
    assert all(row.cost_ms > 0 and row.noise > 0.5 for row in gaining(compiled).values())
    assert choices.ms is not None
    assert all(text in str(choices) for text in ("float32", "metric", "cost ms", "int8"))


def test_the_ledger_says_which_layers_were_left_and_why(tmp_path: Path) -> None:
    found().save(tmp_path / "mixed.qcm")
    rows = qcompile.load(tmp_path / "mixed.qcm").coverage
    gained = {name for row in gaining(found()).values() for name in row.operators}
    assert gained <= {row.node for row in rows if row.kind == "float" and row.reason == REASON}
    assert all(row.kernel.startswith(("conv", "gemm")) for row in rows if row.node in gained)
    assert found().choices is not None
    left = found().choices.operators  # type: ignore[union-attr]
    assert {row.node for row in rows if row.reason == REASON} <= left


def test_what_is_good_enough_in_int8_stays_int8() -> None:
    compiled = search(max_accuracy_drop=10.0)
    assert compiled.choices is not None
    assert compiled.choices.rows == ()
    assert compiled.choices.met
    assert {row.kind for row in compiled.coverage} <= {"integer", "shape"}


def test_without_a_metric_it_is_the_agreement_with_the_float_model() -> None:
    compiled = search(metric=None, evaluation=iter(HELD_OUT), max_accuracy_drop=0.01)
    assert compiled.choices is not None
    assert compiled.choices.float_metric == 1.0
    assert compiled.choices.metric >= 0.99 > compiled.choices.int8_metric
    assert {"4", "6"} <= {row.layer for row in compiled.choices.rows}


def test_another_machine_s_costs_are_estimated() -> None:
    compiled = search(target="arm64-dotprod", max_accuracy_drop=0.1)
    assert compiled.choices is not None
    assert set(gaining(compiled)) == {"4", "6"}
    assert compiled.choices.ms is None
    assert compiled.choices.metric == error(spoilt())(compiled.reference)


def test_layers_may_be_left_in_bfloat16() -> None:
    compiled = search(pipeline=default_pipeline().replace("fuse_float", FuseFloat("bfloat16")))
    assert compiled.choices is not None
    assert compiled.choices.met
    assert {name: row.numerics for name, row in gaining(compiled).items()} == {"4": "bfloat16", "6": "bfloat16"}
    rounded = {name for row in compiled.choices.rows if row.numerics == "bfloat16" for name in row.operators}
    assert {row.node for row in compiled.coverage if row.kind == "bfloat16"} == rounded


def test_a_batch_may_be_dynamic_and_of_another_size() -> None:
    batch = {0: torch.export.Dim("batch", max=16)}
    held_out = [x[:3] for x in HELD_OUT]
    compiled = search(dynamic_shapes=(batch,), metric=None, evaluation=held_out, max_accuracy_drop=0.1)
    assert compiled.choices is not None
    assert {"4", "6"} <= {row.layer for row in compiled.choices.rows}
    assert compiled(randn(7, 3, 12, 12, seed=9)).shape == (7, 10)


class TwoAnswers(nn.Module):
    """A model that takes two tensors by name and answers with a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.body = spoilt()

    def forward(self, image: Tensor, shift: Tensor) -> dict[str, Tensor]:
        return {"logits": self.body(image) + shift, "shift": shift}


def test_a_model_may_take_and_give_more_than_one_tensor() -> None:
    inputs = [{"image": x, "shift": randn(4, 10, seed=i)} for i, x in enumerate(HELD_OUT)]
    model = TwoAnswers().eval()
    with torch.no_grad():
        wanted = torch.cat([model(**x)["logits"] for x in inputs])

    def metric(predict: Predict) -> float:
        return -float((torch.cat([predict(**x)["logits"] for x in inputs]) - wanted).norm() / wanted.norm())

    compiled = search(model, calibration=inputs, example_inputs=inputs[0], metric=metric)
    assert compiled.choices is not None
    assert compiled.choices.met
    assert {"body.4", "body.6"} <= {row.layer for row in compiled.choices.rows}


def test_long_work_is_reported() -> None:
    steps: list[str] = []
    search(progress=lambda step, done, total: steps.append(step))
    assert {"calibrate", "noise of each layer", "time of each layer", "layers that are needed"} <= set(steps)


@dataclass(frozen=True)
class Spoil(Pass):
    """Ruins the weights of the model: nothing that is left in float helps against that."""

    name: ClassVar[str] = "spoil"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.FLOAT})

    def run(self, program: Program, context: Context) -> bool:
        for name, buffer in program.graph_module.named_buffers():
            if buffer.dim() == 2 and buffer.is_floating_point() and "weight" in name:
                buffer *= -1
        return True


def test_a_target_that_cannot_be_met_is_said_with_the_best_that_was_found() -> None:
    pipeline = default_pipeline().after("canonicalize", Spoil())
    with pytest.warns(AccuracyWarning, match="drops by .*, not by at most 0.06"):
        compiled = search(pipeline=pipeline)
    assert compiled.choices is not None
    assert not compiled.choices.met
    assert compiled.choices.metric == error(spoilt())(compiled)
    assert "was not reached" in str(compiled.choices)


# --- bad input --------------------------------------------------------------------------------------


def _raises(predict: Predict) -> float:
    raise KeyError("labels")


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "negative drop": ({"max_accuracy_drop": -0.1}, "max_accuracy_drop is -0.1"),
    "drop NaN": ({"max_accuracy_drop": math.nan}, "max_accuracy_drop is nan"),
    "drop text": ({"max_accuracy_drop": "1%"}, "max_accuracy_drop is '1%'"),
    "metric NaN": ({"metric": lambda predict: math.nan}, "returned nan"),
    "metric None": ({"metric": lambda predict: None}, "returned None"),
    "metric text": ({"metric": lambda predict: "0.9"}, "returned '0.9'"),
    "metric tensor": ({"metric": lambda predict: torch.ones(3)}, "returned tensor"),
    "metric raises": ({"metric": _raises}, "raised KeyError: 'labels'"),
    "metric idle": ({"metric": lambda predict: 0.5}, "did not call predict"),
    "metric no function": ({"metric": "accuracy"}, "the metric is 'accuracy'"),
    "no data": ({"metric": None}, "no held-out data"),
    "empty data": ({"metric": None, "evaluation": []}, "held-out data are empty"),
    "both": ({"evaluation": HELD_OUT}, "both a metric and evaluation data"),
    "no drop": ({"max_accuracy_drop": None}, "not how much accuracy may drop"),
    "strict": ({"strict": True}, "no layer to choose"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_mistake_is_refused(name: str) -> None:
    options, message = SETTINGS[name]
    with pytest.raises(ConfigError) as caught:
        search(**options)
    assert message in caught.value.what
    assert caught.value.where
    assert caught.value.remedy


def test_a_missing_solver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ConfigError, match="needs scipy") as caught:
        search()
    assert caught.value.remedy == "pip install 'qcompile[mixed]'"


def test_a_metric_that_fails_of_a_quantized_model_only_says_so() -> None:
    calls = 0

    def metric(predict: Predict) -> float:
        nonlocal calls
        calls += 1
        predict(HELD_OUT[0])
        return 1.0 if calls == 1 else math.nan

    with pytest.raises(ConfigError) as caught:
        search(metric=metric)
    assert caught.value.where == "metric, of the compiled model with 0 layers in float"


def test_held_out_data_of_another_shape_are_refused() -> None:
    with pytest.raises(CalibrationError) as caught:
        search(metric=None, evaluation=[randn(4, 3, 9, 9)])
    assert caught.value.where == "evaluation batch 0"


def test_a_model_that_is_no_classifier_needs_a_metric() -> None:
    with pytest.raises(ConfigError, match="no classifier"):
        search(nn.Sequential(nn.Conv2d(3, 1, 3)).eval(), metric=None, evaluation=HELD_OUT)


def test_a_wrong_call_in_a_metric_keeps_its_own_error() -> None:
    with pytest.raises(QcompileError, match="the model takes 1 tensors"):
        search(metric=lambda predict: predict())


# --- what the search rests on -----------------------------------------------------------------------


@pytest.mark.parametrize("preset", [None, "balanced"])
def test_a_stage_without_choices_is_what_quantize_gives(preset: str | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = QuantConfig(preset=preset)
        made = stages(spoilt(), config).integer(frozenset())
        quantized = qcompile.quantize(
            spoilt(), calibration=CALIBRATION, config=config, objection=objection(get("native"))
        )
    assert [r.name for r in made.passes] == [r.name for r in quantized.passes]
    assert made.coverage == quantized.coverage
    assert all(torch.equal(made(x), quantized(x)) for x in HELD_OUT)


def test_the_simulation_is_close_to_the_integer_program_for_any_choice() -> None:
    made = stages(spoilt())
    simulation = Simulation(made)
    names = sorted(simulation.groups)
    generator = torch.Generator().manual_seed(0)
    picks = [
        frozenset(),
        frozenset(names),
        *(frozenset(n for n in names if torch.rand(1, generator=generator) < 0.5) for _ in range(6)),
    ]
    for left in picks:
        operators = frozenset(m.name for name in left for m in simulation.groups[name].members)
        integer = made.integer(operators)
        (want,), (got,) = integer.program(HELD_OUT[0]), simulation.run(left, [HELD_OUT[0]])
        assert (got - want).norm() <= 0.02 * want.norm()
        assert {r.node for r in integer.coverage if r.kind in ("float", "shape")} >= operators


def test_the_noise_of_a_rounding_is_what_it_alone_changes() -> None:
    simulation = Simulation(stages(spoilt()))
    clean = simulation.clean([HELD_OUT[0]])
    noise = {r: simulation.noise(r, clean) for r in simulation.roundings()}
    worst = max(noise, key=lambda r: noise[r])
    assert not worst.weights
    assert worst.node.target is torch.ops.aten.relu.default
    assert worst.node.all_input_nodes[0] is simulation.groups["conv2d_2"].root
    assert sum(r.weights for r in noise) == 5


@pytest.mark.slow
def test_as_many_random_layers_miss_the_target() -> None:
    """`benchmarks/mixed.py` compares their latency."""
    made, metric = stages(spoilt()), error(spoilt())
    groups = Simulation(made).groups
    assert found().choices is not None
    wanted = {name for row in gaining(found()).values() for name in row.operators}
    chosen = {name for name, group in groups.items() if group.root.name in wanted}
    generator = torch.Generator().manual_seed(4)
    for _ in range(4):
        order = torch.randperm(len(groups), generator=generator)[: len(chosen)]
        left = {sorted(groups)[int(i)] for i in order}
        operators = frozenset(m.name for name in left for m in groups[name].members)
        model = compile_program(made.integer(operators), get("native"), threads=1)
        assert -metric(model) > 0.06 or left >= chosen


def test_tensors_are_left_as_they_were() -> None:
    before = [p.clone() for p in spoilt().parameters()]
    found()
    after: list[Tensor] = list(spoilt().parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_where_there_is_nothing_to_choose_the_target_is_said_to_be_missed() -> None:
    model, data = two_linears(), [randn(4, 16, seed=i) for i in range(5)]

    def metric(predict: Predict) -> float:
        return -float((predict(data[0]) - model(data[0])).abs().mean())

    with pytest.warns(AccuracyWarning):
        found = qcompile.compile(
            model,
            calibration=data,
            config=QuantConfig(activations="dynamic"),
            max_accuracy_drop=0.0,
            metric=metric,
        )
    assert found.choices is not None
    assert not found.choices.met
    assert not found.choices.rows
