"""One engine prepares one float model, in a process of its own; how long it takes, and how near it stays.

    main(ENGINE[, FOLDER])

FOLDER is a `Source`. Without it, only says whether the engine can be imported, and its versions.
"""

from __future__ import annotations

import os
import time
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.child import answer
from benchmarks.engines import ENGINES, Source


def prepare(name: str, folder: Path) -> dict[str, Any]:
    """Seconds are those of `Engine.prepare`, from the loaded source to the written files."""
    engine, source = ENGINES[name], Source(folder)
    assert source.calibration
    if engine.from_torch:
        assert source.program is not None
    start = time.perf_counter()
    path = engine.prepare(source)
    seconds = time.perf_counter() - start
    run = engine.load(path, os.cpu_count() or 1)
    held_out = [engine.arrange(x) for x in np.load(folder / "held_out.npy")]
    actual = np.concatenate([np.array(run(x)) for x in held_out])
    expected = np.load(folder / "expected.npy")
    noise = float(((expected - actual) ** 2).sum())
    return {
        "path": str(path),
        "prepare_s": seconds,
        "bytes": sum(file.stat().st_size for file in engine.files(path)),
        "sqnr_db": float(10 * np.log10((expected**2).sum() / noise)) if noise else None,
        "agreement": float((expected.argmax(1) == actual.argmax(1)).mean()),
    }


def main(name: str, *folder: str) -> None:
    engine = ENGINES[name]
    for module in engine.modules:
        import_module(module)
    answer(prepare(name, Path(folder[0])) if folder else {p: version(p) for p in engine.packages})
