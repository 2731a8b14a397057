"""The sections of `benchmarks.answers` that build and time, from their jobs to the page, on tiny networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.answers import builds, networks, speed
from benchmarks.answers.__main__ import Options
from benchmarks.answers.apart import PIPELINES
from benchmarks.answers.networks import DIGITS, LITE0, MLP, NAMES, Network
from benchmarks.answers.page import SECTIONS, Answers
from examples import digits

MEASURED = ("speed", "storage", "complexity", "fusion")
pytestmark = pytest.mark.filterwarnings("ignore")


def tiny(name: str) -> Network:
    shape = (1, 64) if name == MLP else (1, 1, 8, 8)
    inputs = list(torch.randn(32, *shape, generator=torch.Generator().manual_seed(0)))
    perceptron = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    model = perceptron if name == MLP else digits.network(NAMES.index(name))
    return Network(model.eval(), inputs[:16], inputs[16:])


@pytest.mark.slow
def test_what_is_built_and_timed_comes_to_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {name: tiny(name) for name in (*NAMES, MLP)}
    answers = {name: torch.cat([one.model(x) for x in one.held_out]).detach() for name, one in made.items()}
    monkeypatch.setattr(networks, "network", made.__getitem__)
    monkeypatch.setattr(networks, "float_answers", answers.__getitem__)
    monkeypatch.setattr(networks, "trained", lambda seed: (None, digits.network(seed).eval()))
    monkeypatch.setattr(builds, "_inductor", lambda name, source: "there is no compiler")
    monkeypatch.setattr(speed, "THREADS", [1])
    options = Options((0,), tmp_path, {"rounds": 1, "max_rounds": 2, "seconds": 0.01})

    jobs = {key: job for name in MEASURED for key, job in SECTIONS[name].jobs(options).items()}
    found = {key: job.call(*job.arguments) for key, job in jobs.items()}
    for name in ("speed", "fusion"):
        found |= SECTIONS[name].timed(found, options)
    figures = {name: SECTIONS[name].figures(found, options) for name in MEASURED}
    blocks = Answers({}, {}, figures).blocks()

    assert f"{DIGITS}, inductor float: there is no compiler" in blocks["figures: speed"]
    joined, apart, norms = (figures["fusion"]["fusion"].at("kernels", LITE0, form) for form in PIPELINES)
    assert joined < apart < norms
    operators = figures["complexity"]["operators"]
    assert operators.at("as captured", DIGITS) - operators.at("fold_batchnorm", DIGITS) == 5  # its batch norms
    for row in figures["storage"]["storage"].rows:
        assert sum(row[5:]) == pytest.approx(row[3])
    files = figures["storage"]["storage"].at
    assert files("of it weights", MLP, "int4 weights alone") < files("of it weights", MLP, "int8 weights alone")
