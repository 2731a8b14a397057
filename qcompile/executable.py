"""Machine code made callable: a shared object, run by TVM's 3 MB runtime library without its compiler.

Only `tvm_ffi` and `libtvm_runtime.so` are loaded. `import tvm_ffi` imports PyTorch wherever that is
installed; here it is kept from doing so (unless PyTorch is there already), because a deployed
process should not pay for it.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from qcompile import tensors
from qcompile.container import ALIGNMENT, Buffer
from qcompile.device import cores
from qcompile.errors import ConfigError, DeviceError

# TVM's pool is as large as this variable says when a thread first uses it, and can only be made
# smaller later. Its own default is half of the cores.
os.environ.setdefault("TVM_NUM_THREADS", str(cores()))
# How often an idle worker looks for work before it sleeps: about two milliseconds. TVM's own default keeps
# the cores busy for a third of a second after each call, and an ending process waiting for as long.
os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "3000")

_CPU, _POOLED_ALLOCATOR = 1, 2
_BIG_CORES = 1  # threading.AffinityMode in TVM: the fastest cores first
_state = threading.local()  # the thread pool and its size belong to the calling thread
_Result = TypeVar("_Result")


class Owner:
    """Decides which thread runs machine code, because TVM gives each calling thread a pool of workers that
    outlives it.

    The main thread runs its calls itself; those of all other threads are run by one more thread, so there
    are never more than two pools.
    """

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._used = self._orphaned = False

    def run(self, function: Callable[[], _Result]) -> _Result:
        """`function()`, on a thread that may call TVM.

        Raises:
            DeviceError: this process was forked from one that had run a model.
        """
        if self._orphaned:
            raise DeviceError(
                "this process was forked after a model had run, and threads do not survive a fork",
                remedy="run models only in the children, or start processes by multiprocessing's 'spawn' method",
            )
        self._used = True
        if threading.current_thread() is threading.main_thread():
            return function()
        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="qcompile")
        return self._executor.submit(function).result()

    def after_fork(self) -> None:
        """Start over, in a child process."""
        self._executor, self._lock, self._orphaned = None, threading.Lock(), self._used


OWNER = Owner()
os.register_at_fork(after_in_child=OWNER.after_fork)


def _import_without_torch(name: str) -> Any:
    if "torch" in sys.modules:
        return importlib.import_module(name)
    sys.modules["torch"] = None  # type: ignore[assignment]  # an import of torch raises ImportError, which tvm_ffi expects
    try:
        return importlib.import_module(name)
    finally:
        del sys.modules["torch"]


@cache
def _ffi() -> Any:
    """tvm_ffi, with TVM's runtime library in the process.

    Raises:
        DeviceError: either is not installed.
    """
    remedy = "install apache-tvm and apache-tvm-ffi (the compiler library libtvm_compiler.so may be left out)"
    try:
        ffi = _import_without_torch("tvm_ffi")
    except ImportError as error:
        raise DeviceError(f"the runtime needs the package tvm_ffi: {error}", remedy=remedy) from error
    spec = importlib.util.find_spec("tvm")  # finds the folder without importing the compiler
    folders = spec.submodule_search_locations if spec else None
    library = next((p for f in folders or [] if (p := Path(f, "lib", "libtvm_runtime.so")).exists()), None)
    if library is None:
        raise DeviceError("the runtime needs libtvm_runtime.so of the package tvm", remedy=remedy)
    for path in (str(library), "libm.so.6"):  # what machine code calls: the runtime, and expf and the like
        ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
    return ffi


def set_threads(count: int | None) -> None:
    """How many threads the calling thread's next kernels use; None: all of the pool.

    Raises:
        ConfigError: more than the pool has.
    """
    if getattr(_state, "threads", None) == count:
        return
    ffi = _ffi()
    number_of_threads = ffi.get_global_func("runtime.NumThreads")
    wanted = int(os.environ["TVM_NUM_THREADS"]) if count is None else count
    ffi.get_global_func("runtime.config_threadpool")(_BIG_CORES, wanted)
    if number_of_threads() != wanted:
        largest = _state.threads = number_of_threads()
        raise ConfigError(
            f"{wanted} threads were asked for, and TVM's pool has {largest}",
            where="threads",
            remedy=f"ask for 1 to {largest}, or set TVM_NUM_THREADS before the first model runs",
        )
    _state.threads = count


class Executable:
    """A loaded library with its constants bound. Not thread-safe: `qcompile.runtime.Model` holds a lock."""

    def __init__(self, library: Buffer, constants: Iterable[np.ndarray]) -> None:
        """`library`: the bytes of the shared object. `constants`: used where they lie, when aligned."""
        ffi = _ffi()
        self._from_dlpack, self._tensor_type = ffi.from_dlpack, ffi.Tensor
        try:
            machine = _load(ffi, library)["vm_load_executable"]()
        except AttributeError as error:
            raise DeviceError("the machine code is not a compiled model", remedy="compile the model again") from error
        machine["vm_initialization"](_CPU, 0, _POOLED_ALLOCATOR)
        self._main = machine["main"]
        bound = [self._from_dlpack(tensors.aligned(array)) for array in constants]
        self._constants = (ffi.Array(bound),) if bound else ()
        self._constant_addresses = {tensor.data_ptr() for tensor in bound}
        self._staging: dict[int, np.ndarray] = {}

    def __call__(self, inputs: Iterable[np.ndarray]) -> list[np.ndarray]:
        """Run "main"; the outputs belong to the caller."""
        taken = [self._tensor(index, array) for index, array in enumerate(inputs)]
        result = self._main(*taken, *self._constants)
        flat = [result] if isinstance(result, self._tensor_type) else result
        ours = self._constant_addresses.union([tensor.data_ptr() for tensor in taken])
        # An output can be an input or a constant in another shape: the caller gets a copy of its own.
        return [np.from_dlpack(y).copy() if y.data_ptr() in ours else np.from_dlpack(y) for y in flat]

    def _tensor(self, index: int, array: np.ndarray) -> Any:
        """`array` as kernels can read it: contiguous and aligned, because they load whole vectors."""
        flags = array.flags
        if flags.c_contiguous and flags.writeable:  # DLPack as TVM speaks it has no read-only memory
            tensor = self._from_dlpack(array)
            if tensor.data_ptr() % ALIGNMENT == 0:
                return tensor
        staging = self._staging.get(index)
        if staging is None or staging.shape != array.shape:
            staging = self._staging[index] = tensors.empty(array.shape, array.dtype)
        np.copyto(staging, array)
        return self._from_dlpack(staging)


def _load(ffi: Any, library: Buffer) -> Any:
    """Load a shared object from memory, by way of a private file that is gone when this returns.

    (Not by a memfd: the dynamic linker knows libraries by path, and /proc/self/fd/7 comes again.)
    """
    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
        path = Path(folder, "library.so")
        path.write_bytes(library)
        try:
            return ffi.load_module(path, keep_module_alive=False)
        except (OSError, RuntimeError) as error:
            raise DeviceError(
                f"the machine code cannot be loaded: {error}",
                where=str(path),
                remedy="set TMPDIR to a folder from which programs may run (not mounted noexec); or compile again",
            ) from error
