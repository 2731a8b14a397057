"""What the runtime asks of PyTorch's tensors on a GPU, of tensors that lie on the emulated one.

(A PyTorch that is built for CUDA finds only a real GPU.) Stands in for the module `torch` in a process of its own.
"""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np

from qcompile import cuda, ffi, gpu

strided, sparse_coo = "torch.strided", "torch.sparse_coo"
copies = 0
_stream = 0
_capturing = False


class Tensor:
    """A tensor on the GPU, or on the CPU, or said to be on another device."""

    def __init__(self, held: ffi.Object | np.ndarray, device: str = "", layout: str = strided, skew: int = 0) -> None:
        self.held, self.layout, self.skew = held, layout, skew
        on_gpu = isinstance(held, ffi.Object)
        shape, dtype = ffi.described(held) if isinstance(held, ffi.Object) else (held.shape, held.dtype)
        self.shape, self.dtype, self._device = shape, f"torch.{dtype}", device or ("cuda:0" if on_gpu else "cpu")

    @property
    def device(self) -> Any:
        return _Device(self._device)

    def detach(self) -> Tensor:
        return self

    def resolve_neg(self) -> Tensor:
        return self

    def contiguous(self) -> Tensor:
        return self

    def numpy(self) -> np.ndarray:
        assert isinstance(self.held, np.ndarray)
        return self.held

    def data_ptr(self) -> int:
        assert isinstance(self.held, ffi.Object)
        return gpu._address(self.held) + self.skew

    def cpu(self) -> np.ndarray:
        """Waits, as PyTorch does."""
        assert isinstance(self.held, ffi.Object)
        cuda.check(cuda.load().cudaStreamSynchronize(_stream), "waiting")
        return gpu._copied(self.held)

    def clone_later(self) -> Tensor:
        """What the current stream will read here."""
        assert isinstance(self.held, ffi.Object)
        nothing = np.zeros(*ffi.described(self.held))
        copy = on_gpu(nothing)
        status = cuda.load().cudaMemcpyAsync(copy.data_ptr(), self.data_ptr(), nothing.nbytes, 3, _stream)
        cuda.check(status, "copying on the GPU")
        return copy

    def clone(self) -> Tensor:
        global copies
        copies += 1
        return on_gpu(self.cpu())


class _Device(str):
    @property
    def type(self) -> str:
        return self.partition(":")[0]


def on_gpu(array: np.ndarray, **said: Any) -> Tensor:
    place = gpu._input(array.shape, array.dtype)
    place.fill(array)
    cuda.check(cuda.load().cudaStreamSynchronize(_stream), "copying")
    return Tensor(place.tensor, **said)


def from_numpy(array: np.ndarray) -> Tensor:
    return Tensor(array)


def use_new_stream() -> int:
    """A stream that is the current one from now on."""
    global _stream
    created = ctypes.c_void_p()
    cuda.check(cuda.load().cudaStreamCreate(ctypes.byref(created)), "making a stream")
    _stream = created.value or 0
    return _stream


def use_stream(stream: int) -> None:
    """The current one from now on."""
    global _stream
    _stream = stream


def _to_dlpack(tensor: Tensor) -> Any:
    assert isinstance(tensor.held, ffi.Object)
    return ffi.to_dlpack(tensor.held)


cuda_module = SimpleNamespace(
    current_stream=lambda device: SimpleNamespace(cuda_stream=_stream), is_current_stream_capturing=lambda: _capturing
)
utils = SimpleNamespace(
    dlpack=SimpleNamespace(to_dlpack=_to_dlpack, from_dlpack=lambda capsule: Tensor(ffi.from_dlpack(capsule)))
)


def stand_in() -> Any:
    """This module as `torch`, from now on."""
    me = SimpleNamespace(**{**globals(), "cuda": cuda_module})
    sys.modules["torch"] = me  # type: ignore[assignment]
    return me
