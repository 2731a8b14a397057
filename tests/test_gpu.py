"""A GPU is asked for only where code needs one, and what is missing is said."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qcompile import cuda, device

_DRIVER = """
static int version = {version}, count = {count}, initialized = {initialized}, major = {major}, minor = {minor};
int cuDriverGetVersion(int *found) {{ *found = version; return 0; }}
int cuInit(unsigned flags) {{ return initialized; }}
int cuDeviceGetCount(int *found) {{ *found = count; return 0; }}
int cuDeviceGetAttribute(int *found, int attribute, int device) {{
    if (device != 0 || (attribute != 75 && attribute != 76)) return 1;
    *found = attribute == 75 ? major : minor;
    return 0;
}}
int cuDeviceGetName(char *name, int bytes, int device) {{
    const char text[] = "NVIDIA Test 1000";
    if (device != 0 || bytes < sizeof text) return 1;
    for (int i = 0; i < sizeof text; i++) name[i] = text[i];
    return 0;
}}
"""
GPU = {"version": 13000, "count": 1, "initialized": 0, "major": 7, "minor": 5}


def test_a_feature_of_a_gpu_is_a_compute_capability() -> None:
    assert device.capability("sm_61") == (6, 1)
    assert device.capability("sm_120") == (12, 0)
    assert [device.capability(text) for text in ("avx2", "sm_", "sm_8", "sm_x0", "sm_90a", "80")] == [None] * 6


def _asked(folder: Path, features: str, **driver: int) -> str:
    """What `lacks` answers where the driver says so; where none is given, there is no driver."""
    library = folder / "libcuda.so.1"
    if driver:
        if shutil.which("gcc") is None:
            pytest.skip("needs gcc")
        (folder / "driver.c").write_text(_DRIVER.format(**{**GPU, **driver}))
        command = ["gcc", "-shared", "-fPIC", "-o", str(library), str(folder / "driver.c")]
        subprocess.run(command, check=True)
    else:
        library.write_bytes(b"no library")
    code = f"""
from qcompile import device
print(device.lacks(device.machine()[0], {features.split()!r}), "|", device.gpu())
assert device.gpu_name() == ("" if device.gpu() is None else "NVIDIA Test 1000")
"""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("driver", "features", "answer"),
    [
        ({"major": 7}, "sm_75", "| (7, 5)"),
        ({"major": 7}, "sm_61", "| (7, 5)"),
        ({"major": 12, "minor": 0}, "sm_90", "| (12, 0)"),
        ({"major": 7}, "sm_80", "has a GPU that is sm_75, not sm_80 or later | (7, 5)"),
        ({"major": 8, "minor": 6}, "sm_75 sm_89", "has a GPU that is sm_86, not sm_89 or later | (8, 6)"),
        ({"major": 7}, "sm_80 no-such-feature", "lacks no-such-feature | (7, 5)"),
        ({"major": 9}, "sm_90a", "lacks sm_90a | (9, 5)"),
        (
            {"version": 12040},
            "sm_75",
            "has an NVIDIA driver for CUDA 12.4, and needs one for CUDA 13.0 or later | None",
        ),
        ({"count": 0}, "sm_75", "has no NVIDIA GPU | None"),
        ({"initialized": 100}, "sm_75", "has no NVIDIA GPU | None"),
        ({"initialized": 803}, "sm_75", "has an NVIDIA driver that does not start (error 803 of CUDA) | None"),
    ],
)
def test_what_a_gpu_lacks_is_said(driver: dict[str, int], features: str, answer: str, tmp_path: Path) -> None:
    assert _asked(tmp_path, features, **driver) == answer


def test_without_a_driver_the_reason_is_said(tmp_path: Path) -> None:
    assert _asked(tmp_path, "sm_80") == "has no NVIDIA driver (libcuda.so.1 cannot be loaded) | None"


def test_code_for_a_processor_does_not_start_the_driver(tmp_path: Path) -> None:
    """Whose start would end this process."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    (tmp_path / "driver.c").write_text("#include <stdlib.h>\n__attribute__((constructor)) void start() { abort(); }")
    command = ["gcc", "-shared", "-fPIC", "-o", str(tmp_path / "libcuda.so.1"), str(tmp_path / "driver.c")]
    subprocess.run(command, check=True)
    code = "from qcompile.device import lacks, machine\nprint(lacks(*machine()), lacks(machine()[0], ['{}']))"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}

    def run(feature: str) -> int:
        return subprocess.run([sys.executable, "-c", code.format(feature)], env=environment, check=False).returncode

    assert run("avx9000") == 0
    assert run("sm_75") < 0


def test_cudas_library_is_found_in_nvidias_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no __init__.py, and several may share a folder."""
    for place in ("one/nvidia/cublas/lib", "two/nvidia/cu13/lib"):
        (tmp_path / place).mkdir(parents=True)
        monkeypatch.syspath_prepend(tmp_path / place.split("/")[0])
    library = tmp_path / "two/nvidia/cu13/lib/libcudart.so.13"
    assert str(library) not in list(cuda.installed(library.name))
    library.touch()
    assert str(library) in list(cuda.installed(library.name))
