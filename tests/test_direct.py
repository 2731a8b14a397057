"""A kernel that reads past the end of an input, or of its constants, is found."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from execution import native_vectors, skip_unless_runnable

READS = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from direct import call
from qcompile.targets import get
from qcompile.targets.function import Kernel, function
from tvm.tirx.script import builder as T

numbers = np.arange(100, dtype=np.int8)
constants = {"constant": numbers} if sys.argv[3] == "constant" else {}
with function("reads") as (args, done):
    x = args.buffer("x", numbers.size, "int8")
    (constant,) = args.constants(**constants) or (None,)
    y = args.buffer("y", 1, "int8")
    T.buffer_store(y, (constant or x)[int(sys.argv[4])], [0])
kernel = Kernel("reads", done.result, tuple(constants.values()))
print(call(kernel, get(sys.argv[2]), [numbers], 1, np.random.default_rng(0), dtype="int8")[0])
"""


@pytest.mark.parametrize("what", ["input", "constant"])
def test_reading_past_the_last_line_of_memory_ends_the_process(what: str) -> None:
    skip_unless_runnable(native_vectors())
    for place, status in ((99, 0), (128, -signal.SIGSEGV)):
        command = [sys.executable, "-c", READS, str(Path(__file__).parent), native_vectors(), what, str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        assert done.stdout == ("99\n" if status == 0 else "")
