"""NVIDIA's CUDA, by ctypes: its runtime library, and the part of TVM's runtime that launches kernels on a GPU.

Loaded only by a model for a GPU. Only the first GPU is used (CUDA_VISIBLE_DEVICES says which one that is).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from functools import cache
from importlib.machinery import PathFinder
from typing import Any

from qcompile import ffi
from qcompile.errors import DeviceError

DEVICE = 0
TO_DEVICE, FROM_DEVICE = 1, 2  # cudaMemcpyKind
_RUNTIME = "libcudart.so.13"
_REMEDY = "pip install nvidia-cuda-runtime (or a PyTorch that is built for CUDA 13)"


@cache
def load() -> Any:
    """The functions of CUDA's runtime library, with TVM's part for CUDA in the process.

    Raises:
        DeviceError: either library is not installed, or cannot be loaded.
    """
    ffi.load()
    runtime = _runtime()
    for name in ("cudaMemcpyAsync", "cudaStreamSynchronize", "cudaGetDevice", "cudaSetDevice", "cudaGetErrorString"):
        if not hasattr(runtime, name):
            raise DeviceError(f"{_RUNTIME} has no function {name}", remedy=_REMEDY)
    runtime.cudaMemcpyAsync.argtypes = c_void_p, c_void_p, c_size_t, c_int, c_void_p
    runtime.cudaStreamSynchronize.argtypes = (c_void_p,)
    runtime.cudaGetErrorString.restype = c_char_p
    path = ffi.find("tvm", "libtvm_runtime_cuda.so")
    try:
        ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise DeviceError(f"TVM's library for GPUs cannot be loaded: {error}", where=path, remedy=_REMEDY) from error
    return runtime


def _runtime() -> Any:
    """The library of CUDA's runtime: the one in this process, else of a package, else of the system."""
    with suppress(OSError):  # a second one beside PyTorch's would be another library with the same names
        return ctypes.CDLL(_RUNTIME, ctypes.RTLD_GLOBAL | os.RTLD_NOLOAD)
    for path in (*installed(_RUNTIME), _RUNTIME):
        with suppress(OSError):
            return ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
    raise DeviceError(f"a model for a GPU needs CUDA's runtime library, {_RUNTIME}", remedy=_REMEDY)


def installed(library: str) -> Iterator[str]:
    """Where NVIDIA's packages put a library; the packages themselves are not imported."""
    spec = PathFinder.find_spec("nvidia")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        for part in ("cu13", "cuda_runtime", "cuda_nvrtc"):
            path = os.path.join(folder, part, "lib", library)
            if os.path.exists(path):
                yield path


def check(status: int, doing: str) -> None:
    """Raise DeviceError where CUDA says that `doing` failed."""
    if status:
        text = load().cudaGetErrorString(status)
        raise failed(f"{doing}: {text.decode() if text else status}")


def failed(reason: object) -> DeviceError:
    """The error of a GPU that could not do what it was to do."""
    load().cudaGetLastError()  # it is said here: whoever uses CUDA next must not find it and take it for its own
    return DeviceError(
        f"the GPU failed: {reason}",
        remedy="if its memory is full, free some or give smaller batches; after another failure start the process anew",
    )


@contextmanager
def chosen() -> Iterator[None]:
    """The calling thread's CUDA device is the one that we use; afterwards what it was."""
    runtime, before = load(), c_int()
    check(runtime.cudaGetDevice(byref(before)), "asking for the current device")
    check(runtime.cudaSetDevice(DEVICE), "choosing the device")
    try:
        yield
    finally:
        if before.value != DEVICE:
            runtime.cudaSetDevice(before)
