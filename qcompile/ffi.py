"""TVM's C interface, by ctypes: functions by name, tensors, errors.

The package `tvm_ffi` offers the same to Python. But importing it takes longer than all else that a process
does before its first answer, and brings PyTorch where that is installed. So only its library is loaded, and
TVM's runtime library, which needs it. The interface is the header tvm/ffi/c_api.h of that package: a value
is a type and eight bytes; an object is counted, and its contents follow 24 bytes of its own. The version is
checked, since another may lay them out in another way.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from ctypes import (
    byref,
    c_char,
    c_char_p,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)
from functools import cache
from importlib.machinery import PathFinder
from math import prod
from typing import Any, ClassVar, NamedTuple

import numpy as np

from qcompile.device import libc
from qcompile.errors import DeviceError

CPU, CUDA = 1, 2  # DLDeviceType
_VERSION = (0, 1)
_NONE, _INT, _BOOL, _DTYPE, _DEVICE, _TEXT, _BYTES = 0, 1, 2, 5, 6, 8, 9  # TVMFFITypeIndex
_FIRST_OBJECT, _TENSOR, _ARRAY, _MODULE = 64, 70, 71, 73
_CONTENTS = 24  # bytes from the beginning of an object
_DTYPES = {  # DLDataType: its code and bits
    (code, bits): np.dtype(f"{letter}{bits // 8}")
    for code, letter, widths in (
        (0, "i", (8, 16, 32, 64)),
        (1, "u", (8, 16, 32, 64)),
        (2, "f", (16, 32, 64)),
        (6, "b", (8,)),
    )
    for bits in widths
}
_CODES = {dtype: pair for pair, dtype in _DTYPES.items()}
_REMEDY = "install apache-tvm and apache-tvm-ffi (the compiler library libtvm_compiler.so may be left out)"


class _Value(ctypes.Structure):
    """TVMFFIAny: an argument or a result."""

    _fields_: ClassVar = [("kind", c_int32), ("padding", c_uint32), ("bits", c_int64)]


class _Text(ctypes.Structure):
    """TVMFFIByteArray."""

    _fields_: ClassVar = [("data", c_void_p), ("size", c_size_t)]


class _Sequence(ctypes.Structure):
    """The beginning of TVMFFISeqCell."""

    _fields_: ClassVar = [("data", ctypes.POINTER(_Value)), ("size", c_int64)]


class _Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_: ClassVar = [
        ("data", c_uint64),
        ("device", c_int32 * 2),
        ("ndim", c_int32),
        ("code", c_uint8),
        ("bits", c_uint8),
        ("lanes", c_uint16),
        ("shape", ctypes.POINTER(c_int64)),
        ("strides", ctypes.POINTER(c_int64)),
        ("offset", c_uint64),
    ]


class _Field(ctypes.Structure):
    """The beginning of TVMFFIFieldInfo."""

    _fields_: ClassVar = [("name", _Text), ("texts", _Text * 2), ("numbers", c_int64 * 3), ("offset", c_int64)]


class _Type(ctypes.Structure):
    """TVMFFITypeInfo, as far as its fields."""

    _fields_: ClassVar = [
        ("numbers", c_int32 * 2),
        ("key", _Text),
        ("ancestors", c_void_p),
        ("hash", c_uint64),
        ("counts", c_int32 * 2),
        ("fields", ctypes.POINTER(_Field)),
    ]


class Plain(NamedTuple):
    """An argument that is no object: its type, and its eight bytes as a number."""

    kind: int
    bits: int


@cache
def load() -> Any:
    """The functions of libtvm_ffi.so, with TVM's runtime in the process.

    Raises:
        DeviceError: either library is not installed, or is one we do not know.
    """
    library = _open(find("tvm_ffi", "libtvm_ffi.so"))
    version = (c_uint32 * 3)()
    library.TVMFFIGetVersion(version)
    if tuple(version[:2]) != _VERSION:
        known = ".".join(map(str, _VERSION))
        raise DeviceError(f"tvm_ffi is version {'.'.join(map(str, version))}, not {known}", remedy=_REMEDY)
    for path in (find("tvm", "libtvm_runtime.so"), "libm.so.6"):  # what machine code calls: also expf and the like
        _open(path)
    library.TVMFFITensorFromDLPack.argtypes = c_void_p, c_int, c_int, c_void_p
    for counted in (library.TVMFFIObjectIncRef, library.TVMFFIObjectDecRef):
        counted.argtypes = (c_void_p,)
    library.TVMFFITensorToDLPack.argtypes = c_void_p, c_void_p
    library.TVMFFIEnvSetStream.argtypes = c_int, c_int, c_void_p, c_void_p
    library.TVMFFIGetTypeInfo.restype = ctypes.POINTER(_Type)
    return library


def _open(path: str) -> Any:
    # The linker is called as any foreign function is, without the interpreter's lock, so other threads go on checking
    # an artifact. ctypes.CDLL keeps it; after this it finds the library open, or says what was wrong.
    libc().dlopen(path.encode(), os.RTLD_NOW | os.RTLD_GLOBAL)
    try:
        return ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise DeviceError(f"a library cannot be loaded: {error}", where=path, remedy=_REMEDY) from error


def find(package: str, file: str) -> str:
    """The path of a library that an installed package brings; the package itself is not imported."""
    spec = PathFinder.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    found = next((p for f in folders or () if os.path.exists(p := os.path.join(f, "lib", file))), None)
    if found is None:
        raise DeviceError(f"the runtime needs {file} of the package {package}", remedy=_REMEDY)
    return found


class Object:
    """A counted reference to something of TVM's."""

    __slots__ = ("_release", "handle", "kind")

    def __init__(self, kind: int, handle: int) -> None:
        """Takes over a reference that the caller holds."""
        self.kind, self.handle = kind, handle
        self._release = load().TVMFFIObjectDecRef

    def __del__(self) -> None:
        self._release(self.handle)

    def items(self) -> list[Object]:
        """The objects in an array of TVM's; what is no array is its own only item."""
        if self.kind != _ARRAY:
            return [self]
        sequence = _Sequence.from_address(self.handle + _CONTENTS)
        return [_shared(value) for value in sequence.data[: sequence.size]]

    @property
    def tensor(self) -> _Tensor:
        """What a tensor is and where it lies; what is written here holds for the tensor."""
        return _Tensor.from_address(self.handle + _CONTENTS)


def described(tensor: Object) -> tuple[tuple[int, ...], np.dtype]:
    """The shape and the type of a tensor."""
    found = tensor.tensor
    return tuple(found.shape[: found.ndim]), _DTYPES[found.code, found.bits]


class View:
    """How tensors like one given are seen as arrays. TVM's own are contiguous."""

    def __init__(self, like: Object) -> None:
        self._shape, self._dtype = described(like)
        self._memory: Any = c_char * (prod(self._shape) * self._dtype.itemsize)
        self._offset = like.tensor.offset

    def __call__(self, tensor: Object) -> tuple[int, np.ndarray]:
        """The address of its numbers, and they as an array that keeps them alive."""
        address = c_uint64.from_address(tensor.handle + _CONTENTS).value + self._offset
        memory = self._memory.from_address(address)
        memory.owner = tensor
        return address, np.ndarray(self._shape, self._dtype, memory)


def _shared(value: _Value) -> Object:
    load().TVMFFIObjectIncRef(value.bits)
    return Object(value.kind, value.bits)


def function(name: str) -> Object:
    """One of TVM's global functions."""
    text, handle = name.encode(), c_void_p()
    _check(load().TVMFFIFunctionGetGlobal(byref(_Text(_address(text), len(text))), byref(handle)))
    assert handle.value is not None, name
    return Object(_FIRST_OBJECT, handle.value)


def member(module: Object, name: str) -> Object:
    """A function of a module. Raises AttributeError where it has none of that name."""
    found = call(function("ffi.ModuleGetFunction"), module, name, False)
    if found is None:
        raise AttributeError(name)
    return found


def imports(module: Object) -> list[Object]:
    """The modules that a module imports: no function gives them, so their place comes from what TVM says of itself."""
    (field,) = load().TVMFFIGetTypeInfo(_MODULE).contents.fields[:1]
    if ctypes.string_at(field.name.data, field.name.size) != b"imports_":
        raise DeviceError("tvm_ffi lays out its modules in another way", remedy=_REMEDY)
    handle = c_uint64.from_address(module.handle + field.offset).value
    load().TVMFFIObjectIncRef(handle)
    return Object(_ARRAY, handle).items()


def device(kind: int, number: int) -> Plain:
    """A DLDevice."""
    return Plain(_DEVICE, kind | number << 32)


def dtype_of(dtype: np.dtype) -> Plain:
    """A DLDataType."""
    code, bits = _CODES[dtype]
    return Plain(_DTYPE, code | bits << 8 | 1 << 16)


Argument = Object | Plain | str | bytes | int | None


def call(called: Object, *arguments: Argument) -> Any:
    """The result of a function: an Object, a number or None. Raises RuntimeError as `Call` does."""
    return Call(called, *arguments)()


class Call:
    """A function with its arguments, to be called any number of times."""

    def __init__(self, called: Object, *arguments: Argument) -> None:
        self._alive: list[Any] = [called, arguments]
        values, self._result = (_Value * len(arguments))(), _Value()
        for value, argument in zip(values, arguments, strict=True):
            value.kind, value.bits = self._plain(argument)
        self._call = load().TVMFFIFunctionCall
        self._parameters = c_void_p(called.handle), values, c_int(len(arguments)), byref(self._result)

    def _plain(self, argument: Argument) -> tuple[int, int]:
        if isinstance(argument, Object):
            return argument.kind, argument.handle
        if isinstance(argument, Plain):
            return argument
        if argument is None:
            return _NONE, 0
        if isinstance(argument, str):
            text = argument.encode()
            self._alive.append(text)
            return _TEXT, _address(text)
        if isinstance(argument, bytes):
            whole = _Text(_address(argument), len(argument))
            self._alive.append(whole)
            return _BYTES, ctypes.addressof(whole)
        return _BOOL if isinstance(argument, bool) else _INT, argument

    def __call__(self) -> Any:
        """The result: an Object, a number or None.

        Raises:
            RuntimeError: what the function raised.
        """
        result = self._result
        result.kind = result.bits = 0
        if self._call(*self._parameters):
            raise _raised()
        kind = result.kind
        if kind >= _FIRST_OBJECT:
            return Object(kind, result.bits)
        return None if kind == _NONE else result.bits


def tensor(array: np.ndarray) -> Object:
    """A tensor over the numbers of `array`, which it keeps alive. The array must be writable."""
    return from_dlpack(array.__dlpack__())


def from_dlpack(capsule: Any) -> Object:
    """A tensor that is what a capsule of DLPack holds."""
    handle = c_void_p()
    managed = _capsule_pointer(capsule, b"dltensor")
    _check(load().TVMFFITensorFromDLPack(managed, 0, 0, byref(handle)))
    _capsule_rename(capsule, b"used_dltensor")  # so the protocol says it is no longer the capsule's
    assert handle.value is not None
    return Object(_TENSOR, handle.value)


def to_dlpack(tensor: Object) -> Any:
    """The inverse of `from_dlpack`: a capsule, which whoever takes it must take at once."""
    managed = c_void_p()
    _check(load().TVMFFITensorToDLPack(tensor.handle, byref(managed)))
    return _capsule_new(managed, b"dltensor", None)


def set_stream(device: int, stream: int) -> int:
    """The stream, a handle of CUDA's, on which the calling thread's next kernels run; 0: the default one. Returns the
    one before."""
    before = c_void_p()
    _check(load().TVMFFIEnvSetStream(CUDA, device, stream, byref(before)))
    return before.value or 0


def array_of(items: Iterable[Object | str]) -> Object:
    """An array of TVM's that holds `items`."""
    return call(function("ffi.Array"), *items)


def _address(text: bytes) -> int:
    return ctypes.cast(c_char_p(text), c_void_p).value or 0


_python = ctypes.pythonapi
_capsule_pointer = ctypes.PYFUNCTYPE(c_void_p, ctypes.py_object, c_char_p)(("PyCapsule_GetPointer", _python))
_capsule_new = ctypes.PYFUNCTYPE(ctypes.py_object, c_void_p, c_char_p, c_void_p)(("PyCapsule_New", _python))
_capsule_rename = ctypes.PYFUNCTYPE(c_int, ctypes.py_object, c_char_p)(("PyCapsule_SetName", _python))


def _check(status: int) -> None:
    if status:
        raise _raised()


def _raised() -> RuntimeError:
    """The error that a function of TVM's left."""
    handle = c_void_p()
    load().TVMFFIErrorMoveFromRaised(byref(handle))
    assert handle.value is not None
    error = Object(_FIRST_OBJECT, handle.value)
    kind, message = (_Text * 2).from_address(error.handle + _CONTENTS)  # TVMFFIErrorCell
    return RuntimeError(": ".join(ctypes.string_at(text.data, text.size).decode() for text in (kind, message)))
