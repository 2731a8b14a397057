"""compile(): what the public function takes and gives, end to end on this machine's own target."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from passing import images, network, randn, randomize, sqnr
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, TensorDataset

import qcompile
from qcompile.errors import BuildError, DeviceError, InputError
from qcompile.targets.cuda import nvrtc

X = randn(1, 3, 10, 10)


@pytest.fixture(scope="module")
def compiled() -> qcompile.CompiledModel:
    return qcompile.compile(network(), calibration=images())


# --- exactness -------------------------------------------------------------------------------------------


def test_machine_code_and_reference_give_the_same_bits(compiled: qcompile.CompiledModel) -> None:
    assert {row.kind for row in compiled.coverage} == {"integer", "shape"}
    assert compiled.artifact.exact
    assert compiled.selftest().passed
    for seed in range(5):
        x = 3 * randn(1, 3, 10, 10, seed=100 + seed)  # beyond what was calibrated, too
        assert torch.equal(compiled(x), compiled.reference(x))


def test_the_compiled_model_follows_the_float_one(compiled: qcompile.CompiledModel) -> None:
    model, data = network(), images()
    with torch.no_grad():
        expected = torch.cat([model(x) for x in data])
    assert sqnr(expected, torch.cat([compiled(x) for x in data])) > 25


def test_the_same_model_compiles_to_the_same_bytes(compiled: qcompile.CompiledModel) -> None:
    again = qcompile.compile(network(), calibration=images())
    assert bytes(again.artifact.to_bytes()) == bytes(compiled.artifact.to_bytes())
    assert bytes(qcompile.compile(network(1), calibration=images()).artifact.to_bytes()) != bytes(
        compiled.artifact.to_bytes()
    )


def test_a_saved_model_gives_the_same_bits(compiled: qcompile.CompiledModel, tmp_path: Path) -> None:
    compiled.save(tmp_path / "model.qcm")
    loaded = qcompile.load(tmp_path / "model.qcm")
    assert loaded.selftest().passed
    assert loaded.coverage == compiled.coverage
    assert loaded.target == compiled.target
    np.testing.assert_array_equal(loaded(X.numpy()), compiled(X).numpy(), strict=True)


# --- what is called --------------------------------------------------------------------------------------


def test_torch_gives_torch_and_numpy_gives_numpy(compiled: qcompile.CompiledModel) -> None:
    for call in (compiled, compiled.reference):
        assert isinstance(call(X), Tensor)
        assert isinstance(call(X.numpy()), np.ndarray)
        np.testing.assert_array_equal(call(X.numpy()), call(X).numpy(), strict=True)


LAYOUTS = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "strided": lambda x: torch.stack([x, -x], -1)[..., 0],
    "with gradient": lambda x: x.clone().requires_grad_(),
    "a parameter": lambda x: nn.Parameter(x.clone()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_how_an_input_lies_in_memory_does_not_matter(compiled: qcompile.CompiledModel, layout: str) -> None:
    x = LAYOUTS[layout](X)
    assert torch.equal(compiled(x), compiled(X))
    assert torch.equal(compiled.reference(x), compiled(X))
    assert not compiled(x).requires_grad


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


def test_the_reference_reads_any_array(compiled: qcompile.CompiledModel) -> None:
    np.testing.assert_array_equal(compiled.reference(read_only(X.numpy())), compiled(X).numpy())


WRONG: dict[str, tuple[tuple[Any, ...], str]] = {
    "none": ((), "takes 1 inputs, and 0 were given"),
    "two": ((X, X), "takes 1 inputs, and 2 were given"),
    "batch": ((randn(2, 3, 10, 10),), r"shape \(2, 3, 10, 10\), and the model takes float32 \(1, 3, 10, 10\)"),
    "no batch": ((X[0],), r"shape \(3, 10, 10\)"),
    "float64": ((X.double(),), "dtype float64, and the model takes float32"),
    "float16": ((X.half(),), "dtype float16"),
    "bfloat16": ((X.bfloat16(),), "no plain array(.*)BFloat16"),
    "sparse": ((X.to_sparse(),), "no plain array(.*)[Ss]parse"),
    "another device": ((X.to("meta"),), "on the CPU"),
    "mixed": ((X, X.numpy()), "must all be tensors"),
    "text": (("x",), "dtype"),
    "nothing": ((None,), "dtype object"),
}


@pytest.mark.parametrize("case", WRONG)
def test_inputs_that_do_not_fit_are_refused_by_code_and_reference(compiled: qcompile.CompiledModel, case: str) -> None:
    inputs, message = WRONG[case]
    for call in (compiled, compiled.reference):
        with pytest.raises(InputError, match=message) as caught:
            call(*inputs)
        assert caught.value.remedy


# --- what goes in ------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Two inputs that are not alike, nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(6, 4)

    def forward(self, image: Tensor, features: Tensor) -> dict[str, Any]:
        y, z = self.conv(image).relu(), self.fc(features)
        return {"maps": (y, None), "joined": [y.mean((2, 3)) + z, {"features": z}]}


PAIR = {"image": randn(2, 3, 6, 6), "features": randn(2, 6)}


@pytest.fixture(scope="module")
def mixed() -> qcompile.CompiledModel:
    """Calibrated by name, in another order, with labels."""
    batch = {"features": PAIR["features"], "image": PAIR["image"], "labels": torch.arange(2)}
    return qcompile.compile(randomize(Mixed()), calibration=[batch])


def test_inputs_are_given_by_position_or_by_name(mixed: qcompile.CompiledModel) -> None:
    image, features = PAIR.values()
    expected = mixed(image, features)["joined"][0]
    for call in (mixed, mixed.reference):
        assert torch.equal(call(**PAIR)["joined"][0], expected)
        assert torch.equal(call(image, features=features)["joined"][0], expected)
        assert torch.equal(call([image, features])["joined"][0], expected)


def test_outputs_nest_as_the_model_nests_them(mixed: qcompile.CompiledModel, tmp_path: Path) -> None:
    mixed.save(tmp_path / "mixed.qcm")
    for call in (mixed, mixed.reference, qcompile.load(tmp_path / "mixed.qcm")):
        result = call(**PAIR)
        assert list(result) == ["maps", "joined"]
        assert isinstance(result["maps"], tuple)
        assert result["maps"][1] is None
        assert isinstance(result["joined"], list)
        assert torch.equal(result["joined"][1]["features"], mixed(**PAIR)["joined"][1]["features"])


@pytest.mark.parametrize(
    ("inputs", "named", "message"),
    [
        ((), {"image": PAIR["image"]}, "keyword inputs are image, and the model takes image, features"),
        ((), {**PAIR, "labels": randn(2)}, "keyword inputs are image, features, labels"),
        ((PAIR["image"],), PAIR, "and the model takes features"),
        (tuple(PAIR.values()), PAIR, "and the model takes no more"),
        ((), {**PAIR, "features": PAIR["image"]}, r"input 'features' has shape \(2, 3, 6, 6\)"),
    ],
)
def test_names_that_do_not_fit_are_refused(
    mixed: qcompile.CompiledModel, inputs: tuple[Tensor, ...], named: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        mixed(*inputs, **named)


@pytest.mark.parametrize("form", ["graph module", "exported", "exported module", "float arrays"])
def test_every_form_of_a_model_gives_the_same_bits(compiled: qcompile.CompiledModel, form: str) -> None:
    model: Any = network()
    data: list[Any] = list(images())
    if form == "graph module":
        model = fx.symbolic_trace(model)
    elif form.startswith("exported"):
        model = torch.export.export(model, (X,))
        model = model.module() if form.endswith("module") else model
    else:
        data = [x.numpy() for x in data]
    assert torch.equal(qcompile.compile(model, calibration=data)(X), compiled(X))


def test_a_data_loader_and_a_generator_calibrate_alike(compiled: qcompile.CompiledModel) -> None:
    held: list[int] = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for x in images():
            held.append(len(held))
            yield x, torch.tensor(3)  # a label

    loader = DataLoader(TensorDataset(torch.cat(images()), torch.arange(8)), batch_size=4)
    for data in (batches(), loader):
        again = qcompile.compile(network(), example_inputs=X, calibration=data)
        assert torch.equal(again(X), compiled(X))
    assert held == list(range(8))


def test_the_signature_is_the_public_one() -> None:
    parameters = list(inspect.signature(qcompile.compile).parameters.values())
    assert [(p.name, p.default) for p in parameters[:2]] == [("model", inspect.Parameter.empty), ("target", "native")]
    keywords = {p.name: p.default for p in parameters[2:] if p.kind is inspect.Parameter.KEYWORD_ONLY}
    optional = ("example_inputs", "calibration", "dynamic_shapes", "config", "pipeline")
    assert {**dict.fromkeys(optional), "strict": False}.items() <= keywords.items()
    assert len(keywords) == len(parameters) - 2
    assert set(optional) - {"config"} <= set(inspect.signature(qcompile.quantize).parameters)


# --- other machines ----------------------------------------------------------------------------------------


def test_a_model_for_another_machine_is_saved_and_referred_to_but_not_run(
    compiled: qcompile.CompiledModel, tmp_path: Path
) -> None:
    other = "arm64-neon" if compiled.target.startswith("x86") else "x86-avx2"
    foreign = qcompile.compile(network(), other, calibration=images())
    assert foreign.target == other
    assert torch.equal(foreign.reference(X), compiled(X))
    with pytest.raises(InputError, match="takes 1 inputs"):
        foreign.reference()
    foreign.save(tmp_path / "foreign.qcm")
    for call in (lambda: foreign(X), foreign.selftest, lambda: qcompile.load(tmp_path / "foreign.qcm")):
        with pytest.raises(DeviceError) as caught:
            call()
        assert other in str(caught.value)
        assert caught.value.remedy


@pytest.mark.parametrize(
    ("target", "missing"), [("x86-avx2", "linker"), ("arm64-neon", "linker"), ("cuda-sm_80", "compiler")]
)
def test_a_missing_tool_is_found_before_any_work(target: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    monkeypatch.setattr(nvrtc, "_libraries", lambda: ())
    with pytest.raises(BuildError, match=f"no {missing} for ") as caught:
        qcompile.compile(nn.Sequential(), target)  # which could not even be captured
    assert "install" in str(caught.value.remedy)


def test_the_artifact_says_how_inputs_and_outputs_are_quantized() -> None:
    compiled = qcompile.compile(network(), calibration=images())
    (x,), (y,) = compiled.inputs, compiled.outputs
    largest = max(float(image.abs().max()) for image in images())
    assert x.scale == pytest.approx(2 * largest / 255, rel=0.2)
    assert x.zero_point is not None
    assert y.scale is not None
    steps = compiled(images()[0]) / y.scale
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
