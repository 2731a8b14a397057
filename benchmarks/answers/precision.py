"""What quantization does to precision: by preset, and by bits of a weight."""

from __future__ import annotations

from typing import Any

import torch

import qcompile
from benchmarks.answers import networks
from benchmarks.answers.jobs import Job
from benchmarks.answers.networks import DIGITS, LITE0
from benchmarks.fidelity import fidelity
from benchmarks.figures import DECIBELS, PER_CENT, POINTS, TEXT, Figures, mean, span, trainings
from examples import digits

BITS = (8, 6, 4, 3, 2)
PRESETS = (None, "fast", "balanced", "best")
COMPARED = (None, "balanced")  # with fewer bits
FLOAT, ENOUGH = "float", 0.5  # points of accuracy that nobody misses
SETTINGS = (*((preset, 8) for preset in PRESETS), *((preset, bits) for preset in COMPARED for bits in BITS[1:]))


def jobs(options: Any) -> dict[str, Job]:
    found = {_lite0(*setting): Job(lite0, setting) for setting in SETTINGS}
    return found | {f"digits, seed {seed}": Job(on_digits, (seed,)) for seed in options.seeds}


def _lite0(preset: str | None, bits: int) -> str:
    return f"{LITE0}, {bits} bits, {preset or 'no preset'}"


@torch.no_grad()
def lite0(preset: str | None, bits: int) -> tuple[float, float]:
    """(SQNR, agreement) of the machine code."""
    chosen = networks.network(LITE0)
    config = qcompile.QuantConfig(preset=preset, weight_bits=bits)
    model = qcompile.compile(chosen.model, calibration=chosen.calibration, config=config, strict=True, threads=1)
    return fidelity(networks.float_answers(LITE0), torch.cat([model(x) for x in chosen.held_out]))


def on_digits(seed: int) -> dict[Any, float]:
    """Setting -> accuracy; of the integer graph, which gives the bits that the machine code gives."""
    data, model = networks.trained(seed)
    held_out = data.held_out_images, data.held_out_labels
    found: dict[Any, float] = {FLOAT: digits.accuracy(model, *held_out)}
    for preset, bits in SETTINGS:
        config = qcompile.QuantConfig(preset=preset, weight_bits=bits)
        quantized = qcompile.quantize(model, **digits.inputs(data.images), config=config)
        found[preset, bits] = digits.accuracy(quantized, *held_out)
    return found


def figures(found: dict[str, Any], options: Any) -> dict[str, Figures]:
    every = [found[f"digits, seed {seed}"] for seed in options.seeds]
    accuracy = {key: mean(one[key] for one in every) for key in every[0]}
    lost = lambda setting: 100 * (accuracy[setting] - accuracy[FLOAT])  # noqa: E731
    on_lite0 = {setting: found[_lite0(*setting)] for setting in SETTINGS}
    presets = [[preset or "none", *on_lite0[preset, 8], accuracy[preset, 8], lost((preset, 8))] for preset in PRESETS]
    rows: list[list[Any]] = []
    for bits in BITS:
        cells = [(accuracy[preset, bits], lost((preset, bits)), *on_lite0[preset, bits]) for preset in COMPARED]
        rows += [[bits, preset or "none", *part] for preset, part in zip(COMPARED, cells, strict=True)]
    columns = {f"{LITE0}, SQNR": DECIBELS, "same top label": PER_CENT}
    on = {f"{DIGITS}, accuracy": PER_CENT, "points to float": POINTS}
    notes = [f"{DIGITS}: {trainings(options.seeds)}. {LITE0}: {networks.HELD_OUT} crops."]
    return {
        "presets": Figures({"preset": TEXT, **columns, **on}, presets, notes),
        "bits": Figures({"bits of a weight": TEXT, "preset": TEXT, **on, **columns}, rows, notes),
    }


def answer(figures: dict[str, Figures]) -> str:
    presets, bits = figures["presets"], figures["bits"]
    same = [presets.at("same top label", preset) for preset in ("none", "balanced")]
    lost = presets.column("points to float")
    fewest = {preset or "none": _fewest(bits, preset or "none") for preset in COMPARED}
    return (
        f"With 8 bits the accuracy on digits changes by {span(lost, POINTS)} points, and of crops of photographs "
        f"{same[0]:.1%} keep their top label without a preset, {same[1]:.1%} with `balanced`. On digits the loss stays "
        f"within {ENOUGH} points {fewest['none']} without a preset, and {fewest['balanced']} with `balanced`."
    )


def _fewest(bits: Figures, preset: str) -> str:
    """Down to how many bits nothing is missed, without a gap above."""
    last = None
    for count in BITS:
        if bits.at("points to float", count, preset) < -ENOUGH:
            break
        last = count
    return "with no number of bits" if last is None else f"down to {last} bits"
