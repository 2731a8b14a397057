"""Tuning: what cannot be done is said before any work, with the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from execution import native_vectors, skip_unless_runnable
from passing import randomize
from torch import Tensor, nn

import qcompile
from qcompile.errors import ConfigError, DeviceError
from qcompile.executable import pool_size
from qcompile.quantizer import quantize
from qcompile.targets import get, tune
from qcompile.tuning import Tuning

NATIVE = native_vectors()


@pytest.fixture(autouse=True)
def runnable() -> None:
    skip_unless_runnable(NATIVE)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return randomize(nn.Conv2d(3, 24, 3).eval())


def images() -> list[Tensor]:
    return [torch.randn(1, 3, 18, 18) for _ in range(2)]


def unread() -> Iterator[Tensor]:
    raise AssertionError("it was read")
    yield


def test_tile_registers_are_not_measured_through_rpc(model: nn.Module, tmp_path: Path) -> None:
    program = quantize(model, calibration=images()).program
    tuning = Tuning(tmp_path / "tuned.sqlite", device="pi@127.0.0.1:9")
    with pytest.raises(DeviceError, match=r"x86-amx cannot be measured through RPC(.|\n)*on that machine itself"):
        tune.tune(program, get("x86-amx"), tuning)


def test_a_target_of_another_machine_needs_a_device(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"cannot be measured here(.|\n)*KEY@HOST:PORT"):
        qcompile.compile(model, "arm64-neon", calibration=unread(), tuning=tmp_path / "tuned.sqlite")
    assert not (tmp_path / "tuned.sqlite").exists()


def test_a_number_of_threads_that_is_none_is_refused(model: nn.Module, tmp_path: Path) -> None:
    program = quantize(model, calibration=images()).program
    with pytest.raises(ConfigError, match="threads is 0"):
        tune.tune(program, get(NATIVE), Tuning(tmp_path / "tuned.sqlite"), threads=0)
    assert not (tmp_path / "tuned.sqlite").exists()


@pytest.mark.parametrize("tuned", [True, False])
def test_more_threads_than_there_are_are_refused_before_any_work(model: nn.Module, tmp_path: Path, tuned: bool) -> None:
    path, many = tmp_path / "tuned.sqlite", pool_size() + 1
    with pytest.raises(ConfigError, match=f"{many} threads were asked for, and TVM's pool has {many - 1}"):
        qcompile.compile(model, NATIVE, calibration=unread(), tuning=path if tuned else None, threads=many)
    program = quantize(model, calibration=images()).program
    with pytest.raises(ConfigError, match=f"{many} threads were asked for"):
        tune.tune(program, get(NATIVE), Tuning(path), threads=many)
    assert not path.exists()


def test_another_machine_may_have_more_threads(model: nn.Module) -> None:
    assert qcompile.compile(model, "arm64-neon", calibration=images(), threads=1000).target == "arm64-neon"


def test_a_tracker_that_does_not_answer_is_an_error(model: nn.Module, tmp_path: Path) -> None:
    tuning = Tuning(tmp_path / "tuned.sqlite", device="pi@127.0.0.1:9")
    with pytest.raises(DeviceError, match=r"no RPC tracker answers(.|\n)*127.0.0.1:9"):
        qcompile.compile(model, NATIVE, calibration=unread(), tuning=tuning)


@pytest.mark.parametrize("device", ["pi@localhost", "pi@localhost:99999", 5])
def test_an_address_without_a_port_is_refused(device: Any) -> None:
    with pytest.raises(ConfigError, match="KEY@HOST:PORT"):
        Tuning("tuned.sqlite", device=device)


def test_a_device_without_a_database_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to measure"):
        Tuning(device="pi@localhost:9190")


def test_what_is_no_path_is_refused(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="the tuning database is True"):
        qcompile.compile(model, NATIVE, calibration=unread(), tuning=True)  # type: ignore[arg-type]


def test_a_database_that_is_only_read_must_be_there(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such tuning database"):
        qcompile.compile(model, NATIVE, calibration=unread(), tuning=Tuning(tmp_path / "absent", measure=False))


def test_a_file_of_another_kind_is_refused_before_any_work(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("no database")
    with pytest.raises(ConfigError, match="cannot be used"):
        qcompile.compile(model, NATIVE, calibration=unread(), tuning=tmp_path / "notes")
