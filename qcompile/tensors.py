"""Named tensors in the safetensors format, each at a multiple of 64 bytes.

The format (https://github.com/huggingface/safetensors, "Format"): eight bytes with the length of a
JSON header, the header, then the tensors' bytes one after the other without gaps. To align them
without leaving gaps, bytes between two tensors are a tensor of their own, named "__padding_<n>". Any
safetensors reader can read the file; this one needs NumPy alone and copies nothing.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from qcompile.container import ALIGNMENT, Buffer

_PADDING = "__padding_"
_DTYPES = {
    "BOOL": "bool",
    "I8": "int8",
    "U8": "uint8",
    "I16": "int16",
    "U16": "uint16",
    "I32": "int32",
    "U32": "uint32",
    "I64": "int64",
    "U64": "uint64",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
}
NAMES = {name: code for code, name in _DTYPES.items()}


def encode(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of a safetensors file; tensors keep their order.

    Raises:
        KeyError: a dtype that the format does not have.
    """
    header: dict[str, object] = {}
    parts: list[bytes] = []
    at = 0
    for number, (name, array) in enumerate(arrays.items()):
        data = np.asarray(array, order="C").astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        header[name] = _entry(NAMES[array.dtype.name], array.shape, at, len(data))
        parts.append(data)
        at += len(data)
        if gap := -at % ALIGNMENT:
            header[f"{_PADDING}{number}"] = _entry("U8", (gap,), at, gap)
            parts.append(bytes(gap))
            at += gap
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return b"".join([struct.pack("<Q", len(text)), text, *parts])


def _entry(dtype: str, shape: tuple[int, ...], begin: int, size: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + size]}


def decode(data: Buffer) -> dict[str, np.ndarray]:
    """The tensors, in order, as views into `data`: aligned to 64 bytes where `data` is.

    Raises:
        ValueError: it is no such file, or a tensor does not lie within it.
    """
    view = memoryview(data)
    try:
        (length,) = struct.unpack_from("<Q", view)
        header = json.loads(bytes(view[8 : 8 + length]))
        body = view[8 + length :]
        return {name: _view(entry, body) for name, entry in header.items() if not name.startswith(_PADDING)}
    except (struct.error, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"not a safetensors file: {error!r}") from error


def _view(entry: dict[str, Any], body: memoryview) -> np.ndarray:
    shape, dtype = [int(size) for size in entry["shape"]], np.dtype(_DTYPES[entry["dtype"]])
    begin, end = entry["data_offsets"]
    if (
        min(shape, default=0) < 0
        or not 0 <= begin <= end <= len(body)
        or math.prod(shape) * dtype.itemsize != end - begin
    ):
        raise ValueError("a tensor does not lie within the file")
    return np.ndarray(shape, dtype, body, begin)


def aligned(array: np.ndarray) -> np.ndarray:
    """`array` itself when it is contiguous, writable, native and at a multiple of 64 bytes, else such a copy."""
    flags = array.flags
    if flags.c_contiguous and flags.writeable and array.dtype.isnative and array.ctypes.data % ALIGNMENT == 0:
        return array
    copy = empty(array.shape, array.dtype.newbyteorder("="))
    np.copyto(copy, array)
    return copy


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array at a multiple of 64 bytes."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % ALIGNMENT
    return raw[begin : begin + size].view(dtype).reshape(shape)
