"""QuantConfig: which observer stands behind which activation, and what is refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from passing import Block, images, network, randn, randomize, run_until
from torch import fx, nn

import qcompile
from qcompile.config import QuantConfig
from qcompile.errors import CalibrationWarning, ConfigError
from qcompile.histograms import Percentile
from qcompile.ir import Program, constant
from qcompile.observers import MinMax, MovingAverage, Observer
from qcompile.searches import Entropy, LearnedStep, LeastSquares

X = (randn(1, 4, 6, 6),)


def observers(config: QuantConfig) -> dict[str, Observer]:
    """Observed tensor -> its observer, for a residual block."""
    program = run_until("insert_observers", randomize(Block()), X, config)
    return {str(n.args[0]): _observer(program, n) for n in program.graph.nodes if n.op == "call_module"}


def _observer(program: Program, node: fx.Node) -> Observer:
    observer = program.graph_module.get_submodule(str(node.target))
    assert isinstance(observer, Observer)
    return observer


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("minmax", MinMax),
        ("moving_average", MovingAverage),
        ("percentile", Percentile),
        ("mse", LeastSquares),
        ("lsq", LearnedStep),
        ("entropy", Entropy),
    ],
)
def test_every_activation_has_the_observer_that_is_asked_for(name: str, kind: type) -> None:
    assert {type(observer) for observer in observers(QuantConfig(name)).values()} == {kind}
    for one in ("minmax", "entropy"):
        alone = observers(QuantConfig(one, overrides={"first": {"observer": name}}))
        assert type(alone["relu"]) is kind


def test_an_override_holds_for_what_a_layer_computes_with_what_it_absorbs() -> None:
    found = observers(QuantConfig(overrides={"first": {"observer": "mse"}, "x": {"observer": "moving_average"}}))
    assert {name: type(observer) for name, observer in found.items()} == {
        "x": MovingAverage,
        "relu": LeastSquares,
        "relu_1": MinMax,
    }


def test_a_layer_is_selected_by_its_type_or_by_a_predicate() -> None:
    by_type = observers(QuantConfig(overrides={nn.Conv2d: {"observer": "mse"}}))
    assert [type(o) for o in by_type.values()] == [MinMax, LeastSquares, LeastSquares]
    third = QuantConfig(overrides={(lambda node: "add" in node.name): {"observer": "mse"}})
    assert [type(o) for o in observers(third).values()] == [MinMax, MinMax, LeastSquares]


def test_of_several_overrides_later_ones_win() -> None:
    overrides: dict[Any, dict[str, Any]] = {
        nn.Conv2d: {"observer": "percentile", "percentile": 90.0},
        "second": {"percentile": 99.0},
    }
    found = observers(QuantConfig("percentile", overrides=overrides))
    assert [o.percentile for o in found.values() if isinstance(o, Percentile)] == [99.99, 90.0, 99.0]


@pytest.mark.parametrize("preset", [None, "best"])
def test_weights_have_as_many_bits_as_their_layer_is_given(preset: str | None) -> None:
    config = QuantConfig(preset=preset, weight_bits=4, overrides={nn.Linear: {"weight_bits": 3}})
    program = qcompile.quantize(network(), calibration=images(20), config=config).program
    largest = {
        str(n.target).split(".")[1]: int(constant(program.graph_module, weight).abs().max())
        for n in program.graph.nodes
        for weight in n.args[1:2]
        if isinstance(weight, fx.Node) and str(weight.target).endswith("_weight")
    }
    assert largest == {"conv2d": 7, "linear": 3}


def test_layers_are_excluded_by_type() -> None:
    result = qcompile.quantize(network(), calibration=images(), config=QuantConfig(exclude=(nn.Linear,)))
    left = [row for row in result.coverage if row.kind == "float" and "linear" in row.op]
    assert left
    assert all("excluded by the configuration" in row.reason for row in left)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"observer": "minimax"}, r"unknown observer(.|\n)*did you mean minmax"),
        ({"preset": "bets"}, r"unknown preset(.|\n)*did you mean best"),
        ({"percentile": 99.0}, r"no activation is observed by 'percentile'(.|\n)*add observer='percentile'"),
        ({"observer": "mse", "averaging": 0.2}, "no activation is observed by 'moving_average'"),
        ({"observer": "entropy", "percentile": 99.0}, "no activation is observed by 'percentile'"),
        ({"observer": "entropi"}, r"unknown observer(.|\n)*did you mean entropy"),
        ({"observer": "percentile", "percentile": 101}, "percentile is 101"),
        ({"overrides": {"a": {"percentile": 99.0}}}, r"is for the observer 'percentile', not for 'minmax'"),
        ({"overrides": {"a": {"bits": 4}}}, r"unknown option 'bits'(.|\n)*observer, percentile, averaging"),
        ({"weight_bits": 9}, r"weight_bits is 9(.|\n)*from 2 to 8"),
        ({"weight_bits": True}, "weight_bits is True"),
        ({"overrides": {"a": {"weight_bits": 1}}}, "weight_bits is 1"),
        ({"overrides": {"a": {}}}, "an override has no options"),
        ({"overrides": {"a": {"observer": "best"}}}, "unknown observer 'best'"),
        ({"overrides": {5: {"observer": "mse"}}}, "overrides is"),
        ({"overrides": ["a"]}, "overrides is"),
        ({"overrides": {"a": "percentile"}}, "overrides is"),
        ({"overrides": {"a": 5}}, "overrides is"),
        ({"preset": ["fast"]}, r"unknown preset \['fast'\]"),
        ({"exclude": "head"}, "exclude is 'head'"),
        ({"exclude": (nn.Linear, 3)}, "exclude is"),
    ],
)
def test_what_contradicts_itself_is_refused_when_it_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantConfig(**options)


def test_patterns_may_come_from_a_generator() -> None:
    assert QuantConfig(exclude=(name for name in ("head", "stem"))).exclude == ("head", "stem")  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"preset": "best"}, {"observer": "mse"}])
def test_how_to_measure_is_refused_where_nothing_is_measured(options: dict[str, Any]) -> None:
    for activations in ("dynamic", "float"):
        with pytest.raises(ConfigError, match="no layer has activations='static'"):
            qcompile.quantize(network(), calibration=images(2), config=QuantConfig(activations=activations, **options))
        mixed = QuantConfig(activations=activations, overrides={nn.Conv2d: {"activations": "static"}}, **options)
        assert qcompile.quantize(network(), calibration=images(2), config=mixed).coverage


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("secnd", r"the overrides pattern 'secnd' matches no module(.|\n)*did you mean second"),
        (nn.GRU, r"the model has no torch.nn.modules.rnn.GRU(.|\n)*it has .*torch.nn.modules.conv.Conv2d"),
        (lambda node: False, r"the predicate .*<lambda>' is true of no operator"),
        (lambda node: node.nothing, r"the predicate .*<lambda>' raised AttributeError(.|\n)*yes or no"),
        (lambda node: torch.ones(2) > 0, r"the predicate .*<lambda>' raised RuntimeError"),
    ],
)
def test_a_selector_that_selects_nothing_says_what_is_there(selector: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        observers(QuantConfig(overrides={selector: {"observer": "mse"}}))


def test_little_calibration_data_is_said_with_its_number() -> None:
    with pytest.warns(CalibrationWarning, match="calibrated on 3 samples"):
        qcompile.quantize(network(), calibration=images(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error", CalibrationWarning)
        qcompile.quantize(network(), calibration=[randn(16, 3, 10, 10)], dynamic_shapes=({0: torch.export.Dim("b")},))
