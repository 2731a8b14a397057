"""What runs in tuning's processes: on as many threads as it was asked for, or not at all."""

from __future__ import annotations

import pytest
import tvm

from qcompile.errors import ConfigError
from qcompile.executable import pool_size
from qcompile.targets import measure
from qcompile.targets.workers import Workers

LONG = 300.0  # seconds: nobody waits for it


def used_in_a_process(threads: int) -> int:
    def used(threads: int) -> int:
        with measure._device(threads, None):
            return int(tvm.get_global_func("runtime.NumThreads")())

    with Workers(1, LONG) as workers:
        return int(workers.submit(used, threads).result())


@pytest.mark.parametrize("threads", sorted({1, pool_size()}))
def test_a_process_uses_the_threads_that_it_was_asked_for(threads: int) -> None:
    assert used_in_a_process(threads) == threads


def test_fewer_threads_than_were_asked_for_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", "1")
    with pytest.raises(ConfigError, match="2 threads were asked for, and TVM's pool has 1"):
        used_in_a_process(2)
