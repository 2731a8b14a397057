"""numerics=, which is for a whole float model: what it contradicts is refused."""

from __future__ import annotations

import pt2e
import pytest
from passing import randn, two_linears
from torch import nn

import qcompile
from qcompile.errors import ConfigError
from qcompile.passes import default_pipeline, float_pipeline


@pytest.mark.parametrize("numerics", ["bfloat16", "float32"])
def test_a_pipeline_of_other_numerics_is_refused(numerics: str) -> None:
    data = [randn(4, 16, seed=i) for i in range(5)]
    other = {"bfloat16": "float32", "float32": "bfloat16"}[numerics]
    for pipeline in (default_pipeline(), float_pipeline(other)):
        with pytest.raises(ConfigError, match="the pipeline is not one for numerics"):
            qcompile.compile(two_linears(), calibration=data, numerics=numerics, pipeline=pipeline)


def test_a_trained_model_stays_as_it_was_trained() -> None:
    data = [randn(4, 16, seed=i) for i in range(5)]
    model = qcompile.prepare_qat(two_linears(), calibration=data)
    with pytest.raises(ConfigError, match="trained as int8"):
        qcompile.compile(model, numerics="bfloat16")
    with pytest.raises(ConfigError, match="trained as int8"):
        qcompile.compile(model, max_accuracy_drop=0.1, evaluation=data)
    with pytest.raises(ConfigError, match="the config is a str"):
        qcompile.prepare_qat(two_linears(), calibration=data, config="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize("nested", [False, True])
def test_a_model_that_was_quantized_elsewhere_stays_as_it_was(nested: bool) -> None:
    data = [randn(4, 16, seed=i) for i in range(5)]
    model = pt2e.convert(two_linears(), pt2e.Everything(), data)
    given = nn.Sequential(model, nn.ReLU()) if nested else model
    for options in ({"numerics": "float32"}, {"numerics": "bfloat16"}, {"max_accuracy_drop": 0.1, "evaluation": data}):
        with pytest.raises(ConfigError, match="quantized elsewhere") as caught:
            qcompile.compile(given, example_inputs=data[0], **options)
        assert caught.value.where == next(iter(options))
        assert caught.value.remedy == "leave it out, or compile the float model"
    assert qcompile.compile(given, example_inputs=data[0]).coverage


def test_strict_and_float_numerics_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="strict=True refuses operators in float") as caught:
        qcompile.compile(two_linears(), example_inputs=randn(4, 16), numerics="float32", strict=True)
    assert caught.value.where == "strict"
    assert caught.value.remedy == "leave strict or numerics out"
