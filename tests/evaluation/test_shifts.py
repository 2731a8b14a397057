"""Robustness: what each shift does to an input, and which make sense for which inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from passing import images, network, randn
from torch import Tensor, nn

import qcompile
from qcompile.errors import ConfigError, InputError
from qcompile.evaluation import shifts


def usual(*inputs: Tensor) -> dict[str, shifts.Shift]:
    return shifts.usual(inputs)[0]


X = randn(2, 3, 16, 12) * 4 + 1


def test_shifts_do_what_their_names_say() -> None:
    done = {name: shift(X) for name, shift in usual(X).items()}
    mean, spread = X.mean((1, 2, 3)), X.std((1, 2, 3))
    for name, y in done.items():
        assert y.shape == X.shape, name
        assert not torch.equal(y, X), name
    assert (done["noise"] - X).std((1, 2, 3)).numpy() == pytest.approx((0.1 * spread).numpy(), rel=0.2)
    assert (done["brighter"].mean((1, 2, 3)) - mean).numpy() == pytest.approx((0.5 * spread).numpy(), rel=1e-4)
    assert (done["darker"].mean((1, 2, 3)) - mean).numpy() == pytest.approx((-0.5 * spread).numpy(), rel=1e-4)
    assert done["more contrast"].std((1, 2, 3)).numpy() == pytest.approx((1.5 * spread).numpy(), rel=1e-4)
    assert done["less contrast"].mean((1, 2, 3)).numpy() == pytest.approx(mean.numpy(), rel=1e-4)
    differences = [(y[..., 1:] - y[..., :-1]).square().mean() for y in (X, done["blur"])]
    assert differences[1] < 0.2 * differences[0]


def test_blur_is_the_binomial_kernel() -> None:
    point = torch.zeros(1, 1, 9, 9)
    point[0, 0, 4, 4] = 256.0
    line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0])
    torch.testing.assert_close(shifts.blur(point)[0, 0, 2:7, 2:7], line[:, None] * line)
    assert torch.allclose(shifts.blur(torch.full((1, 3, 8, 8), 2.5)), torch.tensor(2.5))


def test_noise_is_the_same_each_time() -> None:
    assert torch.equal(shifts.noise(X), shifts.noise(X))


@pytest.mark.parametrize("shape", [(4, 16), (1, 5, 32, 32), (1, 3, 4, 32), (1, 3, 8, 16, 16), (7,)])
def test_inputs_that_are_no_images_get_noise_only(shape: tuple[int, ...]) -> None:
    found, why = shifts.usual((randn(*shape),))
    assert list(found) == ["noise"]
    assert why is not None
    assert str(shape) in why
    assert found["noise"](randn(*shape)).shape == shape


def test_whole_numbers_get_nothing() -> None:
    found, why = shifts.usual((torch.randint(0, 9, (1, 12)),))
    assert found == {}
    assert why is not None
    assert "real numbers" in why


def test_evaluation_under_shifts() -> None:
    model = network()
    compiled = qcompile.compile(model, calibration=images(16))
    data = images(6)
    found = qcompile.evaluate(compiled, model, data, robustness=True, blocks=0)
    assert list(found.shifts) == list(usual(data[0]))
    blurred = qcompile.evaluate(compiled, model, [shifts.blur(x) for x in data], blocks=0)
    assert found.shifts["blur"] == blurred.quality
    assert "less contrast" in str(found)
    halves = {"half": lambda x: x / 2, "in place": lambda x: x.mul_(0.5), "again": lambda x: x.mul_(0.5)}
    own = qcompile.evaluate(compiled, model, data, robustness=halves, blocks=0)
    half = qcompile.evaluate(compiled, model, [x / 2 for x in data], blocks=0).quality
    assert list(own.shifts.values()) == [half] * 3


def test_the_note_says_why_there_is_only_noise() -> None:
    model = nn.Sequential(nn.Linear(8, 5)).eval()
    data = [randn(4, 8, seed=i) for i in range(4)]
    found = qcompile.evaluate(qcompile.compile(model, calibration=data), model, data, robustness=True, blocks=0)
    assert list(found.shifts) == ["noise"]
    assert any("do not look like images" in note for note in found.notes)


def broken(x: Tensor) -> Tensor:
    raise ZeroDivisionError("no")


@pytest.mark.parametrize(
    ("robustness", "kind", "message"),
    [
        (3, ConfigError, "robustness is 3"),
        ({"x": "blur"}, ConfigError, "robustness is"),
        ({"crop": lambda x: x[..., 1:]}, InputError, r"'crop' made torch.float32 \(1, 3, 10, 9\)"),
        ({"wide": lambda x: x.double()}, InputError, "'wide' made torch.float64"),
        ({"none": lambda x: None}, InputError, "'none' made a NoneType"),
        ({"broken": broken}, InputError, "'broken' raised ZeroDivisionError: no"),
    ],
)
def test_wrong_shifts_are_named(robustness: Any, kind: type[Exception], message: str) -> None:
    model = network()
    compiled = qcompile.compile(model, calibration=images(16))
    with pytest.raises(kind, match=message):
        qcompile.evaluate(compiled, model, images(2), robustness=robustness, blocks=0)
