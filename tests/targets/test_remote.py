"""Tuning through an RPC tracker: the device is a server process on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from execution import native_vectors, skip_unless_runnable
from passing import randomize
from torch import nn

import qcompile
from qcompile.errors import ConfigError
from qcompile.quantizer import quantize
from qcompile.targets import get, tune
from qcompile.targets.database import Database
from qcompile.tuning import Tuning


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """KEY@HOST:PORT of a tracker to which one server registered, whose pool has one thread."""
    from tvm.rpc.server import Server
    from tvm.rpc.tracker import Tracker

    port = 9300 + os.getpid() % 500
    tracker = Tracker("127.0.0.1", port, port + 1)
    with monkeypatch.context() as patch:
        patch.setenv("TVM_NUM_THREADS", "1")
        server = Server("127.0.0.1", port + 500, port + 501, tracker_addr=("127.0.0.1", tracker.port), key="board")
    try:
        yield f"board@127.0.0.1:{tracker.port}"
    finally:
        server.terminate()
        tracker.terminate()


def test_kernels_are_measured_on_the_device(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_unless_runnable(native_vectors())
    monkeypatch.setattr(tune, "MOST_CANDIDATES", 3)
    model, images = randomize(nn.Conv2d(3, 24, 3, padding=1).eval()), [torch.randn(1, 3, 12, 12)]
    tuning = Tuning(tmp_path / "tuned.sqlite", device=device)
    compiled = qcompile.compile(model, native_vectors(), calibration=images, tuning=tuning)
    (entry,) = Database(tmp_path / "tuned.sqlite").entries()
    assert entry.processor == f"board at {device.partition('@')[2]}"
    assert entry.microseconds > 0
    assert entry.threads == 1  # all that the device has, whatever there are here
    assert torch.equal(compiled(images[0]), compiled.reference(images[0]))
    program = quantize(model, calibration=images).program
    with pytest.raises(ConfigError, match="2 threads were asked for, and TVM's pool has 1"):
        tune.tune(program, get(native_vectors()), tuning, threads=2)
