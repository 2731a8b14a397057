"""The far side of `far.FarMachine`: a process that loads artifacts and runs them on what it is sent.

A message is a line of text and a list of arrays: two lengths (8 bytes each), the text, the arrays as
safetensors. Requests: "load PATH", "run PATH", "selftest PATH" (of the last one loaded). Answers:
"ok TEXT", or the class of an error and its text.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from typing import IO

import numpy as np

from qcompile import tensors
from qcompile.errors import QcompileError
from qcompile.runtime import Model, load


def send(stream: IO[bytes], text: str, arrays: Sequence[np.ndarray] = ()) -> None:
    first, second = text.encode(), tensors.encode({str(i): array for i, array in enumerate(arrays)})
    stream.write(struct.pack("<QQ", len(first), len(second)) + first + second)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[str, list[np.ndarray]]:
    """Raises EOFError when the other side has gone."""
    lengths = struct.unpack("<QQ", _read(stream, 16))
    text, data = (_read(stream, length) for length in lengths)
    return text.decode(), list(tensors.decode(data).values())


def _read(stream: IO[bytes], length: int) -> bytes:
    data = stream.read(length)
    if len(data) != length:
        raise EOFError
    return data


def _answer(models: dict[str, Model], request: str, arrays: list[np.ndarray]) -> tuple[str, list[np.ndarray]]:
    verb, _, path = request.partition(" ")
    if verb == "load":
        models.clear()  # one at a time
        models[path] = load(path)
        return "ok", []
    if verb == "run":
        return "ok", models[path].flat(*arrays)
    result = models[path].selftest()
    return f"ok {result.cases} {result.elements} {result.wrong}", []


def main() -> None:
    models: dict[str, Model] = {}
    while True:
        try:
            request, arrays = receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            text, outputs = _answer(models, request, arrays)
        except (QcompileError, RuntimeError, ValueError) as error:
            text, outputs = f"{type(error).__name__} {error}", []
        send(sys.stdout.buffer, text, outputs)


if __name__ == "__main__":
    main()
