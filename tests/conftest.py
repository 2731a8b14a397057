"""Fixtures that tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Workers of pytest-xdist share the cores: threads of PyTorch beyond them would wait for each other. Before its import.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import arm
import gpu_machine
import gpu_table
import pytest

from qcompile import device


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


@pytest.fixture(scope="session")
def gpu() -> Iterator[gpu_machine.GpuMachine]:
    """A GPU, emulated or real, or a skip that says why there is none."""
    if reason := gpu_machine.unavailable():
        pytest.skip(f"code for GPUs cannot run here: {reason}")
    with gpu_machine.GpuMachine() as machine:
        yield machine


def pytest_sessionstart() -> None:
    """Where a real GPU was asked for and there is none, nothing passes by being skipped."""
    if gpu_machine.REAL and device.gpu() is None:
        pytest.exit(f"QCOMPILE_TEST_GPU=1, and this machine {device.lacks('x86_64', ['sm_61'])}", returncode=1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("cuda"):
            gpu_table.name(item)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """On a real GPU, what each target of it got right."""
    reports = [report for found in terminalreporter.stats.values() for report in found if hasattr(report, "when")]
    if gpu_machine.REAL and (text := gpu_table.table(reports)):
        terminalreporter.write(f"\n{text}")
