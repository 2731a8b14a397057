"""The tuning database: one file that several processes write, that a kill cannot harm, and that merges."""

from __future__ import annotations

import math
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qcompile.errors import ConfigError
from qcompile.targets import get
from qcompile.targets.database import FORMAT, Database, Entry, features_of, toolchain

TARGET = get("x86-avx2")
ENTRY = Entry(
    operator="conv",
    shape="1x8x8x16 -> 1x8x8x32",
    features=features_of(TARGET),
    toolchain=toolchain(),
    threads=2,
    config='{"rows": 3}',
    gain=1.25,
    microseconds=4.5,
    processor="a processor",
)
KEY = (ENTRY.operator, ENTRY.shape)

WRITER = """
import sys
from dataclasses import replace
from test_database import ENTRY, Database
database, name = Database(sys.argv[1]), sys.argv[2]
for i in range(int(sys.argv[3])):
    database.add(replace(ENTRY, shape=f"{name} {i}"))
    print(i, flush=True)
"""


def writer(path: Path, name: str, count: int) -> subprocess.Popen[str]:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{WRITER}"
    command = [sys.executable, "-c", code, str(path), name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_what_was_added_is_chosen(tmp_path: Path) -> None:
    database = Database(tmp_path / "new folder" / "tuned.sqlite")
    assert database.chosen(TARGET, 2) == {}
    database.add(ENTRY)
    database.add(replace(ENTRY, config='{"rows": 4}', gain=1.1))  # measured again: the newer counts
    assert database.chosen(TARGET, 2) == {KEY: {"rows": 4}}
    assert database.entries() == [replace(ENTRY, config='{"rows": 4}', gain=1.1)]


@pytest.mark.parametrize(
    "other",
    [
        replace(ENTRY, toolchain="qcompile 0.0.1, apache-tvm 0.20"),
        replace(ENTRY, features=features_of(get("x86-avx512-vnni"))),
        replace(ENTRY, features=features_of(get("arm64-neon"))),
    ],
)
def test_what_was_measured_for_other_code_is_not(tmp_path: Path, other: Entry) -> None:
    database = Database(tmp_path / "tuned.sqlite")
    database.add(other)
    assert database.chosen(TARGET, 2) == {}
    assert len(database.entries()) == 1


def test_another_number_of_threads_is_better_than_nothing(tmp_path: Path) -> None:
    database = Database(tmp_path / "tuned.sqlite")
    for threads in (1, 4, 16):
        database.add(replace(ENTRY, threads=threads, config=f'{{"rows": {threads}}}'))
    chosen = {threads: database.chosen(TARGET, threads)[KEY]["rows"] for threads in (1, 2, 4, 8, 12, 64)}
    assert chosen == {1: 1, 2: 1, 4: 4, 8: 4, 12: 16, 64: 16}
    assert database.chosen(TARGET, 2, exactly=True) == {}


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "tuned.sqlite"
    writers = [writer(path, f"process {i}", 30) for i in range(4)]
    assert [process.wait() for process in writers] == [0] * 4
    shapes = {entry.shape for entry in Database(path).entries()}
    assert shapes == {f"process {p} {i}" for p in range(4) for i in range(30)}


def test_a_killed_writer_loses_nothing_that_was_added(tmp_path: Path) -> None:
    path = tmp_path / "tuned.sqlite"
    for run in range(5):
        process = writer(path, f"run {run}", 100_000)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.02 * run)
        process.kill()
        reported = [line for line in process.stdout.read().splitlines() if line.isdigit()]
        process.wait()
        kept = {entry.shape for entry in Database(path).entries()}
        assert {f"run {run} {i}" for i in ("0", *reported)} <= kept


def test_merging_takes_what_is_new_or_gained_more(tmp_path: Path) -> None:
    ours, theirs = Database(tmp_path / "ours"), Database(tmp_path / "theirs")
    ours.add(ENTRY)
    ours.add(replace(ENTRY, shape="b", gain=1.5))
    theirs.add(replace(ENTRY, gain=1.3, config='{"rows": 9}'))
    theirs.add(replace(ENTRY, shape="b", gain=1.4, config='{"rows": 9}'))
    theirs.add(replace(ENTRY, shape="c"))
    assert ours.merge(theirs.path) == 2
    assert {entry.shape: (entry.gain, entry.config) for entry in ours.entries()} == {
        ENTRY.shape: (1.3, '{"rows": 9}'),
        "b": (1.5, ENTRY.config),
        "c": (1.25, ENTRY.config),
    }
    assert ours.merge(theirs.path) == 0


def test_a_file_of_another_kind_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database " * 100)
    with pytest.raises(ConfigError, match=r"cannot be used(.|\n)*notes.txt"):
        Database(path).add(ENTRY)
    assert path.read_text() == "not a database " * 100


def test_the_database_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("create table entries (name text)")
    connection.close()
    with pytest.raises(ConfigError, match="not a tuning database"):
        Database(path).chosen(TARGET, 2)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tuned.sqlite"
    Database(path).add(ENTRY)
    connection = sqlite3.connect(path)
    connection.execute("pragma user_version = 7")
    connection.close()
    with pytest.raises(ConfigError, match=f"its format is 7, this version reads {FORMAT}"):
        Database(path).entries()


def test_a_missing_database_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such tuning database(.|\n)*absent"):
        Database(tmp_path / "absent").entries()
    with pytest.raises(ConfigError, match="no such tuning database"):
        Database(tmp_path / "here").merge(tmp_path / "absent")
    assert not (tmp_path / "here").exists()


def test_a_database_that_another_process_is_just_making_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other writes between the questions that tell what the file is, or waits until they are answered."""
    path, others = tmp_path / "tuned.sqlite", [ENTRY]
    path.touch()

    class Interrupted(sqlite3.Connection):
        def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
            if "user_version" in sql and others:
                monkeypatch.setattr("qcompile.targets.database._WAIT", 0.0)
                with suppress(ConfigError):
                    Database(path).add(others.pop())
            return super().execute(sql, *arguments)

    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Interrupted))
    assert Database(path).entries() in ([], [ENTRY])
    assert not others
    Database(path).add(ENTRY)
    assert Database(path).entries() == [ENTRY]


def test_an_empty_file_is_one_that_nobody_has_written_to_yet(tmp_path: Path) -> None:
    path = tmp_path / "tuned.sqlite"
    path.touch()
    assert Database(path).chosen(TARGET, 2) == {}
    Database(path).add(ENTRY)
    assert Database(path).entries() == [ENTRY]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("config", "{"),
        ("config", "[1]"),
        ("config", b"\xff"),
        ("gain", "fast"),
        ("gain", math.inf),
        ("microseconds", b"1"),
    ],
)
def test_a_damaged_row_is_named_and_not_merged(tmp_path: Path, field: str, value: Any) -> None:
    good, bad = Database(tmp_path / "good"), Database(tmp_path / "bad")
    good.add(ENTRY)
    bad.add(replace(ENTRY, **{field: value}))
    with pytest.raises(ConfigError, match=r"damaged at conv(.|\n)*bad"):
        bad.chosen(TARGET, 2)
    with pytest.raises(ConfigError, match="damaged"):
        good.merge(bad.path)
    assert good.entries() == [ENTRY]


def test_text_that_is_none_is_said(tmp_path: Path) -> None:
    bad = Database(tmp_path / "bad")
    bad.add(ENTRY)
    with closing(sqlite3.connect(bad.path)) as connection:
        connection.execute("update entries set shape = cast(x'ff' as text)")
        connection.commit()
    with pytest.raises(ConfigError, match=r"cannot be used(.|\n)*bad"):
        bad.entries()


def test_a_place_that_cannot_be_written_to_is_found_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be used(.|\n)*file/tuned.sqlite"):
        Database(tmp_path / "file" / "tuned.sqlite").prepare()
