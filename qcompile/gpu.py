"""Machine code for a GPU made callable: host code as for a CPU, which launches kernels that lie in the artifact.

Two ways in: NumPy arrays are copied to the GPU and the outputs back, when all is done. PyTorch's tensors on the GPU
are used where they lie, on PyTorch's stream, and so are the outputs: nothing is copied, and nothing waited for.

All models take their memory from one pool, which gives it to the next call as soon as the last has been handed to the
GPU, or as an output is dropped that a stream may still read. That is right on one stream, whose kernels run in order.
So calls are handed over one at a time, and begin when all other streams of earlier calls have done what they were given
until then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from qcompile import cuda, ffi, tensors
from qcompile.checks import InputChecker
from qcompile.container import Buffer
from qcompile.errors import InputError
from qcompile.executable import POOLED_ALLOCATOR, load_module, main_of

_DEFAULT_STREAM = 0
_ALIGNMENT = 16  # of inputs, as kernels load them
_SHAPES_KEPT = 16  # sets of inputs whose memory on the GPU is kept


class _Turn:
    """Whose turn it is to hand kernels to the GPU, and on which streams that was done."""

    def __init__(self) -> None:
        self._lock, self._streams = threading.Lock(), {_DEFAULT_STREAM}

    @contextmanager
    def on(self, stream: int) -> Iterator[None]:
        """TVM launches on `stream`, behind all that its other streams were given. Raises DeviceError where the GPU
        fails."""
        with self._lock, cuda.chosen():
            try:
                device = ffi.device(ffi.CUDA, cuda.DEVICE)
                for other in self._streams - {stream}:
                    ffi.call(ffi.function("runtime.Device_StreamSyncFromTo"), device, other, stream)
                self._streams.add(stream)
                before = ffi.set_stream(cuda.DEVICE, stream)
                try:
                    yield
                finally:
                    ffi.set_stream(cuda.DEVICE, before)
            except RuntimeError as error:  # what TVM raises
                raise cuda.failed(error) from error


_TURN = _Turn()


class _Input(NamedTuple):
    """An input of one shape on the GPU."""

    tensor: ffi.Object
    address: int
    nbytes: int

    def fill(self, array: np.ndarray) -> None:
        """Copy from `array`, which must not change before the stream has done it."""
        array = np.ascontiguousarray(array)
        _copy(self.address, array.ctypes.data, self.nbytes, cuda.TO_DEVICE)


class GpuExecutable:
    """A loaded library with its constants on the GPU. Not thread-safe: `qcompile.runtime.Model` holds a lock."""

    def __init__(
        self, library: Buffer, constants: Iterable[np.ndarray], device_code: Buffer, device_kernels: str
    ) -> None:
        """Arguments as those of `qcompile.artifact.Variant`. Raises DeviceError where the GPU cannot take them."""
        cuda.load()
        with _TURN.on(_DEFAULT_STREAM):
            module = load_module(library)
            _import_kernels(module, device_code, device_kernels)
            gpu, cpu = (ffi.CUDA, cuda.DEVICE, POOLED_ALLOCATOR), (ffi.CPU, 0, POOLED_ALLOCATOR)
            self._main = main_of(module, *gpu, *cpu)
            bound = []
            for array in constants:
                bound.append(_input(array.shape, array.dtype))
                bound[-1].fill(array)
            cuda.check(cuda.load().cudaStreamSynchronize(_DEFAULT_STREAM), "copying the weights to the GPU")
        self._constants = [ffi.array_of([place.tensor for place in bound])] if bound else []
        self._constant_addresses = {place.address for place in bound}
        self._calls: dict[tuple[tuple[int, ...], ...], tuple[list[_Input], ffi.Call]] = {}

    def __call__(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run "main"; the outputs are copies."""
        with _TURN.on(_DEFAULT_STREAM):
            places, call = self._held(inputs)
            for place, array in zip(places, inputs, strict=True):
                place.fill(array)
            outputs = [_copied(tensor) for tensor in call().items()]
            cuda.check(cuda.load().cudaStreamSynchronize(_DEFAULT_STREAM), "running the model")
        return outputs

    def on_gpu(self, inputs: Sequence[ffi.Object], stream: int) -> list[tuple[ffi.Object, bool]]:
        """Run "main" on tensors that lie on the GPU, on `stream`.

        Returns:
            The outputs, which are there when `stream` has come so far; of each whether its memory is not its own.
        """
        with _TURN.on(stream):
            outputs = ffi.call(self._main, *inputs, *self._constants).items()
        taken = self._constant_addresses | {_address(tensor) for tensor in inputs}
        return [(tensor, _address(tensor) in taken) for tensor in outputs]

    def _held(self, inputs: Sequence[np.ndarray]) -> tuple[list[_Input], ffi.Call]:
        """Memory on the GPU for inputs of these shapes, and the call that takes it."""
        shapes = tuple(array.shape for array in inputs)
        if shapes not in self._calls:
            if len(self._calls) == _SHAPES_KEPT:
                del self._calls[next(iter(self._calls))]
            places = [_input(array.shape, array.dtype) for array in inputs]
            call = ffi.Call(self._main, *[place.tensor for place in places], *self._constants)
            self._calls[shapes] = places, call
        return self._calls[shapes]


def _import_kernels(module: ffi.Object, code: Buffer, kernels: str) -> None:
    """Let the host code of a library find the kernels that it launches."""
    library = ffi.imports(module)[0]
    form = "ptx" if bytes(code[:2]) == b"//" else "fatbin"
    table = ffi.call(ffi.function("runtime.LoadMetaDataFromJSON"), kernels)
    create, nothing = ffi.function("ffi.Module.create.cuda"), ffi.call(ffi.function("ffi.Map"))
    imported = ffi.call(create, bytes(code), form, table, nothing)
    ffi.call(ffi.function("ffi.ModuleImportModule"), library, imported)


def _input(shape: tuple[int, ...], dtype: np.dtype) -> _Input:
    sizes = ffi.call(ffi.function("ffi.Shape"), *shape)
    allocate, device = ffi.function("runtime.TVMTensorAllocWithScope"), ffi.device(ffi.CUDA, cuda.DEVICE)
    tensor = ffi.call(allocate, sizes, ffi.dtype_of(dtype), device, None)
    return _Input(tensor, _address(tensor), int(np.prod(shape)) * dtype.itemsize)


def _address(tensor: ffi.Object) -> int:
    found = tensor.tensor
    return int(found.data + found.offset)


def _copied(tensor: ffi.Object) -> np.ndarray:
    """A tensor on the GPU as an array."""
    array = np.empty(*ffi.described(tensor))
    _copy(array.ctypes.data, _address(tensor), array.nbytes, cuda.FROM_DEVICE)
    return array


def _copy(to: int, begin: int, nbytes: int, way: int) -> None:
    if nbytes:
        status = cuda.load().cudaMemcpyAsync(to, begin, nbytes, way, _DEFAULT_STREAM)
        cuda.check(status, "copying between processor and GPU")


class _Given(NamedTuple):
    """What of an input is checked."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)


Run = Callable[[Sequence[ffi.Object], int], list[tuple[ffi.Object, bool]]]


def is_on_gpu(torch: Any, inputs: Sequence[Any]) -> bool:
    """Whether inputs are PyTorch's tensors on the GPU, and not on the CPU.

    Raises:
        InputError: some are here and some there.
    """
    places = {str(x.device) if isinstance(x, torch.Tensor) else "no tensor of torch's" for x in inputs}
    if not any(place.startswith("cuda") for place in places):
        return False
    if places != {f"cuda:{cuda.DEVICE}"}:
        raise InputError(
            f"the inputs are on different devices: {', '.join(sorted(places))}",
            remedy=f"call .to('cuda:{cuda.DEVICE}') on each, or .cpu(): all on the GPU of the model, or none",
        )
    return True


def run_on_gpu(torch: Any, inputs: Sequence[Any], check: InputChecker, run: Run) -> list[Any]:
    """PyTorch's tensors on the GPU to such tensors, on its current stream. Raises InputError as a call does."""
    if torch.cuda.is_current_stream_capturing():
        raise InputError(
            "the call would be recorded in a CUDA graph of PyTorch's, and its memory is another call's afterwards",
            remedy="call the model outside of torch.cuda.graph: it launches its kernels as a graph itself",
        )
    check.require([_Given(tuple(x.shape), _dtype(x)) for x in inputs])
    kept = [_readable(torch, x) for x in inputs]
    stream = int(torch.cuda.current_stream(cuda.DEVICE).cuda_stream)
    outputs = run([ffi.from_dlpack(torch.utils.dlpack.to_dlpack(x)) for x in kept], stream)
    results = [(torch.utils.dlpack.from_dlpack(ffi.to_dlpack(tensor)), shared) for tensor, shared in outputs]
    return [result.clone() if shared else result for result, shared in results]


def _dtype(x: Any) -> np.dtype:
    name = str(x.dtype).removeprefix("torch.")
    if name not in tensors.NAMES:
        raise InputError(f"a torch input has dtype {x.dtype}", remedy="give dense tensors of a dtype that NumPy has")
    return np.dtype(name)


def _readable(torch: Any, x: Any) -> Any:
    """A tensor as kernels read it: contiguous and aligned."""
    if x.layout != torch.strided:
        raise InputError(f"a torch input has layout {x.layout}", remedy="give dense tensors")
    x = x.detach().resolve_neg().contiguous()
    return x.clone() if x.data_ptr() % _ALIGNMENT else x
