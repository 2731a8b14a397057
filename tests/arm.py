"""An ARM machine for tests: qemu, the folder that arm_sysroot.py builds, and one lasting process in it.

Starting Python with NumPy takes seconds under qemu, so `ArmMachine` starts it once and then sends it
artifacts and inputs; `run` is one fresh process, as a user would start it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import far_worker
from arm_sysroot import READY, ROOT, SYSROOT, key
from far import FarMachine


def unavailable() -> str:
    """Why ARM code cannot be run here; "" when it can."""
    missing = [tool for tool in ("qemu-aarch64", "aarch64-linux-gnu-ld") if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (`make arm-tools`)"
    if not READY.exists() or READY.read_text() != key():
        return "no AArch64 Python (`python tests/arm_sysroot.py`)"
    return ""


def _command(arguments: Sequence[str], cpu: str) -> tuple[list[str], dict[str, str]]:
    command = ["qemu-aarch64", "-cpu", cpu, "-L", str(SYSROOT), str(SYSROOT / "usr/bin/python"), *arguments]
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": f"{ROOT}:{SYSROOT / 'site'}",
        "TVM_NUM_THREADS": "2",
        "OPENBLAS_NUM_THREADS": "1",
    }
    return command, environment


def run(*arguments: str, cpu: str = "max") -> subprocess.CompletedProcess[str]:
    """Run `python arguments...` on an ARM processor; "cortex-a72" has no dot product."""
    command, environment = _command(arguments, cpu)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


class ArmMachine(FarMachine):
    """A process on an ARM processor that runs artifacts."""

    def __init__(self, cpu: str = "max") -> None:
        super().__init__(*_command([str(Path(far_worker.__file__))], cpu))
