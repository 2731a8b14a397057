"""calibrate: reads the data once, in constant memory, and names the batch that is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from passing import network, randn, randomize, run_until
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from qcompile.config import QuantConfig
from qcompile.errors import CalibrationError, CalibrationWarning
from qcompile.ir import Program
from qcompile.observers import Observer
from qcompile.passes import Context, default_pipeline
from qcompile.passes.smooth import Smooth
from qcompile.quantizer import quantize


def calibrated(batches: Any, config: QuantConfig | None = None, **options: Any) -> Program:
    return run_until("calibrate", nn.ReLU(), (randn(2, 3),), config, calibration=batches, **options)


def first_range(program: Program) -> tuple[float, float]:
    """What the observer of the model's input would quantize exactly: its lowest and highest value."""
    node = next(n for n in program.graph.nodes if n.op == "call_module")
    observer = program.graph_module.get_submodule(str(node.target))
    assert isinstance(observer, Observer)
    q = observer.qparams()
    return q.scale * (-128 - q.zero_point), q.scale * (127 - q.zero_point)


def test_minmax_spans_all_batches() -> None:
    low, high = first_range(calibrated([torch.full((2, 3), v) for v in (1.0, -3.0, 5.0, 2.0)]))
    assert (low, high) == pytest.approx((-3, 5), abs=8 / 255)


def test_moving_average_follows_the_batches() -> None:
    config = QuantConfig("moving_average", averaging=0.5)
    assert first_range(calibrated([torch.full((2, 3), v) for v in (4.0, 8.0)], config))[1] == pytest.approx(6, rel=0.01)


def test_a_batch_in_pieces_counts_once_for_the_moving_average() -> None:
    config = QuantConfig("moving_average", averaging=0.5)
    batches = [torch.cat([torch.full((2, 3), v) for v in values]) for values in ((4.0, 1.0), (2.0, 8.0))]
    assert first_range(calibrated(batches, config))[1] == pytest.approx(6, rel=0.01)


def test_percentile_leaves_out_the_outlier() -> None:
    x = randn(1000, 4).clamp(-3, 3)
    x[0, 0] = 1000.0
    program = run_until("calibrate", nn.ReLU(), (x,), QuantConfig("percentile", percentile=99.9))
    assert 2 < first_range(program)[1] < 5


def test_a_generator_is_read_once_and_to_its_end() -> None:
    read = []

    def batches() -> Iterator[Tensor]:
        for i in range(5):
            read.append(i)
            yield randn(2, 3, seed=i)

    quantize(nn.ReLU(), calibration=batches())
    assert read == [0, 1, 2, 3, 4]


def test_progress_counts_batches() -> None:
    told: list[tuple[str, int, int | None]] = []
    calibrated([randn(2, 3)] * 3, progress=lambda *args: told.append(args))
    assert told == [("calibrate", 1, 3), ("calibrate", 2, 3), ("calibrate", 3, 3)]


def test_a_data_loader_may_yield_labels_too() -> None:
    loader = DataLoader(TensorDataset(randn(8, 3), torch.arange(8)), batch_size=2)
    with pytest.warns(CalibrationWarning, match=r"more than the model's inputs \(input\); .* the last value"):
        assert first_range(calibrated(loader))[1] == pytest.approx(float(randn(8, 3).max()), rel=0.02)


class Shifts(nn.Module):
    def forward(self, x: Tensor, by: Tensor | None = None) -> Tensor:
        return torch.relu(x if by is None else x + by)


def test_a_label_is_never_taken_for_an_optional_input() -> None:
    """Nor the other way: who gives example inputs or names has said which it is."""
    pair = [(randn(2, 3), randn(2, 3, seed=1))]
    with pytest.raises(CalibrationError, match=r"2 values, and the model needs 1 and can take 2(.|\n)*example_inputs"):
        quantize(Shifts(), calibration=pair)
    with pytest.warns(CalibrationWarning, match=r"inputs \(x\)"):
        assert len(quantize(Shifts(), calibration=pair, example_inputs=pair[0][0]).program.inputs) == 1
    assert len(quantize(Shifts(), calibration=pair, example_inputs=pair[0]).program.inputs) == 2
    assert len(quantize(Shifts(), calibration=[{"x": pair[0][0], "by": pair[0][1]}]).program.inputs) == 2
    assert len(quantize(Shifts(), calibration=[pair[0][:1]]).program.inputs) == 1


def test_more_examples_than_inputs_are_not_dropped_in_silence() -> None:
    with pytest.warns(CalibrationWarning, match=r"inputs \(input\); .* the last 2 values"):
        quantize(nn.ReLU(), calibration=[randn(2, 3)], example_inputs=(randn(2, 3), randn(2, 3), 7))


def test_one_buffer_for_all_batches_gives_what_a_list_gives() -> None:
    buffer, own = torch.empty(1, 3, 10, 10), [randn(1, 3, 10, 10, seed=i) for i in range(32)]

    def refilled() -> Iterator[Tensor]:
        for batch in own:
            yield buffer.copy_(batch)

    for pipeline in (None, default_pipeline().after("fold_batchnorm", Smooth(samples=8))):
        config = QuantConfig(preset="balanced") if pipeline is None else None
        options: dict[str, Any] = {"config": config, "pipeline": pipeline}
        from_list = quantize(network(), calibration=own, **options)
        assert torch.equal(quantize(network(), calibration=refilled(), **options)(own[3]), from_list(own[3]))


def test_of_a_large_batch_only_the_samples_that_are_asked_for_are_kept() -> None:
    dynamic = ({0: torch.export.Dim("batch", max=64)},)
    x = randn(50, 3)
    program = run_until("fold_batchnorm", nn.Sequential(nn.Linear(3, 3)), (x[:2],), dynamic_shapes=dynamic)
    context = Context(QuantConfig(preset="balanced"), [(x[:20],), (x[20:],)])
    for step in default_pipeline():
        if step.name in ("insert_observers", "calibrate"):
            step.run(program, context)
    assert torch.equal(torch.cat([sample for (sample,) in context.samples]), x[:32])


def test_what_is_no_input_is_named() -> None:
    batch = {"label": torch.arange(2), "input": randn(2, 3), "weight": randn(2)}
    with pytest.warns(CalibrationWarning, match="as labels: label, weight"):
        calibrated([batch])


def test_a_larger_batch_is_fed_in_pieces() -> None:
    assert first_range(calibrated([randn(6, 3)]))[1] == pytest.approx(float(randn(6, 3).max()), rel=0.02)


NAN = torch.tensor([[1.0, float("nan"), 2.0]] * 2)
WRONG = {
    "empty": ([], "empty"),
    "shape": ([randn(2, 3), randn(2, 4)], r"'input' has shape \(2, 4\)(.|\n)*batch 1"),
    "ragged batch": ([randn(2, 3), randn(3, 3)], r"batch 1(.|\n)*drop_last=True"),
    "type": ([randn(2, 3).double()], r"'input' is float64, not float32(.|\n)*batch 0"),
    "no tensor": ([["a"]], r"'input' is str"),
    "count": ([randn(2, 3), {}], r"does not hold the 1 inputs(.|\n)*batch 1"),
    "NaN": ([randn(2, 3), NAN], r"'input' holds NaN or infinity(.|\n)*batch 1"),
    "infinity": ([NAN.nan_to_num(float("inf"))], r"'input' holds NaN or infinity(.|\n)*batch 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_names_the_batch_and_the_input(case: str) -> None:
    batches, message = WRONG[case]
    with pytest.raises(CalibrationError, match=message) as caught:
        calibrated(batches)
    assert caught.value.remedy


def test_no_data_at_all() -> None:
    with pytest.raises(CalibrationError, match="no calibration data"):
        quantize(nn.ReLU(), example_inputs=randn(2, 3))


def test_the_first_batch_serves_as_example_without_being_lost() -> None:
    told: list[int] = []
    quantize(nn.ReLU(), calibration=(randn(2, 3, seed=i) for i in range(3)), progress=lambda _, n, __: told.append(n))
    assert told == [1, 2, 3]


def test_a_percentile_observer_counts_every_value_once_when_its_reach_grows() -> None:
    program = calibrated([10.0**i * randn(2, 3, seed=i) for i in range(4)], QuantConfig("percentile", percentile=100.0))
    node = next(n for n in program.graph.nodes if n.op == "call_module")
    observer: Any = program.graph_module.get_submodule(str(node.target))
    assert float(observer.counts.sum()) == 24


def test_the_model_is_not_modified() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    quantize(model, calibration=[randn(1, 3, 5, 5)])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
