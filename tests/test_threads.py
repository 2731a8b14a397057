"""Machine code and the threads and processes of its user: no thread is left behind, no child hangs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

from qcompile.errors import InputError
from qcompile.runtime import Model, load

ROOT = Path(__file__).resolve().parent.parent

CHILD = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import numpy as np, qcompile, tiny
from qcompile.errors import DeviceError
model, x = qcompile.load({path!r}), tiny.random_input(3)
{before}
child = os.fork()
if child == 0:
    try:
        right = np.array_equal(model(x)["y"], tiny.expected(x))
    except DeviceError as error:
        print(error, flush=True)
        os._exit(3)
    sys.exit(0 if right else 4)
print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


CORES = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
allowed = set({allowed})
os.sched_setaffinity(0, allowed)
import numpy as np, qcompile, tiny
from qcompile import device, executable

def workers():
    return [os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task") if int(task) != os.getpid()]

def runs_apart(core):
    "A call by a thread on `core` is right, leaves that thread where it may be, and puts workers on the other cores."
    executable.current_core = device.current_core = lambda: core
    x = tiny.random_input(8, core)
    assert np.array_equal(model(x)["y"], tiny.expected(x))
    assert os.sched_getaffinity(0) == allowed, os.sched_getaffinity(0)
    assert sorted(map(sorted, workers())) == [[other] for other in sorted(allowed - {{core}})], workers()

model = qcompile.load({path!r})
for core in [*allowed, *allowed]:
    runs_apart(core)
print("right")
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("threads") / "tiny.qcm"
    tiny.artifact("x86-avx2").save(file)
    return file


def threads_of_this_process(at_most: int = 0) -> int:
    """The system lists a thread for a moment after it was joined: waits up to a second for `at_most`."""
    stop = time.monotonic() + 1
    while (count := len(os.listdir("/proc/self/task"))) > at_most and time.monotonic() < stop:
        time.sleep(0.01)
    return count


def right_in_a_new_thread(model: Model, seed: int) -> bool:
    x, answers = tiny.random_input(5, seed), []
    thread = threading.Thread(target=lambda: answers.append(model(x)["y"]))
    thread.start()
    thread.join()
    return np.array_equal(answers[0], tiny.expected(x))


def test_calling_threads_leave_nothing_behind(path: Path) -> None:
    model = load(path)
    assert right_in_a_new_thread(model, 0)
    before = threads_of_this_process()
    assert all(right_in_a_new_thread(model, seed) for seed in range(20))
    assert threads_of_this_process(at_most=before) <= before


def test_an_error_in_another_thread_reaches_it(path: Path) -> None:
    model, caught = load(path), []

    def call() -> None:
        try:
            model(np.zeros((3, 1), np.int8))
        except InputError as error:
            caught.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert len(caught) == 1


def forked(path: Path, before: str) -> str:
    code = CHILD.format(root=str(ROOT), tests=str(ROOT / "tests"), path=str(path), before=before)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout


def test_a_child_may_run_what_its_parent_loaded(path: Path) -> None:
    assert forked(path, "") == "child 0\n"


def test_a_child_of_a_process_that_ran_a_model_is_told_so(path: Path) -> None:
    answer = forked(path, "model(x)")
    assert "forked after a model had run" in answer
    assert "spawn" in answer
    assert answer.endswith("child 3\n")


@pytest.mark.parametrize("first", [0, -1, -2], ids=["all", "the last", "the last two"])
def test_workers_keep_to_the_cores_of_the_process_and_off_the_callers(path: Path, first: int) -> None:
    allowed = sorted(os.sched_getaffinity(0))[first:]
    code = CORES.format(root=str(ROOT), tests=str(ROOT / "tests"), allowed=allowed, path=str(path))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TVM_")}
    clean["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's library would have a thread of its own
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=clean)
    assert done.stdout == "right\n", done.stderr
