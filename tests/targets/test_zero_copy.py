"""PyTorch's tensors on a real GPU are used where they lie, on PyTorch's stream, and the bits are the reference's.

(What needs no real GPU is in tests/test_gpu_runtime.py.)
"""

from __future__ import annotations

from typing import Any

import gpu_machine
import pytest
import torch
from gpu_table import record
from networks import images, resnet18, settle
from torch import Tensor
from torch.utils.dlpack import from_dlpack

import qcompile
from qcompile import device
from qcompile.compiled import CompiledModel
from qcompile.errors import InputError


def _unavailable() -> str:
    """Why the tests cannot run here; "" when they can."""
    if not gpu_machine.REAL:
        return "needs a real GPU (QCOMPILE_TEST_GPU=1)"
    if device.gpu() is None:
        return f"this machine {device.lacks('x86_64', ['sm_61'])}"
    if not torch.cuda.is_available():
        return f"this PyTorch ({torch.__version__}) cannot use the GPU: install one that is built for CUDA 13"
    if (torch.version.cuda or "").partition(".")[0] != "13":
        return f"this PyTorch is built for CUDA {torch.version.cuda}, and the runtime needs CUDA 13"
    return ""


pytestmark = [pytest.mark.cuda, pytest.mark.skipif(bool(_unavailable()), reason=_unavailable())]
SIZE = 64


@pytest.fixture(scope="module")
def model() -> CompiledModel:
    batch = torch.export.Dim("batch", min=1, max=8)
    network = settle(resnet18(16), images(8, SIZE, seed=3))
    calibration = list(images(4, SIZE, seed=4).split(1))
    compiled = qcompile.compile(network, "cuda", calibration=calibration, dynamic_shapes=({0: batch},), strict=True)
    compiled(images(2, SIZE, seed=1))  # the first call records graphs
    return compiled


def check(model: CompiledModel, got: Any, x: Tensor, request: pytest.FixtureRequest) -> None:
    """That `got` lies on the GPU and has the bits of the reference for `x`."""
    want = model.reference(x.cpu())
    assert isinstance(got, Tensor)
    assert got.device == torch.device("cuda", 0)
    wrong = int((got.cpu().view(torch.int32) != want.view(torch.int32)).sum())
    record(request.node, wrong, want.numel())
    assert wrong == 0


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_tensor_on_the_gpu_gives_one_there(batch: int, model: CompiledModel, request: pytest.FixtureRequest) -> None:
    x = images(batch, SIZE, seed=10 + batch)
    check(model, model(x.cuda()), x, request)


@pytest.mark.parametrize("kind", ["channels_last", "every other image", "a window", "at an odd address"])
def test_a_tensor_may_lie_in_any_way(kind: str, model: CompiledModel, request: pytest.FixtureRequest) -> None:
    x = images(4, SIZE, seed=20)
    if kind == "channels_last":
        given = x.cuda().to(memory_format=torch.channels_last)
    elif kind == "every other image":
        given, x = x.cuda()[::2], x[::2]
    elif kind == "a window":
        wide = images(4, SIZE + 8, seed=21)
        given, x = wide.cuda()[..., 4:-4, 4:-4], wide[..., 4:-4, 4:-4].contiguous()
    else:
        given = torch.cat([torch.zeros(1), x.flatten()]).cuda()[1:].view(x.shape)
        assert given.data_ptr() % 16
    before = given.clone()
    check(model, model(given), x, request)
    assert torch.equal(given, before)


def test_calls_on_several_streams_wait_for_what_their_stream_was_given(
    model: CompiledModel, request: pytest.FixtureRequest
) -> None:
    """Each input is written by its stream only after long work; each output is read by its stream at once."""
    inputs = [images(2, SIZE, seed=30 + i) for i in range(6)]
    ready = [x.cuda() for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.default_stream(), torch.cuda.Stream()]
    held, results = [], []
    for i, x in enumerate(ready):
        with torch.cuda.stream(streams[i % 3]):
            given = torch.full_like(x, float("nan"))
            torch.cuda._sleep(20_000_000)
            given.copy_(x)
            held.append(given)
            results.append(model(given) + 0.0)
    torch.cuda.synchronize()
    for x, result in zip(inputs, results, strict=True):
        check(model, result, x, request)


def test_a_call_does_not_wait_for_the_gpu(model: CompiledModel, request: pytest.FixtureRequest) -> None:
    x = images(1, SIZE, seed=40)
    given = x.cuda()
    model(given)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    result, done = model(given), torch.cuda.Event()
    done.record()
    assert not done.query()
    check(model, result, x, request)


def test_outputs_are_the_callers_to_keep(model: CompiledModel, request: pytest.FixtureRequest) -> None:
    inputs = [images(2, SIZE, seed=50 + i) for i in range(5)]
    kept = [model(x.cuda()) for x in inputs]
    assert len({y.data_ptr() for y in kept}) == len(kept)
    for x, y in zip(inputs, kept, strict=True):
        check(model, y, x, request)


def test_a_stream_may_still_read_an_output_that_was_dropped(
    model: CompiledModel, request: pytest.FixtureRequest
) -> None:
    x, other = images(2, SIZE, seed=55), images(2, SIZE, seed=56).cuda()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(first):
        y = model(x.cuda())
    with torch.cuda.stream(second):
        model(other)
    with torch.cuda.stream(first):
        torch.cuda._sleep(20_000_000)
        read = y + 0.0
        del y
    with torch.cuda.stream(second):
        for _ in range(3):
            model(other)
    torch.cuda.synchronize()
    check(model, read, x, request)


def test_a_call_is_not_recorded_in_a_graph_of_pytorchs(model: CompiledModel) -> None:
    x = images(2, SIZE, seed=57).cuda()
    with pytest.raises(InputError, match="would be recorded"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        model(x)


def test_outputs_go_on_by_dlpack(model: CompiledModel, request: pytest.FixtureRequest) -> None:
    x = images(2, SIZE, seed=60)
    y = model(from_dlpack(x.cuda()))
    again = from_dlpack(y)
    assert again.data_ptr() == y.data_ptr()
    check(model, again, x, request)


def test_tensors_on_the_processor_and_arrays_give_the_same_bits(model: CompiledModel) -> None:
    x = images(2, SIZE, seed=70)
    want = model.reference(x)
    assert torch.equal(model(x), want)
    assert torch.equal(torch.from_numpy(model(x.numpy())), want)
