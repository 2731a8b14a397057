"""NVIDIA's runtime compiler (NVRTC), by ctypes: a library that needs neither a CUDA toolkit nor a GPU, and whose
version 12 knows GPUs that toolkits of version 13 have left behind."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import suppress
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p, create_string_buffer
from dataclasses import dataclass
from functools import cache
from typing import Any

from qcompile.cuda import installed
from qcompile.errors import BuildError

# The older one first: drivers read the PTX of their own and of earlier versions, and no later one's.
LIBRARIES = ("libnvrtc.so.12", "libnvrtc.so.13")
REMEDY = "pip install nvidia-cuda-nvrtc-cu12 (no GPU is needed)"
_SUCCESS, _COMPILATION = 0, 6  # nvrtcResult


@dataclass(frozen=True)
class Compiled:
    """The same code twice: `ptx`, from which a driver makes machine code, with the NUL that it reads up to; `cubin`,
    the machine code of one GPU."""

    ptx: bytes
    cubin: bytes


def library_for(capability: int) -> Any | None:
    """The functions of the first library here that compiles for a GPU of this compute capability, if there is one."""
    return next((library for library in _libraries() if capability in _capabilities(library)), None)


def compiled(library: Any, source: str, architecture: str, options: Sequence[str]) -> Compiled:
    """`source` for an architecture such as "sm_61".

    Raises:
        BuildError: the compiler refuses it; says why.
    """
    program = c_void_p()
    _check(library, library.nvrtcCreateProgram(byref(program), source.encode(), b"kernels.cu", 0, None, None))
    try:
        # A lambda with parameters of any type counts as host code there, unless told otherwise.
        given = [f"--gpu-architecture={architecture}", "--device-as-default-execution-space", *options]
        status = library.nvrtcCompileProgram(program, len(given), (c_char_p * len(given))(*map(str.encode, given)))
        if status == _COMPILATION:
            log = _text(library, "ProgramLog", program).rstrip(b"\0").decode(errors="replace").strip()
            raise BuildError("NVRTC failed", where=architecture, remedy=log or "see its output")
        _check(library, status)
        return Compiled(_text(library, "PTX", program), _text(library, "CUBIN", program))
    finally:
        library.nvrtcDestroyProgram(byref(program))


def _text(library: Any, what: str, program: c_void_p) -> bytes:
    size = c_size_t()
    _check(library, getattr(library, f"nvrtcGet{what}Size")(program, byref(size)))
    buffer = create_string_buffer(size.value)
    _check(library, getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(library: Any, status: int) -> None:
    if status != _SUCCESS:
        raise BuildError(f"NVRTC failed: {library.nvrtcGetErrorString(status).decode()}", remedy=REMEDY)


@cache
def _libraries() -> tuple[Any, ...]:
    return tuple(_load())


def _load() -> Iterator[Any]:
    for name in LIBRARIES:
        for path in (*installed(name), name):
            with suppress(OSError, AttributeError):
                yield _typed(ctypes.CDLL(path))
                break


def _typed(library: Any) -> Any:
    """`library` with the types of its functions. Raises AttributeError where it lacks one."""
    program = c_void_p
    library.nvrtcGetErrorString.argtypes, library.nvrtcGetErrorString.restype = (c_int,), c_char_p
    library.nvrtcCreateProgram.argtypes = POINTER(program), c_char_p, c_char_p, c_int, c_void_p, c_void_p
    library.nvrtcCompileProgram.argtypes = program, c_int, POINTER(c_char_p)
    library.nvrtcDestroyProgram.argtypes = (POINTER(program),)
    library.nvrtcGetNumSupportedArchs.argtypes = (POINTER(c_int),)
    library.nvrtcGetSupportedArchs.argtypes = (POINTER(c_int),)
    for what in ("ProgramLog", "PTX", "CUBIN"):
        getattr(library, f"nvrtcGet{what}Size").argtypes = program, POINTER(c_size_t)
        getattr(library, f"nvrtcGet{what}").argtypes = program, c_char_p
    return library


def _capabilities(library: Any) -> list[int]:
    count = c_int()
    _check(library, library.nvrtcGetNumSupportedArchs(byref(count)))
    found = (c_int * count.value)()
    _check(library, library.nvrtcGetSupportedArchs(found))
    return list(found)
