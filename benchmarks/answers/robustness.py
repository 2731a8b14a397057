"""Whether int8 is as robust as float where inputs change: `qcompile.evaluate(robustness=True)`."""

from __future__ import annotations

from typing import Any

import qcompile
from benchmarks.answers import networks
from benchmarks.answers.jobs import Job
from benchmarks.answers.networks import DIGITS, LITE0
from benchmarks.figures import DECIBELS, PER_CENT, POINTS, TEXT, Figures, mean, span, trainings
from examples import digits

PRESET = "balanced"
CROPS = 60
NONE = "none"
Measured = dict[str, dict[str, float]]  # shift -> measure -> value


def jobs(options: Any) -> dict[str, Job]:
    found = {f"robustness, digits, seed {seed}": Job(on_digits, (seed,)) for seed in options.seeds}
    return {f"robustness, {LITE0}": Job(lite0), **found}


def on_digits(seed: int) -> Measured:
    data, model = networks.trained(seed)
    compiled = digits.compile(model, data.images, qcompile.QuantConfig(preset=PRESET))
    held_out = [(data.held_out_images, data.held_out_labels)]
    return _measured(qcompile.evaluate(compiled, model, held_out, labels=True, robustness=True, blocks=0))


def lite0() -> Measured:
    chosen = networks.network(LITE0)
    config = qcompile.QuantConfig(preset=PRESET)
    compiled = qcompile.compile(chosen.model, calibration=chosen.calibration, config=config, strict=True, threads=1)
    return _measured(qcompile.evaluate(compiled, chosen.model, chosen.held_out[:CROPS], robustness=True, blocks=0))


def _measured(found: qcompile.Evaluation) -> Measured:
    result: Measured = {}
    for shift, quality in {NONE: found.quality, **found.shifts}.items():
        (output,) = quality.outputs
        assert output.sqnr is not None
        assert output.agreement is not None
        result[shift] = {"sqnr": output.sqnr, "same": output.agreement}
        if quality.float_scores is not None and quality.int8_scores is not None:
            result[shift] |= {"float": quality.float_scores.accuracy, "int8": quality.int8_scores.accuracy}
    return result


def figures(found: dict[str, Any], options: Any) -> dict[str, Figures]:
    crops = found[f"robustness, {LITE0}"]
    every = [found[f"robustness, digits, seed {seed}"] for seed in options.seeds]
    rows: list[list[Any]] = []
    for shift, on_crops in crops.items():
        in_float, int8 = (mean(one[shift][side] for one in every) for side in ("float", "int8"))
        rows.append([shift, in_float, int8, 100 * (int8 - in_float), on_crops["sqnr"], on_crops["same"]])
    columns = {
        "shift": TEXT,
        f"{DIGITS}, float accuracy": PER_CENT,
        "int8 accuracy": PER_CENT,
        "points": POINTS,
        f"{LITE0}, SQNR": DECIBELS,
        "same top label": PER_CENT,
    }
    notes = [f"{DIGITS}: {trainings(options.seeds)}. {LITE0}: {CROPS} crops."]
    return {"robustness": Figures(columns, rows, notes)}


def answer(figures: dict[str, Figures]) -> str:
    table = figures["robustness"]
    shifts = [row[0] for row in table.rows if row[0] != NONE]
    worst = min(shifts, key=lambda shift: table.at("int8 accuracy", shift))
    points = span([table.at("points", shift) for shift in shifts], POINTS)
    same = [table.at("same top label", shift) for shift in shifts]
    return (
        f"Where inputs are shifted, the accuracy of int8 on digits differs from float's by {points} points. Where int8 "
        f"has the least, with {worst}, it has {table.at('int8 accuracy', worst):.1%}, and float has "
        f"{table.at(f'{DIGITS}, float accuracy', worst):.1%}. On photographs the top label is the float network's for "
        f"{span(same, PER_CENT)} of the shifted crops, and for {table.at('same top label', NONE):.1%} of the others."
    )
