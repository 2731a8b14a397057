"""compiled.profile(): every kernel accounted for, with its multiply-accumulates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from execution import X86, skip_unless_runnable
from passing import images, network
from torch import nn
from torch.export import Dim

import qcompile
from qcompile.errors import ConfigError, DeviceError, InputError
from qcompile.profiling import Profile, ProfileRow
from qcompile.targets.cpu import peak

# (N, 3, 10, 10): the stem, the two convolutions of the block, the depthwise one, and the head.
MACS = 25 * 16 * 3 * 9 + 2 * 25 * 16 * 16 * 9 + 4 * 16 * 9 + 16 * 5


def test_every_kernel_has_a_time_and_every_convolution_its_multiplications() -> None:
    compiled = qcompile.compile(network(), calibration=images())
    found = compiled.profile(images()[0], seconds=0.05)
    assert sum(row.macs for row in found.rows) == MACS
    assert all(row.seconds > 0 for row in found.rows)
    assert found.seconds == pytest.approx(sum(row.seconds for row in found.rows))
    kernels = {row.kernel for row in compiled.coverage if row.kind == "integer"} - {"view", ""}
    assert all(any(row.kernel.startswith(kernel) for row in found.rows) for kernel in kernels)
    modules = [row.where for row in found.rows if row.macs]
    assert modules == ["0", "3.first.0", "3.second.0", "5", "9"]
    assert "conv" in str(found)


@pytest.mark.parametrize("target", X86)
def test_a_kernel_is_held_to_the_peak_of_the_instruction_that_it_uses(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_unless_runnable(target)
    monkeypatch.setattr(peak, "peak_rate", lambda *_, **__: 3e9)
    found = qcompile.compile(network(), target, calibration=images()).profile(images()[0], seconds=0.02)
    fastest = {"x86-amx": "tdpbusd", "x86-avx2": None}.get(target, "vpdpbusd")
    # Of the five layers one is depthwise, and the last has one pixel, too few for tiles.
    held = [row for row in found.rows if row.macs and fastest and fastest in row.kernel]
    assert len(held) == {"tdpbusd": 3, "vpdpbusd": 5, None: 0}[fastest]
    for row in found.rows:
        wanted = pytest.approx(row.macs / row.seconds / 3e9) if row in held else None
        assert row.share_of_peak == wanted


def test_a_dynamic_batch_is_counted_as_it_is_called() -> None:
    shapes = ({0: Dim("batch", max=8)},)
    compiled = qcompile.compile(network(), calibration=images(), dynamic_shapes=shapes)
    found = compiled.profile(torch.cat(images(5)), seconds=0.02)
    assert sum(row.macs for row in found.rows) == 5 * MACS


def test_float_operators_are_there_too() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)).eval()
    data = [torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    found = qcompile.compile(model, calibration=data).profile(data[0], seconds=0.02)
    assert any(row.op == "float" for row in found.rows)
    assert sum(row.macs for row in found.rows) == 4 * 8 * 8 + 4 * 8 * 4


def test_a_profile_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    qcompile.compile(network(), calibration=images()).profile(images()[0], seconds=0.02).plot(tmp_path / "p.svg")
    drawn = (tmp_path / "p.svg").read_text()
    assert drawn.lstrip().startswith("<?xml")


def test_only_what_runs_here_can_be_profiled() -> None:
    foreign = qcompile.compile(network(), "arm64-neon", calibration=images())
    with pytest.raises(DeviceError, match="was compiled for arm64-neon"):
        foreign.profile(images()[0])
    with pytest.raises(InputError, match="shape"):
        qcompile.compile(network(), calibration=images()).profile(torch.randn(1, 3, 9, 9))


def test_a_time_that_is_none_is_refused() -> None:
    compiled = qcompile.compile(network(), calibration=images())
    times: list[Any] = [0, -1.0, float("nan"), float("inf"), "1", None, True]
    for seconds in times:
        for measure in (compiled.profile, compiled.benchmark):
            with pytest.raises(ConfigError, match="seconds is") as caught:
                measure(images()[0], seconds=seconds)
            assert caught.value.remedy
    short: Any = np.float32(0.01)
    assert compiled.benchmark(images()[0], seconds=short).calls > 0


@pytest.mark.parametrize("path", ["nowhere/plot.png", "plot.unknown"])
def test_a_plot_that_cannot_be_written_says_why(path: str, tmp_path: Path) -> None:
    found = Profile((ProfileRow("conv2d", "0", "conv", 1e-6, 5, 0.5),), 1e9)
    with pytest.raises(ConfigError, match="cannot be written") as caught:
        found.plot(tmp_path / path)
    assert caught.value.where == str(tmp_path / path)
