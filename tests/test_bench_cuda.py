"""The benchmark of GPUs, as far as it goes without one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_machine
import pytest
import torch
from networks import images, resnet18, settle
from torch._C._autograd import DeviceType

from benchmarks import cuda
from benchmarks.figures import Figures
from benchmarks.measured import PENDING, Measured, filled, marks
from qcompile import device
from qcompile.runtime import Model
from qcompile.targets import get

ROOT = Path(__file__).resolve().parent.parent
MARKS = "".join(
    f"<!-- measured: {name} -->\n<!-- end -->\n\n" for name in ("machine", "networks", "products", "launches")
)


def test_the_page_says_what_was_measured_or_that_nothing_was() -> None:
    page, json = (ROOT / "docs" / "cuda.md").read_text(), ROOT / "docs" / "cuda.json"
    found = Measured.load(json) if json.exists() else None
    assert marks(page) == marks(MARKS)
    assert page == filled(page, cuda.blocks(found)), "run `python -m benchmarks.cuda --page-only` and commit docs/"
    assert (PENDING in page) == (found is None)


def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> cuda.Bench:
    (tmp_path / "page.md").write_text(MARKS)
    write = cuda.write
    monkeypatch.setattr(cuda, "write", lambda found: write(found, tmp_path / "found.json", tmp_path / "page.md"))
    return cuda.Bench(get("cuda-sm_90"), "default", 3, Measured({"GPU": "a GPU"}, {"torch": "2"}, {}))


def test_every_row_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = bench(tmp_path, monkeypatch)
    run.add("networks", ["resnet50", 32, 1.2345, 2.5, 2.0311])
    run.add("launches", ["resnet50, batch 1, int8", 57, 3])

    def fails() -> None:
        raise RuntimeError("out of memory\nmore")

    run.attempt("networks", "resnet50, batch 256", fails)
    page = (tmp_path / "page.md").read_text()
    assert "| resnet50 | 32 | 1.23 | 2.5 | 2.03 x |" in page
    assert "| resnet50, batch 1, int8 | 57 | 3 |" in page
    assert "resnet50, batch 256: RuntimeError: out of memory\n" in page
    assert page.count(PENDING) == 1  # the products
    assert "a GPU" in page
    again = Measured.load(tmp_path / "found.json")
    assert filled(page, cuda.blocks(again)) == page
    assert isinstance(again.figures["networks"]["networks"], Figures)


def test_arguments_are_checked() -> None:
    options = cuda.parsed(["--models", "resnet50", "--batches", "1", "--sizes"])
    assert (list(options.models), options.batches, options.sizes) == (["resnet50"], [1], [])
    assert options.mode == "max-autotune"
    with pytest.raises(SystemExit):
        cuda.parsed(["--models", "nonsense"])


def test_blocks_take_turns_and_ratios_are_of_a_round() -> None:
    order: list[str] = []
    speed = {"a": iter([1.0, 2.0, 3.0]), "b": iter([2.0, 8.0, 6.0])}
    runs: dict[str, Any] = {"a": lambda: "a", "b": lambda: "b"}

    def clock(run: Any, calls: int) -> float:
        order.append(run())
        return next(speed[run()])

    times = cuda.interleave(runs, 3, clock)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert cuda.compared(times, "a", "b") == [2000.0, 6000.0, 2.0]


def test_kernels_and_launches_are_counted() -> None:
    def event(name: str, kind: Any) -> Any:
        return SimpleNamespace(name=name, device_type=kind)

    trace = [
        event("cudaLaunchKernel", DeviceType.CPU),
        event("cudaGraphLaunch", DeviceType.CPU),
        event("aten::add", DeviceType.CPU),
        *[event("qcompile_convolution", DeviceType.CUDA)] * 3,
        event("Memcpy DtoD", DeviceType.CUDA),
    ]
    assert cuda.counts(trace) == [3, 2]


def test_the_product_has_the_bits_of_its_reference_on_every_kind_of_machine(request: pytest.FixtureRequest) -> None:
    program = cuda.product(17, 64, 48)
    x = cuda.integers((17, 64), 127, torch.Generator().manual_seed(1))
    (want,) = program(x)
    assert len(want.unique()) > 50
    assert torch.equal(torch.from_numpy(Model(cuda.artifact(program, get("native"))).flat(x.numpy())[0]), want)
    with gpu_machine.compiling():
        held = cuda.artifact(program, get("cuda-sm_80"))
    far = request.getfixturevalue("gpu")
    on_gpu: Any = SimpleNamespace(flat=lambda *arrays: far.run(held, *arrays))
    assert cuda.wrong(on_gpu, program, x, by_reference=5) == 0
    off: Any = SimpleNamespace(flat=lambda *arrays: [array + (array == array[3, 5]) for array in on_gpu.flat(*arrays)])
    assert cuda.wrong(off, program, x, by_reference=5) > 0


@pytest.mark.slow
def test_a_network_is_prepared_as_it_is_timed() -> None:
    model = settle(resnet18(8), images(8, 32, seed=3))
    program = cuda.integer_network(model, images(4, 32, seed=4).split(1), get("cuda-sm_80"))
    with gpu_machine.compiling():
        held = cuda.artifact(program, get("cuda-sm_80"))
    (variant,) = held.variants
    assert variant.name == "cuda-sm_80"
    assert variant.device_code
    assert not held.golden
    x = images(1, 32, seed=5)
    native = Model(cuda.artifact(program, get("native")))
    assert cuda.wrong(native, program, x, by_reference=1) == 0


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_gpu", lambda: "has no NVIDIA GPU")
    with pytest.raises(SystemExit, match="this machine has no NVIDIA GPU"):
        cuda.main([])
    monkeypatch.setattr(device, "_gpu", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="cannot use the GPU"):
        cuda.main([])
