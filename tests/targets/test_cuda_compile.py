"""Which compiler makes the code of a GPU, and what is said where there is none."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from execution import operator, program_of

from qcompile.errors import BuildError
from qcompile.ops.linear import LINEAR
from qcompile.targets import get
from qcompile.targets.build import build
from qcompile.targets.cuda import compile as cuda
from qcompile.targets.cuda import nvrtc
from qcompile.targets.cuda.launch import Entry
from qcompile.targets.nvidia import SM_61, SM_80, Gpu

FILL = Entry("move.cuh", "fill", ("int8",), 0, "Fill", ("int64_t", "int"), 256)
FATBIN = b"\x50\xed\x55\xba"


@pytest.fixture
def no_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_tool", lambda name: None)


def needs_nvrtc(gpu: Gpu) -> None:
    if nvrtc.library_for(gpu.capability) is None:
        pytest.skip("not installed: nvidia-cuda-nvrtc-cu12")


@pytest.mark.parametrize("gpu", [SM_61, SM_80], ids=lambda gpu: gpu.architecture)
@pytest.mark.usefixtures("no_toolkit")
def test_without_a_toolkit_a_driver_gets_ptx(gpu: Gpu) -> None:
    needs_nvrtc(gpu)
    code = cuda.compiled([FILL], gpu)
    assert code.startswith(b"//")
    assert code.endswith(b"\0")  # where drivers stop to read
    assert f".target {gpu.architecture}\n".encode() in code
    assert b".entry qcompile_fill(" in code


def test_with_a_toolkit_it_gets_machine_code_too() -> None:
    """Also for a GPU that the toolkit's own compiler does not know."""
    if cuda._tool("fatbinary") is None:
        pytest.skip("not installed: the CUDA toolkit")
    needs_nvrtc(SM_61)
    assert cuda.compiled([FILL], SM_61).startswith(FATBIN)
    assert cuda.compiled([FILL], SM_80).startswith(FATBIN)


@pytest.mark.usefixtures("no_toolkit")
def test_what_the_compiler_refuses_is_said_in_its_own_words() -> None:
    needs_nvrtc(SM_80)
    with pytest.raises(BuildError, match=r"NVRTC failed(.|\n)*compute_80(.|\n)*no member \"unknown\""):
        cuda.compiled([replace(FILL, function="unknown")], SM_80)


@pytest.mark.parametrize("broken", ["nvcc", "gcc"])
def test_an_nvcc_that_does_not_run_is_not_used(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_nvrtc(SM_80)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho compute_80\nexit 1\n" if broken == "nvcc" else "#!/bin/sh\necho compute_80\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(cuda, "_tool", lambda name: str(nvcc) if name == "nvcc" else None)
    if broken == "gcc":
        monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    assert cuda.compiled([FILL], SM_80).startswith(b"//")  # NVRTC's


@pytest.mark.usefixtures("no_toolkit")
def test_that_there_is_no_compiler_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_libraries", lambda: ())
    steps: list[str] = []
    program, _ = program_of([(operator(LINEAR), next(iter(LINEAR.samples(torch.Generator()))))])
    with pytest.raises(BuildError) as caught:
        build(program, get("cuda-sm_61"), steps.append)
    assert steps == []
    assert "no compiler for sm_61" in str(caught.value)
    assert "nvcc" in str(caught.value)
    assert "libnvrtc.so.12" in str(caught.value)
    assert "pip install nvidia-cuda-nvrtc-cu12" in str(caught.value)
