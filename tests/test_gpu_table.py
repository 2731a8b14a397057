"""The table of what GPUs got right."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gpu_table


def report(row: str, target: str, outcome: str = "passed", bits: Any = (), longrepr: Any = None) -> Any:
    properties = [("gpu cell", [row, target, "some test"]), *(("gpu bits", list(pair)) for pair in bits)]
    return SimpleNamespace(
        when="call",
        user_properties=properties,
        longrepr=longrepr,
        **{name: name == outcome for name in ("passed", "failed", "skipped")},
    )


def test_a_cell_says_what_was_compared_or_what_failed() -> None:
    crash = SimpleNamespace(reprcrash=SimpleNamespace(message="DeviceError: the GPU failed\nmore"))
    text = gpu_table.table(
        [
            report("conv2d", "cuda-sm_80", bits=[(0, 1200), (0, 34)]),
            report("conv2d", "cuda-sm_90", "failed", [(0, 10), (3, 10)]),
            report("linear", "cuda-sm_90", "failed", longrepr=crash),
            report("linear", "cuda-sm_61", "skipped", longrepr=("file", 1, "Skipped: no compiler for it")),
            report("linear", "cuda-sm_89", "skipped", longrepr=("file", 1, "Skipped: no compiler for it")),
            SimpleNamespace(user_properties=[], when="call", passed=True, failed=False, skipped=False),
        ]
    )
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert rows == [
        ["conv2d", "0 wrong of 1,234", "3 wrong of 20"],
        ["linear", "", "error: DeviceError: the GPU failed"],
    ]
    assert text.endswith("not run: no compiler for it\n")
    assert text.count("no compiler") == 1


def test_without_such_tests_there_is_no_table() -> None:
    assert gpu_table.table([]) == ""


def test_a_test_of_no_parameters_has_its_name_for_a_row() -> None:
    item: Any = SimpleNamespace(name="test_some_thing", originalname="test_some_thing", user_properties=[])
    gpu_table.name(item)
    assert item.user_properties == [("gpu cell", ["some thing", "cuda", "some thing"])]
