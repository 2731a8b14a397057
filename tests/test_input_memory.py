"""Where the arrays of a call lie: anywhere, just before memory that may not be read, where nothing may be written."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from direct import before_nothing
from execution import CPUS, skip_unless_runnable
from torch import Tensor, nn

import qcompile
from qcompile.device import machine
from qcompile.executable import Executable
from qcompile.targets import get

RNG = np.random.default_rng(0)
FEW = {"pixels": (1, 3, 7, 9), "maps": (2, 5, 6, 6), "rows": (3, 7), "steps": (1, 5, 19), "real": (2, 33)}


class Several(nn.Module):
    """An input of every kind that is quantized as it lies, and one that is computed in float."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels, self.maps = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(5, 8, 3)
        self.rows, self.steps, self.real = nn.Linear(7, 5), nn.Linear(19, 6), nn.Linear(33, 4)

    def forward(self, pixels: Tensor, maps: Tensor, rows: Tensor, steps: Tensor, real: Tensor) -> tuple[Tensor, ...]:
        real = self.real(torch.cumsum(real, 1))
        return self.pixels(pixels), self.maps(maps), self.rows(rows), self.steps(steps), real


def random() -> dict[str, np.ndarray]:
    return {name: RNG.standard_normal(shape, np.float32) for name, shape in FEW.items()}


@pytest.fixture(scope="module", params=[name for name in CPUS if get(name).machine == machine()[0]])
def compiled(request: pytest.FixtureRequest) -> qcompile.CompiledModel:
    skip_unless_runnable(request.param)
    torch.manual_seed(0)
    samples = [{name: torch.from_numpy(x) for name, x in random().items()} for _ in range(4)]
    return qcompile.compile(Several().eval(), request.param, calibration=samples)


def shifted(x: np.ndarray, by: int) -> np.ndarray:
    """A copy that begins `by` bytes after a line of memory."""
    memory = RNG.integers(0, 256, x.nbytes + 128, dtype=np.uint8)
    begin = -memory.ctypes.data % 64 + by
    copy = memory[begin : begin + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def read_only(x: np.ndarray) -> np.ndarray:
    """A copy in memory of the process that may not be written."""
    return np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape)


PLACES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    **{f"{by} bytes on": partial(shifted, by=by) for by in (0, 1, 2, 4, 16, 60)},
    "before nothing": lambda x: before_nothing(x, RNG, x.itemsize).reshape(x.shape),
    "read only": read_only,
    "columns": np.asfortranarray,
}


@pytest.mark.parametrize("place", PLACES)
def test_where_an_input_lies_does_not_matter(compiled: qcompile.CompiledModel, place: str) -> None:
    inputs = random()
    for got, want in zip(
        compiled(**{name: PLACES[place](x) for name, x in inputs.items()}), compiled.reference(**inputs), strict=True
    ):
        np.testing.assert_array_equal(got, want, strict=True)


def test_what_is_quantized_is_used_where_it_lies_and_what_is_not_is_copied_unless_aligned(
    compiled: qcompile.CompiledModel,
) -> None:
    (variant,) = compiled.artifact.variants
    assert variant.alignments == (4, 4, 4, 4, 64)
    executable = Executable(variant.library, variant.constants.values(), None, variant.alignments)
    inputs = list(random().values())
    for by, used in ((0, 5), (4, 4), (16, 4), (2, 0)):
        placed = [shifted(x, by) for x in inputs]
        executable(placed)
        held = [slot.hold(x) == x.ctypes.data for slot, x in zip(executable._slots, placed, strict=True)]
        assert held == [True] * used + [False] * (5 - used)


def test_an_artifact_from_before_alignments_has_its_inputs_copied(compiled: qcompile.CompiledModel) -> None:
    (variant,) = compiled.artifact.variants
    older = Executable(variant.library, variant.constants.values())
    inputs = random()
    placed = [shifted(x, 4) for x in inputs.values()]
    for got, want in zip(older(placed), compiled.reference(**inputs), strict=True):
        np.testing.assert_array_equal(got, want, strict=True)
    assert all(slot.hold(x) != x.ctypes.data for slot, x in zip(older._slots, placed, strict=True))
