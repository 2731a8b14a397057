"""Machine code and the threads and processes of its user: no thread is left behind, no child hangs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
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
import os, sys, threading
sys.path[:0] = [{root!r}, {tests!r}]
allowed = {allowed}
os.sched_setaffinity(0, allowed)
import numpy as np, qcompile, tiny
from qcompile import device, executable, ffi

def workers():
    tasks = set(map(int, os.listdir("/proc/self/task"))) - known
    return sorted(sorted(os.sched_getaffinity(task)) for task in tasks)

def right(model):
    before, x = os.sched_getaffinity(0), tiny.random_input(8, 1)
    assert np.array_equal(model(x)["y"], tiny.expected(x))
    assert os.sched_getaffinity(0) == before, (before, os.sched_getaffinity(0))

def apart(core):
    "A call by a thread on `core` puts workers on the other cores."
    executable.current_core = device.current_core = lambda: core
    right(model)
    assert workers() == [[other] for other in sorted(allowed - {{core}})], (core, workers())

def used():
    return ffi.call(ffi.function("runtime.NumThreads"))

known = {{os.getpid()}}
model = qcompile.load({path!r})
{then}
print("right")
"""

SEVERAL = len(os.sched_getaffinity(0)) > 1
IN_TURN = "for core in [*allowed, *allowed]: apart(core)"
PINNED_FIRST = """
one = min(allowed)
os.sched_setaffinity(0, {one})
right(model)
assert used() == len(allowed) and set(map(tuple, workers())) == {(one,)}, (used(), workers())
right(qcompile.load(model_path, threads=len(allowed)))
os.sched_setaffinity(0, allowed)
apart(one)
"""
FROM_A_PINNED_THREAD = """
def pinned():
    known.add(threading.get_native_id())
    os.sched_setaffinity(0, {min(allowed)})
    right(model)
thread = threading.Thread(target=pinned)
thread.start()
thread.join()
owner = [task for task in map(int, os.listdir("/proc/self/task")) if os.sched_getaffinity(task) == allowed]
assert len(owner) == 2, "the main thread, and the one that runs calls of others"
assert executable.OWNER._executor.submit(used).result() == len(allowed)
"""
MORE_THAN_CORES = """
many = len(allowed) + 3
right(qcompile.load(model_path, threads=many))
assert used() == many
right(qcompile.load(model_path, threads=2))
assert used() == 2
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


def in_a_process_of_its_own(path: Path, then: str, allowed: Iterable[int], **variables: str) -> None:
    then = then.replace("model_path", repr(str(path)))
    code = CORES.format(root=str(ROOT), tests=str(ROOT / "tests"), allowed=set(allowed), path=str(path), then=then)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TVM_")}
    clean["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's library would have a thread of its own
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=clean | variables
    )
    assert done.stdout == "right\n", done.stderr


@pytest.mark.parametrize("first", [0, -1, -2], ids=["all", "the last", "the last two"])
def test_workers_keep_to_the_cores_of_the_process_and_off_the_callers(path: Path, first: int) -> None:
    in_a_process_of_its_own(path, IN_TURN, sorted(os.sched_getaffinity(0))[first:])


@pytest.mark.skipif(not SEVERAL, reason="there is one core")
@pytest.mark.parametrize("then", [PINNED_FIRST, FROM_A_PINNED_THREAD], ids=["the caller", "another thread"])
def test_who_may_use_one_core_at_first_does_not_keep_the_others_from_it(path: Path, then: str) -> None:
    in_a_process_of_its_own(path, then, os.sched_getaffinity(0))


@pytest.mark.parametrize("count", [1, None])
def test_there_may_be_more_threads_than_cores(path: Path, count: int | None) -> None:
    allowed = sorted(os.sched_getaffinity(0))[:count]
    in_a_process_of_its_own(path, MORE_THAN_CORES, allowed, TVM_NUM_THREADS=str(len(allowed) + 3))


def test_who_binds_threads_otherwise_is_let(path: Path) -> None:
    everywhere = "right(model); assert workers() == [sorted(allowed)] * (len(allowed) - 1), workers()"
    in_a_process_of_its_own(path, everywhere, os.sched_getaffinity(0), TVM_BIND_THREADS="0")
