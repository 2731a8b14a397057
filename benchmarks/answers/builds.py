"""The files that are raced and weighed: every network in every form, and what its graph says of it."""

from __future__ import annotations

import zipfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tvm
from torch import nn
from tvm import relax

import qcompile
from benchmarks.answers import networks
from benchmarks.answers.apart import PIPELINES, bytes_moved, counting
from benchmarks.answers.jobs import Job
from benchmarks.answers.networks import DIGITS, LITE0, MLP, Network
from benchmarks.engines import ENGINES, Source
from benchmarks.fidelity import fidelity
from benchmarks.models import multiply_accumulates
from qcompile.capture import capture
from qcompile.evaluation.timing import file_size
from qcompile.targets import get
from qcompile.targets.emitters import emitters_for
from qcompile.targets.lower import lower

ORIGINAL, FLOAT32, BFLOAT16 = "original", "float32", "bfloat16"
MIDDLE, SPREAD = 127.0, 128.0  # photographs' pixels are normalized by these
JOINED = next(iter(PIPELINES))
CALL = tvm.ir.Op.get("relax.call_tir")


def job(name: str, form: str, folder: Path) -> dict[str, Job]:
    """The job of `compiled`, by the name that `key` gives it."""
    return {key(name, form): Job(compiled, (name, form, folder))}


def key(name: str, form: str) -> str:
    return f"{name}, {form}"


class Build(NamedTuple):
    """A compiled model in a file.

    Attributes:
        members: bytes of the file by kind: "weights", "code", "rest".
        operators: how many there are after each pass.
        kernels: called by one call of the model.
        moved: bytes of (activations, constants) that a call's operators read and write.
        sqnr, agreement: of its logits to the float model's.
    """

    path: Path
    members: dict[str, int]
    operators: dict[str, int]
    kernels: int
    moved: tuple[int, int]
    sqnr: float
    agreement: float


def compiled(name: str, form: str, folder: Path) -> Build:
    """`form`: one of `apart.PIPELINES`, or float numerics."""
    chosen, found = networks.network(name), dict[str, int]()
    if form in PIPELINES:
        pipeline = counting(PIPELINES[form], found)
        model = qcompile.compile(
            chosen.model, calibration=chosen.calibration, pipeline=pipeline, strict=True, threads=1
        )
    else:
        model = qcompile.compile(chosen.model, example_inputs=chosen.held_out[0], numerics=form, threads=1)
    return _written(model, chosen, networks.float_answers(name), Path(folder, f"{name}, {form}.qcm"), found)


def few_bits(form: str, folder: Path) -> Build:
    """The MLP with integer weights only, `form` of them."""
    chosen = networks.network(MLP)
    config = qcompile.QuantConfig(activations="float", weight_bits=int(form.removeprefix("int")))
    model = qcompile.compile(chosen.model, example_inputs=chosen.held_out[0], config=config, threads=1)
    return _written(model, chosen, networks.float_answers(MLP), Path(folder, f"{MLP}, {form}.qcm"), {})


class Normalizing(nn.Module):
    """A network that takes the pixels as they are, 0 to 255."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model((x - MIDDLE) / SPREAD)


class Pair(nn.Module):
    """Two networks that read the same input; the mean of their logits."""

    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.one(x) + self.other(x)) / 2


@cache
def _together() -> dict[str, tuple[nn.Module, Network]]:
    lite0, (_, one), (_, other) = networks.network(LITE0), networks.trained(0), networks.trained(1)
    samples = networks.network(DIGITS)
    pixels = [[x * SPREAD + MIDDLE for x in part] for part in (lite0.calibration, lite0.held_out)]
    return {
        "normalizing": (Normalizing(lite0.model), Network(lite0.model, *pixels)),
        "pair": (Pair(one, other), samples),
        "second": (other, samples),
    }


@torch.no_grad()
def together(name: str, folder: Path) -> Build:
    """What takes the place of two steps: "normalizing" and "pair"; and the "second" of the pair alone."""
    model, chosen = _together()[name]
    model.eval()
    wanted = torch.cat([model(x) for x in chosen.held_out])
    made = qcompile.compile(model, calibration=chosen.calibration, strict=True, threads=1)
    return _written(made, chosen, wanted, Path(folder, f"{name}.qcm"), {})


@torch.no_grad()
def _written(
    model: qcompile.CompiledModel, chosen: Network, wanted: torch.Tensor, path: Path, operators: dict[str, int]
) -> Build:
    model.save(path)
    given = torch.cat([model(x) for x in chosen.held_out])
    return Build(path, _members(path), operators, kernels(model), bytes_moved(model.program), *fidelity(wanted, given))


def kernels(model: qcompile.CompiledModel) -> int:
    """How many a call runs: those of the lowered network whose results are read."""
    lowered = lower(model.program, get("native"), emitters_for(get("native")))
    main = relax.transform.DeadCodeElimination(["main"])(lowered.module)["main"]
    bindings = [binding for block in main.body.blocks for binding in block.bindings]
    calls = [binding.value for binding in bindings if isinstance(binding.value, relax.Call)]
    return sum(call.op == CALL for call in calls)


def _members(path: Path) -> dict[str, int]:
    found = {"weights": 0, "code": 0, "rest": 0}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            suffix = {"constants.safetensors": "weights", "library.so": "code"}
            found[suffix.get(Path(member.filename).name, "rest")] += member.compress_size
    found["rest"] += path.stat().st_size - sum(found.values())
    return found


def original_job(name: str, folder: Path) -> dict[str, Job]:
    """The job of `original`."""
    return {key(name, ORIGINAL): Job(original, (name, folder))}


class Original(NamedTuple):
    """The float model as others run it.

    Attributes:
        exported: for PyTorch itself.
        x: a file with one input, and `pixels` with one that is not normalized, for photographs.
        inductor: compiled by PyTorch's inductor; or why it is not.
        facts: "parameters", "macs", "file" (bytes), and "activations" and "constants" that its operators move.
    """

    exported: Path
    x: Path
    pixels: Path
    inductor: Path | str
    facts: dict[str, int]


def original(name: str, folder: Path) -> Original:
    chosen, place = networks.network(name), Path(folder, name)
    place.mkdir()
    source, x, pixels = Source(place), place / "x.npy", place / "pixels.npy"
    example = chosen.held_out[0].clone()
    np.save(x, example.numpy())
    np.save(pixels, example.numpy() * np.float32(SPREAD) + np.float32(MIDDLE))
    with torch.no_grad():
        torch.export.save(torch.export.export(chosen.model, (example,), strict=True), source.exported)
    activations, constants = bytes_moved(capture(chosen.model, (example,)))
    facts: dict[str, int] = {
        "parameters": sum(p.numel() for p in chosen.model.parameters()),
        "macs": multiply_accumulates(chosen.model, example),
        "file": file_size(chosen.model),
        "activations": activations,
        "constants": constants,
    }
    return Original(source.exported, x, pixels, _inductor(name, source), facts)


def _inductor(name: str, source: Source) -> Path | str:
    engine: Any = ENGINES["inductor float"]
    objection = engine.objection(name)
    if objection is None:
        try:
            return engine.prepare(source)
        except Exception as error:  # noqa: BLE001  (whatever a compiler fails with is shown)
            objection = f"{type(error).__name__}: {error}".splitlines()[0]
    return objection
