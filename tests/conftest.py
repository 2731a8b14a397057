"""Fixtures that tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Workers of pytest-xdist share the cores: threads of PyTorch beyond them would wait for each other. Before its import.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))

import arm  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(scope="session")
def arm_machine() -> Iterator[arm.ArmMachine]:
    """An ARM processor with every feature that qemu knows, or a skip that says why there is none.

    Where QCOMPILE_REQUIRE_ARM is set, as in continuous integration, the skip is a failure.
    """
    if reason := arm.unavailable():
        refuse = pytest.fail if os.environ.get("QCOMPILE_REQUIRE_ARM") else pytest.skip
        refuse(f"ARM code cannot run here: {reason}")
    with arm.ArmMachine() as machine:
        yield machine
