"""The command line: each command does its work, and a mistake is text and a 1, never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from typer.testing import CliRunner, Result

from qcompile import device
from qcompile.cli import app, out
from qcompile.exported import load_exported
from qcompile.runtime import load
from qcompile.targets.database import Database, Entry

pytestmark = pytest.mark.skipif(device.machine()[0] != "x86_64", reason="the tiny model is built for x86-64")


def qcompile(*arguments: object) -> Result:
    out.width = 200  # wide enough that no cell is folded, whatever terminal the tests run in
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny.artifact("x86-avx2").save(tmp_path / "model.qcm")
    return tmp_path / "model.qcm"


@pytest.mark.parametrize("name", ["x", "whatever"])
def test_run_takes_arrays_and_leaves_arrays(model: Path, tmp_path: Path, name: str) -> None:
    x = tiny.random_input(5)
    arrays: dict[str, Any] = {name: x}
    np.savez(tmp_path / "in.npz", **arrays)
    result = qcompile("run", model, "--input", tmp_path / "in.npz", "--output", tmp_path / "out.npz", "--threads", 1)
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "out.npz", allow_pickle=False) as outputs:
        assert outputs.files == ["y", "z", "b"]
        np.testing.assert_array_equal(outputs["y"], tiny.expected(x))


def test_an_array_that_is_no_input_is_refused(model: Path, exported: Path, tmp_path: Path) -> None:
    """Wherever it stands in the file, and whatever the others are called."""
    np.savez(tmp_path / "more.npz", labels=np.arange(5), x=tiny.random_input(5))
    result = qcompile("run", model, "--input", tmp_path / "more.npz", "--output", tmp_path / "out.npz")
    assert result.exit_code == 1
    assert "the file holds labels, x, and the model takes x" in result.output
    images = np.random.default_rng(0).standard_normal((5, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "images.npz", input=images, labels=np.arange(5))
    result = qcompile("compile", exported, "--calibration", tmp_path / "images.npz", "-o", tmp_path / "net.qcm")
    assert result.exit_code == 1
    assert "the file holds input, labels, and the model takes input" in result.output


def test_inspect_shows_everything(model: Path) -> None:
    result = qcompile("inspect", model)
    assert result.exit_code == 0, result.output
    for text in (
        "int8 (batch 1..8, 64)",
        "scale 0.5, zero point -3",
        "avx2, fma",
        "canonicalize",
        "1 integer, 1 float, 0 shape",
        "a reason to stay float",
        "targets/x86-avx2/constants.safetensors",
        "bit for bit",
        "apache-tvm",
    ):
        assert text in result.output


def test_inspect_works_for_a_processor_that_is_not_here(tmp_path: Path) -> None:
    tiny.artifact("arm64-dotprod").save(tmp_path / "arm.qcm")
    result = qcompile("inspect", tmp_path / "arm.qcm")
    assert result.exit_code == 0, result.output
    assert "is x86_64, not aarch64" in result.output


def test_selftest_passes(model: Path) -> None:
    result = qcompile("selftest", model)
    assert result.exit_code == 0, result.output
    assert "passed: 0 of 320 elements wrong" in result.output


def test_targets_are_listed() -> None:
    result = qcompile("targets")
    assert result.exit_code == 0, result.output
    for name in ("x86-avx512-vnni", "x86-avx2", "arm64-dotprod", "arm64-neon", "native"):
        assert name in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("selftest", "{tmp}/nowhere.qcm"), "cannot be read: No such file"),
        (("inspect", "{tmp}/in.npz"), "not a qcompile artifact"),
        (("run", "{tmp}/model.qcm", "-i", "{tmp}/nowhere.npz", "-o", "{tmp}/out.npz"), "arrays cannot be read"),
        (("run", "{tmp}/model.qcm", "-i", "{tmp}/model.qcm", "-o", "{tmp}/out.npz"), "arrays cannot be read"),
        (("run", "{tmp}/model.qcm", "-i", "{tmp}/in.npz", "-o", "{tmp}/out.npz"), "dtype float32"),
        (("selftest", "{tmp}/model.qcm", "--threads", "0"), "threads is 0"),
        (("compile", "{tmp}/in.npz", "--calibration", "{tmp}/in.npz", "-o", "{tmp}/out.qcm"), "refuses the model"),
        (("compile", "{tmp}/nowhere.pt2", "--calibration", "{tmp}/in.npz", "-o", "{tmp}/out.qcm"), "cannot be read"),
    ],
)
def test_a_mistake_is_text_and_not_a_traceback(
    model: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    np.savez(tmp_path / "in.npz", x=np.random.default_rng(0).random((2, 64), np.float32))
    result = qcompile(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert result.exit_code == 1
    assert message in result.output
    assert "remedy:" in result.output
    assert "Traceback" not in result.output


def test_the_commands_of_a_device_import_neither_torch_nor_the_compiler(model: Path) -> None:
    code = """
import sys
from typer.testing import CliRunner
from qcompile.cli import app, out
for command in ("inspect", "selftest"):
    assert CliRunner().invoke(app, [command, sys.argv[1]]).exit_code == 0
assert not {"torch", "tvm"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, str(model)], check=True)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10)).eval()
    torch.export.save(torch.export.export(net, (torch.randn(1, 3, 8, 8),)), tmp_path / "net.pt2")
    return tmp_path / "net.pt2"


def test_compile_makes_a_model_that_runs(exported: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((16, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", images=images)
    result = qcompile(
        "compile", exported, "--calibration", tmp_path / "data.npz", "-o", tmp_path / "net.qcm", "--strict"
    )
    assert result.exit_code == 0, result.output
    model = load(tmp_path / "net.qcm")
    assert model.selftest().passed
    with torch.no_grad():
        wanted = load_exported(exported).module()(torch.from_numpy(images[:1])).numpy()
    assert np.abs(model(images[:1]) - wanted).max() < 0.1 * np.abs(wanted).max()


def test_dynamic_activations_need_no_calibration(exported: Path, tmp_path: Path) -> None:
    layer, x = nn.Linear(20, 9).eval(), torch.randn(3, 20)
    torch.export.save(torch.export.export(layer, (x,)), tmp_path / "layer.pt2")
    result = qcompile("compile", tmp_path / "layer.pt2", "--activations", "dynamic", "-o", tmp_path / "layer.qcm")
    assert result.exit_code == 0, result.output
    assert "1 integer, 0 float, 0 shape" in result.output
    assert load(tmp_path / "layer.qcm").selftest().passed
    result = qcompile("compile", tmp_path / "layer.pt2", "--activations", "float", "-o", tmp_path / "layer.qcm")
    assert "0 integer, 1 weight-only, 0 float, 0 shape" in result.output
    result = qcompile("compile", exported, "-o", tmp_path / "net.qcm")
    assert result.exit_code == 1
    assert "no calibration data" in result.output


def test_compile_searches_for_layers_to_leave_in_float(exported: Path, tmp_path: Path) -> None:
    for name, seed in (("data", 0), ("held_out", 1)):
        images = np.random.default_rng(seed).standard_normal((16, 3, 8, 8)).astype(np.float32)
        np.savez(tmp_path / f"{name}.npz", images=images)
    data = "--calibration", tmp_path / "data.npz", "--evaluation", tmp_path / "held_out.npz"
    result = qcompile("compile", exported, *data, "--max-accuracy-drop", 0.0, "-o", tmp_path / "net.qcm")
    assert result.exit_code == 0, result.output
    assert "metric 1 (float 1" in result.output
    assert load(tmp_path / "net.qcm").selftest().passed


def test_compile_to_bfloat16_needs_no_data(exported: Path, tmp_path: Path) -> None:
    result = qcompile("compile", exported, "--numerics", "bfloat16", "-o", tmp_path / "net.qcm")
    assert result.exit_code == 0, result.output
    assert "bfloat16" in result.output
    assert load(tmp_path / "net.qcm").selftest().passed


@pytest.mark.parametrize("option", [("--preset", "fast"), ("--weight-bits", 4), ("--activations", "dynamic")])
def test_an_option_for_int8_is_refused_by_its_name_with_other_numerics(
    exported: Path, tmp_path: Path, option: tuple[str, Any]
) -> None:
    result = qcompile("compile", exported, "--numerics", "float32", *option, "-o", tmp_path / "net.qcm")
    assert result.exit_code == 1
    assert f"{option[0]} is given, but with --numerics float32 nothing is quantized" in result.output
    assert f"leave {option[0]} or --numerics out" in result.output


@pytest.mark.parametrize("kind", ["cut", "flipped", "flipped, compressed"])
def test_a_damaged_file_of_arrays_is_text_and_not_a_traceback(exported: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "damaged.npz"
    write = np.savez_compressed if "compressed" in kind else np.savez
    write(path, x=np.random.default_rng(0).random((20, 3, 8, 8), dtype=np.float32))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data[:300] if kind == "cut" else data)
    result = qcompile("compile", exported, "--calibration", path, "-o", tmp_path / "x.qcm")
    assert result.exit_code == 1
    assert "the arrays cannot be read" in result.output


def test_a_batch_of_no_samples_is_refused_by_its_name(exported: Path, tmp_path: Path) -> None:
    result = qcompile("compile", exported, "--batch", 0, "-o", tmp_path / "x.qcm")
    assert result.exit_code == 2
    assert "--batch" in result.output


def test_calibration_arrays_must_have_equal_lengths(exported: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", a=np.ones((4, 3, 8, 8), np.float32), b=np.ones((5, 1), np.float32))
    result = qcompile("compile", exported, "--calibration", tmp_path / "data.npz", "-o", tmp_path / "net.qcm")
    assert result.exit_code == 1
    assert "different numbers of samples (a: 4, b: 5)" in result.output


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pt2_file_with_pickled_code_is_not_run(tmp_path: Path, exported: Path) -> None:
    """The sample inputs of an archive replaced by a pickle that would create a file."""
    import pickle
    import zipfile

    marker = tmp_path / "was-run"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (marker,)  # type: ignore[return-value]

    attack = tmp_path / "attack.pt2"
    with zipfile.ZipFile(exported) as old, zipfile.ZipFile(attack, "w") as new:
        for name in old.namelist():
            held = "sample_inputs" in name
            new.writestr(name, pickle.dumps(Evil()) if held else old.read(name))
    result = qcompile("compile", attack, "--calibration", tmp_path / "x.npz", "-o", tmp_path / "net.qcm")
    assert result.exit_code == 1
    assert not marker.exists()


def test_tune_remembers_and_compile_uses_it(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.targets.tune.MOST_CANDIDATES", 2)
    np.savez(tmp_path / "data.npz", images=np.random.default_rng(0).standard_normal((16, 3, 8, 8)).astype(np.float32))
    given = (exported, "--calibration", tmp_path / "data.npz")
    result = qcompile("tune", *given, "--database", tmp_path / "tuned.sqlite", "--threads", 1)
    assert result.exit_code == 0, result.output
    assert "2 kernels measured" in result.output
    assert "2 of 2" in result.output
    result = qcompile("tune", *given, "--database", tmp_path / "tuned.sqlite", "--threads", 1)
    assert "0 kernels measured" in result.output
    result = qcompile("compile", *given, "--tuning", tmp_path / "tuned.sqlite", "-o", tmp_path / "net.qcm")
    assert result.exit_code == 0, result.output
    assert load(tmp_path / "net.qcm").selftest().passed


def test_more_threads_than_there_are_are_refused_before_calibrating(exported: Path, tmp_path: Path) -> None:
    given = ("--calibration", tmp_path / "absent.npz", "--database", tmp_path / "tuned.sqlite", "--threads", 1000)
    result = qcompile("tune", exported, *given)
    assert result.exit_code == 1
    assert "1000 threads were asked for" in result.output


def test_an_interrupted_tuning_says_where_to_go_on(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qcompile.targets.tune.tune", interrupted)
    np.savez(tmp_path / "data.npz", images=np.zeros((2, 3, 8, 8), np.float32) + 1)
    result = qcompile("tune", exported, "--calibration", tmp_path / "data.npz", "--database", tmp_path / "tuned.sqlite")
    assert result.exit_code == 130
    assert "goes on from there" in result.output


def test_databases_merge(tmp_path: Path) -> None:
    found = Entry("conv", "1x8x8x16 -> 1x8x8x32", "x86_64: avx2", "qcompile 0.1.0", 2, "{}", 1.0, 4.5, "a processor")
    Database(tmp_path / "desk.sqlite").add(found)
    for taken in (True, False):
        result = qcompile("merge", tmp_path / "all.sqlite", tmp_path / "desk.sqlite")
        assert result.exit_code == 0, result.output
        assert (" 0 entries taken" in result.output) is not taken


@pytest.fixture
def evaluated(exported: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A compiled model, and two files: what it was calibrated on, and what to evaluate it on."""
    generator = np.random.default_rng(0)
    images = [generator.standard_normal((16, 3, 8, 8)).astype(np.float32) for _ in range(2)]
    np.savez(tmp_path / "calibration.npz", images=images[0])
    np.savez(tmp_path / "data.npz", images=images[1], labels=generator.integers(0, 4, 16))
    compiled = tmp_path / "net.qcm"
    result = qcompile("compile", exported, "--calibration", tmp_path / "calibration.npz", "-o", compiled)
    assert result.exit_code == 0, result.output
    return compiled, tmp_path / "calibration.npz", tmp_path / "data.npz"


def test_evaluate_compares_and_writes_reports(
    exported: Path, evaluated: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    compiled, calibration, data = evaluated
    reports = ("--html", tmp_path / "report.html", "--json", tmp_path / "report.json")
    given = (compiled, "--model", exported, "--data", data, "--labels", "labels")
    result = qcompile("evaluate", *given, "--robustness", "--calibration", calibration, *reports)
    assert result.exit_code == 0, result.output
    for text in ("SQNR", "x faster", "F1", "less contrast", "breaks nowhere"):
        assert text in result.output
    assert "SQNR along the network" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["diagnosis"]["samples"] == 16
    result = qcompile("evaluate", *given)
    assert result.exit_code == 0, result.output
    assert "note: layers were not compared" in result.output


def test_layers_of_another_network_are_not_shown(exported: Path, evaluated: tuple[Path, Path, Path]) -> None:
    """The data to evaluate on is not what the file was calibrated on: the golden vectors say so."""
    compiled, _, data = evaluated
    with np.load(data) as arrays:
        np.savez(data.with_name("other.npz"), images=3 * arrays["images"])
    given = (compiled, "--model", exported, "--data", data, "--labels", "labels")
    result = qcompile("evaluate", *given, "--calibration", data.with_name("other.npz"))
    assert result.exit_code == 1
    assert "do not give the network of the compiled file" in result.output


def test_layers_are_shown_of_weights_of_few_bits(exported: Path, evaluated: tuple[Path, Path, Path]) -> None:
    compiled, calibration, data = evaluated
    few = ("--calibration", calibration, "--weight-bits", 4)
    assert qcompile("compile", exported, *few, "-o", compiled).exit_code == 0
    given = ("evaluate", compiled, "--model", exported, "--data", data, "--labels", "labels")
    assert qcompile(*given, *few).exit_code == 0
    assert qcompile(*given, *few[:2]).exit_code == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "the file holds images, labels, and the model takes input"),
        (("--labels", "classes"), "there is no array 'classes'"),
        (("--labels", "labels", "--preset", "best"), "without the calibration data"),
        (("--labels", "labels", "--html", "nowhere/report.html"), "the report cannot be written"),
    ],
)
def test_mistakes_of_evaluate(
    exported: Path, evaluated: tuple[Path, Path, Path], options: tuple[str, ...], message: str
) -> None:
    compiled, _, data = evaluated
    result = qcompile("evaluate", compiled, "--model", exported, "--data", data, *options)
    assert result.exit_code == 1
    assert message in result.output
