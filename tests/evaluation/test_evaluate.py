"""evaluate(): quality from the outputs, speed in turns, storage from the files; and every mistake has its error."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import qcompile
from qcompile.errors import CalibrationWarning, CaptureError, ConfigError, InputError, QcompileError
from qcompile.evaluation.timing import file_size, interleave


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(1, 3, 8, 8, generator=g) for _ in range(12)]


@pytest.fixture(scope="module")
def compiled(model: nn.Module, images: list[Tensor]) -> qcompile.CompiledModel:
    return qcompile.compile(model, calibration=images)


@pytest.fixture(scope="module")
def labelled(model: nn.Module, images: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    with torch.no_grad():
        pairs = [(x, model(x).argmax(1)) for x in images]
    pairs[0] = (pairs[0][0], (pairs[0][1] + 1) % 5)  # one label that the float model gets wrong
    return pairs


def refusal(*arguments: Any, **options: Any) -> QcompileError:
    with pytest.raises((InputError, ConfigError)) as caught:
        qcompile.evaluate(*arguments, **{"blocks": 0, **options})
    assert caught.value.remedy
    return caught.value


def test_evaluation_measures_what_it_says(
    compiled: qcompile.CompiledModel, model: nn.Module, images: list[Tensor]
) -> None:
    found = qcompile.evaluate(compiled, model, images, blocks=1)
    with torch.no_grad():
        expected, actual = (torch.cat([f(x) for x in images]) for f in (model, compiled))
    noise = (expected - actual).double().square().sum()
    assert found.samples == 12
    assert found.sqnr == pytest.approx(10 * math.log10(expected.double().square().sum() / noise), abs=1e-3)
    assert found.agreement == float((expected.argmax(1) == actual.argmax(1)).double().mean())
    assert found.int8_bytes == len(compiled.artifact.to_bytes())
    assert found.speedup == pytest.approx(found.float_ms / found.int8_ms)  # type: ignore[operator]
    assert found.compression == found.float_bytes / found.int8_bytes
    assert found.float_accuracy is None
    assert "were not asked for" in found.notes[0]


def test_the_float_size_is_that_of_the_saved_file(model: nn.Module, tmp_path: Any) -> None:
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    size = (tmp_path / "weights.pt").stat().st_size
    assert file_size(model) == pytest.approx(size, abs=200)  # the archive's own name is in the file
    assert size > 4 * sum(p.numel() for p in model.parameters())


def test_labels_give_scores(
    compiled: qcompile.CompiledModel, model: nn.Module, labelled: list[tuple[Tensor, Tensor]]
) -> None:
    found = qcompile.evaluate(compiled, model, labelled, labels=True, blocks=0)
    assert found.float_accuracy == 11 / 12
    assert found.int8_accuracy is not None
    assert found.quality.float_scores is not None
    assert sum(count for *_, count in found.quality.float_scores.confusion) == 12
    assert found.float_ms is found.int8_ms is found.speedup is None
    assert "F1" in str(found)


def test_a_batch_that_is_a_multiple_of_the_static_one_is_taken_apart(
    compiled: qcompile.CompiledModel, model: nn.Module, labelled: list[tuple[Tensor, Tensor]]
) -> None:
    whole = [(torch.cat([x for x, _ in labelled]), torch.cat([y for _, y in labelled]))]
    one_by_one = qcompile.evaluate(compiled, model, labelled, labels=True, blocks=0)
    together = qcompile.evaluate(compiled, model, whole, labels=True, blocks=0)
    assert together.quality == one_by_one.quality
    assert together.samples == 12


def test_metrics_are_averaged_over_samples(
    compiled: qcompile.CompiledModel, model: nn.Module, labelled: list[tuple[Tensor, Tensor]]
) -> None:
    def loss(outputs: Tensor, labels: Tensor | None) -> float:
        assert labels is not None
        return float(nn.functional.cross_entropy(outputs, labels))

    found = qcompile.evaluate(compiled, model, labelled, labels=True, metric=loss, blocks=0)
    with torch.no_grad():
        expected = sum(loss(model(x), y) for x, y in labelled) / 12
    assert found.quality.metrics["loss"][0] == pytest.approx(expected)
    assert "loss" in str(found)


def test_a_metric_that_returns_nan_or_raises_is_named(
    compiled: qcompile.CompiledModel, model: nn.Module, images: list[Tensor]
) -> None:
    calls = iter([1.0, 1.0, 1.0, math.nan])
    error = refusal(compiled, model, images, metric={"psnr": lambda outputs, labels: next(calls)})
    assert "'psnr' is nan" in str(error)
    assert "batch 1, the int8 model" in str(error)
    error = refusal(compiled, model, images, metric={"psnr": lambda outputs: 1.0})
    assert "'psnr' raised TypeError" in str(error)
    assert "metric is 3" in str(refusal(compiled, model, images, metric=3))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([5]), "go from 5 to 5, and the output 'output' has 5 classes"),
        (torch.tensor([-1]), "go from -1 to -1"),
        (torch.tensor([1, 2]), r"labels have shape \(2,\), not \(1,\)"),
        (torch.eye(5)[:1], "labels.argmax"),
        (torch.tensor([1.0]), "labels are torch.float32"),
        (3, "labels are a int"),
    ],
)
def test_wrong_labels_are_named(
    compiled: qcompile.CompiledModel, model: nn.Module, images: list[Tensor], labels: Any, message: str
) -> None:
    good = (images[0], torch.tensor([0]))
    with pytest.raises(InputError, match=message) as caught:
        qcompile.evaluate(compiled, model, [good, (images[1], labels)], labels=True, blocks=0)
    assert "batch 1" in str(caught.value)


def test_labels_must_come_with_the_inputs_and_fit_the_batch(
    compiled: qcompile.CompiledModel, model: nn.Module, images: list[Tensor]
) -> None:
    assert "no pair of inputs and labels" in str(refusal(compiled, model, images, labels=True))
    batch = (torch.cat(images), torch.zeros(5).long())
    assert "labels of shape (5,) for 12 samples" in str(refusal(compiled, model, [batch], labels=True))


def test_labels_that_were_not_asked_for_are_left_out_with_a_warning(
    compiled: qcompile.CompiledModel, model: nn.Module, images: list[Tensor], labelled: list[tuple[Tensor, Tensor]]
) -> None:
    plain = qcompile.evaluate(compiled, model, images, blocks=0)
    with pytest.warns(CalibrationWarning, match=r"more than the model's inputs \(input\)(.|\n)*the last value"):
        assert qcompile.evaluate(compiled, model, labelled, blocks=0).sqnr == plain.sqnr


def test_a_label_is_no_input_of_the_float_model_alone(images: list[Tensor]) -> None:
    class Shifts(nn.Module):
        def forward(self, x: Tensor, by: Tensor | None = None) -> Tensor:
            return torch.relu(x if by is None else x + by)

    pairs = list(zip(images, images[::-1], strict=True))
    compiled = qcompile.compile(Shifts(), calibration=images)
    assert "the compiled model (x), and the float model would take it" in str(refusal(compiled, Shifts(), pairs))


def test_data_that_does_not_fit_is_named(
    compiled: qcompile.CompiledModel, model: nn.Module, images: list[Tensor]
) -> None:
    assert "no data" in str(refusal(compiled, model, []))
    assert "one Tensor" in str(refusal(compiled, model, images[0]))
    error = refusal(compiled, model, [images[0], torch.randn(1, 3, 9, 8)])
    assert "batch 1" in str(error)
    assert "shape (1, 3, 9, 8)" in str(error)
    assert "torch.float64" in str(refusal(compiled, model, [images[0].double()]))

    def broken() -> Any:
        yield images[0]
        raise OSError("the disk is gone")

    assert "the evaluation data raised OSError: the disk is gone" in str(refusal(compiled, model, broken()))


def test_wrong_models_and_options_are_errors(
    compiled: qcompile.CompiledModel, model: nn.Module, images: list[Tensor]
) -> None:
    assert "the compiled model is a Sequential" in str(refusal(model, model, images))
    assert "the float model is a str" in str(refusal(compiled, "model.pt2", images))
    assert "blocks is -1" in str(refusal(compiled, model, images, blocks=-1))
    assert "layers is 1.5" in str(refusal(compiled, model, images, layers=1.5))
    training = nn.Sequential(model, nn.Dropout())
    with pytest.raises(CaptureError, match="Dropout is in training mode"):
        qcompile.evaluate(compiled, training.train(), images, blocks=0)
    model.eval()
    other = nn.Sequential(model, nn.Unflatten(1, (5, 1))).eval()
    assert "has shape (1, 5, 1) in float and (1, 5) in int8" in str(refusal(compiled, other, images))


def test_nan_of_the_float_model_is_an_error(
    compiled: qcompile.CompiledModel, model: nn.Module, images: list[Tensor]
) -> None:
    bad = images[1].clone()
    bad[0, 0, 0, 0] = math.nan
    error = refusal(compiled, model, [images[0], bad])
    assert "'output' of the float model holds NaN" in str(error)
    assert "batch 1" in str(error)


class Several(nn.Module):
    """Outputs of several kinds, nested."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = torch.relu(self.body(x))
        scores = self.head(y.mean((2, 3)))
        return {"map": y, "rest": (scores, scores.argmax(1), scores.sum(1, keepdim=True))}


def test_each_of_several_outputs_is_compared_and_named() -> None:
    torch.manual_seed(0)
    model = Several().eval()
    data = [torch.randn(4, 3, 8, 8) for _ in range(4)]
    compiled = qcompile.compile(model, calibration=data)
    found = qcompile.evaluate(compiled, model, data, blocks=0)
    by_name = {output.name: output for output in found.outputs}
    assert list(by_name) == ["map", "rest.0", "rest.1", "rest.2"]
    assert by_name["rest.1"].sqnr is None  # whole numbers
    assert by_name["rest.2"].agreement is None  # one number for each sample
    assert by_name["rest.0"].agreement == by_name["rest.1"].agreement
    assert found.sqnr == min(o.sqnr for o in found.outputs if o.sqnr is not None)
    assert "same answer of rest.0" in str(found)
    pairs = [(x, model(x)["rest"][1]) for x in data]
    scored = qcompile.evaluate(compiled, model, pairs, labels="rest.0", blocks=0)
    assert scored.float_accuracy == 1.0
    assert "labels is ''" in str(refusal(compiled, model, pairs, labels=""))
    assert "has no output 'scores'" in str(refusal(compiled, model, pairs, labels="scores"))
    assert "which holds no scores" in str(refusal(compiled, model, pairs, labels="rest.2"))


def test_a_label_for_every_pixel() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3))).eval()
    data = [torch.randn(2, 3, 8, 8) for _ in range(8)]
    pairs = [(x, model(x).argmax(1)) for x in data]
    found = qcompile.evaluate(qcompile.compile(model, calibration=data), model, pairs, labels=True, blocks=0)
    assert found.float_accuracy == 1.0
    assert found.int8_accuracy == found.agreement
    assert found.agreement is not None
    assert 0.9 < found.agreement < 1.0


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(4, 5)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.a(left) + self.b(right)


def test_named_inputs_a_dynamic_batch_and_an_exported_model() -> None:
    torch.manual_seed(0)
    model = TwoInputs().eval()
    data = [{"right": torch.randn(n, 4), "left": torch.randn(n, 6)} for n in (3, 8, 5)]
    batch = Dim("batch", max=16)
    shapes = {"left": {0: batch}, "right": {0: batch}}
    compiled = qcompile.compile(model, calibration=data, dynamic_shapes=shapes)
    found = qcompile.evaluate(compiled, model, data, blocks=1, layers=16)
    assert found.samples == 16
    assert found.sqnr is not None
    assert 20 < found.sqnr < 60
    assert found.diagnosis is not None
    assert found.diagnosis.samples == 16
    exported = torch.export.export(model, (), data[0], dynamic_shapes=shapes)
    again = qcompile.evaluate(compiled, exported, data, blocks=0)
    assert again.quality == found.quality
    assert again.float_bytes == pytest.approx(found.float_bytes, rel=0.2)


def test_a_loaded_model_is_evaluated_without_layers(
    compiled: qcompile.CompiledModel, model: nn.Module, images: list[Tensor], tmp_path: Any
) -> None:
    compiled.save(tmp_path / "model.qcm")
    loaded = qcompile.load(tmp_path / "model.qcm")
    found = qcompile.evaluate(loaded, model, images, blocks=0, layers=8)
    assert found.quality == qcompile.evaluate(compiled, model, images, blocks=0).quality
    assert found.diagnosis is None
    assert any("machine code and no layers" in note for note in found.notes)
    assert "machine code and no layers" in str(found)


def test_everything_is_in_the_json(
    compiled: qcompile.CompiledModel, model: nn.Module, labelled: list[tuple[Tensor, Tensor]], tmp_path: Any
) -> None:
    found = qcompile.evaluate(compiled, model, labelled, labels=True, layers=4, robustness=True, blocks=1)
    found.save(tmp_path / "result.json")
    read = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert read["quality"]["outputs"][0]["sqnr"] == found.sqnr
    assert read["speedup"] == found.speedup
    assert read["coverage"][0]["kind"] == "integer"
    assert read["diagnosis"]["rows"][0]["isolated"] == found.diagnosis.rows[0].isolated  # type: ignore[union-attr]
    assert set(read["shifts"]) == set(found.shifts)
    with pytest.raises(ConfigError, match=r"cannot be written as \.pdf"):
        found.save(tmp_path / "result.pdf")
    with pytest.raises(ConfigError, match="No such file"):
        found.save(tmp_path / "nowhere" / "result.json")


def test_interleaving_takes_turns() -> None:
    order: list[str] = []
    assert len(interleave((lambda: order.append("a"), lambda: order.append("b")), blocks=2)) == 2
    assert "".join(order) == "aaaaabbbbb" * 3


@pytest.mark.parametrize("numerics", ["int8", "bfloat16", "float32"])
def test_tables_and_pages_name_what_the_model_computes_in(
    numerics: str, compiled: qcompile.CompiledModel, model: nn.Module, images: list[Tensor], tmp_path: Path
) -> None:
    if numerics != "int8":
        compiled = qcompile.compile(model, example_inputs=images[0], numerics=numerics)
    found = qcompile.evaluate(compiled, model, images, blocks=0)
    assert found.numerics == numerics
    found.html(tmp_path / "page.html")
    for text in (str(found), (tmp_path / "page.html").read_text()):
        assert numerics in text
        assert numerics == "int8" or "int8" not in text
