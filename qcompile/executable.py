"""Machine code made callable: a shared object, run by TVM's 3 MB runtime library without its compiler."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from ctypes import addressof, c_char
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from qcompile import ffi, tensors
from qcompile.container import ALIGNMENT, Buffer
from qcompile.device import cores, current_core, pool_cores
from qcompile.errors import ConfigError, DeviceError

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

# TVM's pool is as large as this variable says when a thread first uses it, and can only be made
# smaller later. Its own default is half of the cores.
os.environ["TVM_NUM_THREADS"] = os.environ.get("TVM_NUM_THREADS") or str(cores())
# How often an idle worker looks for work before it sleeps: about two milliseconds. TVM's own default keeps
# the cores busy for a third of a second after each call, and an ending process waiting for as long.
os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "3000")

POOLED_ALLOCATOR = 2  # of memory::AllocatorType in TVM
BIG_CORES, GIVEN_CORES = 1, -2  # threading.AffinityMode in TVM: the fastest cores first; a list of cores, one a worker
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

    def run(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """`function(*arguments)`, on a thread that may call TVM.

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
            return function(*arguments)
        from concurrent.futures import ThreadPoolExecutor  # only where threads are used: it imports much

        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, "qcompile", initializer=_anywhere)
        return self._executor.submit(function, *arguments).result()

    def after_fork(self) -> None:
        """Start over, in a child process."""
        self._executor, self._lock, self._orphaned = None, threading.Lock(), self._used


def _anywhere() -> None:
    """Let the calling thread run where the main thread may, not only where the one may that made it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, os.sched_getaffinity(os.getpid()))


OWNER = Owner()
os.register_at_fork(after_in_child=OWNER.after_fork)


def check_threads(count: Any, most: int | None = None) -> None:
    """Refuse a number of threads that is none, or more than `most`, where a pool is known to have so many.

    Raises:
        ConfigError: `count` is neither a whole number from 1 on nor None, or too large.
    """
    if count is None:
        return
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ConfigError(f"threads is {count!r}", where="threads", remedy="give 1 or more, or None for all cores")
    if most is not None and count > most:
        raise ConfigError(
            f"{count} threads were asked for, and TVM's pool has {most}",
            where="threads",
            remedy=f"ask for 1 to {most}, or set TVM_NUM_THREADS where the model runs, before it first does",
        )


def refuse_threads(count: int | None, gpu: str) -> None:
    """Raise ConfigError where a number of threads is given for the target `gpu`."""
    if count is not None:
        raise ConfigError(
            f"threads is {count!r}, and {gpu} is a GPU, which has no threads to choose",
            where="threads",
            remedy="leave threads out for a model that runs on a GPU",
        )


def pool_size() -> int:
    """How many threads TVM's pool has: TVM_NUM_THREADS, or all cores.

    Raises:
        ConfigError: TVM_NUM_THREADS is no number of threads.
    """
    text = os.environ["TVM_NUM_THREADS"]
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(
            f"it is {text!r}", where="TVM_NUM_THREADS", remedy="set it to 1 or more, or leave it unset for all cores"
        )
    return int(text)


def set_threads(count: int | None) -> None:
    """How many threads the calling thread's next kernels use; None: all of the pool.

    Raises:
        ConfigError: more than the pool has, or TVM_NUM_THREADS is no number of threads.
    """
    if getattr(_state, "threads", 0) == count and not _out_of_place():
        return
    _configure(pool_size() if count is None else count)
    _state.threads = ffi.call(ffi.function("runtime.NumThreads"))
    check_threads(count, _state.threads)
    _state.threads = count


def _configure(count: int) -> None:
    """Let the calling thread's pool use `count` threads, each worker on a core of its own that is not the caller's.

    TVM by itself counts cores from 0, whichever this process may use, and puts a worker where the caller may be: the
    two then take turns on one core, call after call. It confines the caller to its list too, which is undone here.
    """
    configure = ffi.function("runtime.config_threadpool")
    _state.workers, _state.allowed = frozenset(), None
    if not hasattr(os, "sched_setaffinity"):
        ffi.call(configure, BIG_CORES, count)
        return
    allowed, found = os.sched_getaffinity(0), pool_cores()
    given = islice(cycle(found), pool_size())  # one for each thread of the pool: TVM makes it as large as the list
    try:
        ffi.call(configure, GIVEN_CORES, count, ffi.array_of(map(str, given)))
    finally:
        os.sched_setaffinity(0, allowed)
    if os.environ.get("TVM_BIND_THREADS", "1") != "1":  # nor does TVM then
        return
    if count <= len(found):
        _state.workers = frozenset(found[1:count])
    else:
        _state.allowed = allowed


def _out_of_place() -> bool:
    """Whether the calling thread has come to a worker's core, or shares its own with one and may use others now."""
    if _state.allowed is not None:
        return os.sched_getaffinity(0) != _state.allowed
    return bool(_state.workers) and current_core() in _state.workers


class Executable:
    """A loaded library with its constants bound. Not thread-safe: `qcompile.runtime.Model` holds a lock."""

    on_gpu = None  # see `qcompile.gpu.GpuExecutable`

    def __init__(
        self,
        library: Buffer,
        constants: Iterable[np.ndarray],
        threads: int | None = None,
        alignments: Sequence[int] = (),
    ) -> None:
        """`library`: the bytes of the shared object. `constants`: used where they lie, when aligned. `threads`: as
        `set_threads` takes it. `alignments`: as a `Variant` has them."""
        self._threads, self._alignments = threads, alignments
        self._main = main_of(load_module(library), ffi.CPU, 0, POOLED_ALLOCATOR)
        bound = [ffi.tensor(tensors.aligned(array)) for array in constants]
        self._constants = [ffi.array_of(bound)] if bound else []
        self._constant_addresses = {tensor.tensor.data for tensor in bound}
        self._shapes: list[tuple[int, ...]] | None = None  # of the last inputs, to which these belong:
        self._slots: list[_Slot] = []
        self._views: list[ffi.View] | None = None

    def __call__(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run "main"; the outputs belong to the caller."""
        set_threads(self._threads)
        shapes = [array.shape for array in inputs]
        if shapes != self._shapes:
            alignments = self._alignments or [ALIGNMENT] * len(inputs)
            self._slots = [_Slot(array, bytes_) for array, bytes_ in zip(inputs, alignments, strict=True)]
            self._call = ffi.Call(self._main, *[slot.tensor for slot in self._slots], *self._constants)
            self._shapes, self._views = shapes, None
        taken = [slot.hold(array) for slot, array in zip(self._slots, inputs, strict=True)]
        outputs, results = [], self._call().items()
        if self._views is None:
            self._views = [ffi.View(tensor) for tensor in results]
        for view, tensor in zip(self._views, results, strict=True):
            address, array = view(tensor)
            # An output can be an input or a constant in another shape: the caller gets a copy of its own.
            ours = address in taken or address in self._constant_addresses
            outputs.append(array.copy() if ours else array)
        return outputs


class _Slot:
    """An input of one shape, as kernels can read it: contiguous, and at a multiple of `alignment` bytes."""

    def __init__(self, array: np.ndarray, alignment: int) -> None:
        self._alignment = alignment
        self._buffer = tensors.empty(array.shape, array.dtype)  # takes no memory before it is written to
        self.tensor = ffi.tensor(self._buffer)
        self._description, self._own = self.tensor.tensor, self.tensor.tensor.data

    def hold(self, array: np.ndarray) -> int:
        """Let the tensor be `array`, where that lies when it can, else copied; returns the address."""
        address: int | None
        try:
            address = addressof(c_char.from_buffer(array))  # type: ignore[arg-type]  # an array is a buffer
        except (TypeError, ValueError):  # read-only or empty, which will do; or not contiguous
            address = array.ctypes.data if array.flags.c_contiguous else None
        if address is None or address % self._alignment:
            np.copyto(self._buffer, array)
            address = self._own
        self._description.data = address
        return address


def main_of(module: ffi.Object, *devices: int) -> ffi.Object:
    """The function "main" of a loaded library; `devices`: (kind, number, allocator) of each that it uses."""
    try:
        machine = ffi.call(ffi.member(module, "vm_load_executable"))
    except AttributeError as error:
        raise DeviceError("the machine code is not a compiled model", remedy="compile the model again") from error
    ffi.call(ffi.member(machine, "vm_initialization"), *devices)
    return ffi.member(machine, "main")


def load_module(library: Buffer) -> ffi.Object:
    """Load a shared object from memory, by way of a private file that is gone when this returns.

    (Not by a memfd: the dynamic linker knows libraries by path, and /proc/self/fd/7 comes again.)
    """
    path = os.path.join(os.environ.get("TMPDIR", "/tmp"), f"qcompile-{os.urandom(8).hex()}.so")
    try:
        with open(path, "xb", opener=_private) as file:
            file.write(library)
        return ffi.call(ffi.function("ffi.ModuleLoadFromFile"), path)
    except (OSError, RuntimeError) as error:
        raise DeviceError(
            f"the machine code cannot be loaded: {error}",
            where=path,
            remedy="set TMPDIR to a folder that may be written and from which programs may run (not mounted noexec);"
            " or compile again",
        ) from error
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
