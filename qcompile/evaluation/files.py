"""Results as files: JSON and HTML, written whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qcompile.container import write_atomically
from qcompile.errors import ConfigError


def to_json(result: Any, **more: Any) -> str:
    """The fields of a dataclass, and `more`, as a JSON object. JSON has no infinity: "inf", "-inf" and "nan" stand
    for them."""
    return json.dumps(_plain({**asdict(result), **more}), indent=1, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(inner) for inner in value]
    return value


def write(path: str | Path, text: str) -> None:
    """Write `text`; a write that fails leaves the old file or none.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        write_atomically(os.fspath(path), text.encode())
    except OSError as error:
        raise ConfigError(
            f"the report cannot be written: {error.strerror}",
            where=str(path),
            remedy="check that the folder exists, may be written and has room",
        ) from error


def save(result: Any, path: str | Path) -> None:
    """Write `result` as its suffix says: .json or .html.

    Raises:
        ConfigError: it has another suffix.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".json":
        write(path, result.to_json())
    elif suffix in (".html", ".htm"):
        result.html(path)
    else:
        raise ConfigError(
            f"a report cannot be written as {suffix or 'a file without a suffix'}",
            where=str(path),
            remedy="name a .json or an .html file",
        )
