"""What tuning found, in one SQLite file.

SQLite gives what such a file needs: several processes write it at once, a process killed at any moment
leaves it whole, and two of them merge in one statement. A row is keyed by the operator, its shape, the
processor features that the machine code uses, the versions of what generates that code, and the threads
it was measured with. The name of the processor is written down for the reader; it is not part of the key.

A GPU has no threads to choose: its rows have none.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qcompile.errors import ConfigError
from qcompile.targets.base import Target
from qcompile.targets.workload import Chosen

SHIPPED = Path(__file__).parent / "tuned.sqlite"
"""What the benchmark models were tuned to; used where the user gives nothing better."""

FORMAT = 2
NO_THREADS = 0  # of a row for a GPU
_APPLICATION = 0x71636D74  # "qcmt": tells this file from any other that SQLite wrote
_WAIT = 30.0  # seconds for another process to finish writing


@dataclass(frozen=True)
class Entry:
    """One tuned kernel.

    Attributes:
        operator, shape: `Workload.key`.
        features: `features_of(target)`.
        toolchain: `toolchain()`.
        threads: it was measured with, or NO_THREADS.
        config: the fields of its config, as JSON; "{}" stands for the default, whatever that is.
        gain: how many times as fast as the default config it is.
        microseconds: of a call, on that machine.
        processor: its name.
    """

    operator: str
    shape: str
    features: str
    toolchain: str
    threads: int
    config: str
    gain: float
    microseconds: float
    processor: str


_COLUMNS = ", ".join(field.name for field in fields(Entry))
_CREATE = """
create table if not exists entries (
    operator text not null, shape text not null, features text not null, toolchain text not null,
    threads integer not null, config text not null, gain real not null, microseconds real not null,
    processor text not null,
    primary key (operator, shape, features, toolchain, threads)
)
"""
_REPLACE = ", ".join(f"{name} = excluded.{name}" for name in ("config", "gain", "microseconds", "processor"))
_MARKS = ", ".join("?" * len(fields(Entry)))
_PUT = f"insert into entries ({_COLUMNS}) values ({_MARKS}) on conflict do update set {_REPLACE}"


def features_of(target: Target) -> str:
    return f"{target.machine}: {' '.join(target.features)}"


def toolchain() -> str:
    """What the machine code of a config depends on."""
    return f"qcompile {version('qcompile')}, apache-tvm {version('apache-tvm')}"


def nearest(entries: Iterable[Entry], target: Target, threads: int) -> Chosen:
    """The configs for `target`, of each kernel the one measured with a number of threads nearest to `threads`; of
    two that are as near the later of `entries`."""
    key = features_of(target), toolchain()
    found = [entry for entry in entries if (entry.features, entry.toolchain) == key]
    found.sort(key=lambda entry: -abs(entry.threads - threads))  # the nearest last: it wins
    return {(entry.operator, entry.shape): json.loads(entry.config) for entry in found}


class Database:
    """A tuning database; every call opens the file anew, so it may be shared and even replaced meanwhile."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def add(self, entry: Entry) -> None:
        """Remember `entry`, in place of an older one with its key. Safely on disk when this returns."""
        with self._write() as connection:
            connection.execute(_PUT, astuple(entry))

    def merge(self, other: str | Path) -> int:
        """Take over the entries of `other` that are new or have the greater gain; returns how many.

        Raises:
            ConfigError: either is no tuning database.
        """
        taken = Database(other).entries()
        with self._write() as connection:
            before = connection.total_changes
            connection.executemany(f"{_PUT} where excluded.gain > entries.gain", map(astuple, taken))
            return connection.total_changes - before

    def entries(self) -> list[Entry]:
        """All of them.

        Raises:
            ConfigError: the file is missing, or no tuning database.
        """
        if not self.path.is_file():
            raise ConfigError("there is no such tuning database", where=str(self.path), remedy="check the path")
        # Whoever reads a file that a killed writer left half done puts it right first, if he may.
        with self._open("rw" if os.access(self.path, os.W_OK) else "ro", "deferred") as connection:
            if not connection.execute("pragma user_version").fetchone()[0]:
                return []  # whoever made the file has not written to it yet
            return [self._entry(row) for row in connection.execute(f"select {_COLUMNS} from entries")]

    def _entry(self, row: tuple[Any, ...]) -> Entry:
        entry = Entry(*row)
        try:
            measured = math.isfinite(entry.gain) and math.isfinite(entry.microseconds)
            sound = measured and isinstance(entry.threads, int) and isinstance(json.loads(entry.config), dict)
        except (TypeError, ValueError):
            sound = False
        if not sound:
            raise ConfigError(
                f"the tuning database is damaged at {entry.operator} {entry.shape}",
                where=str(self.path),
                remedy="delete the file and tune again, or take a copy of it",
            )
        return entry

    def chosen(self, target: Target, threads: int, *, exactly: bool = False) -> Chosen:
        """The `nearest` of its configs, or only those measured with `threads`; none where there is no file yet.

        Raises:
            ConfigError: the file is no tuning database.
        """
        entries = self.entries() if self.path.exists() else []
        return nearest([e for e in entries if e.threads == threads or not exactly], target, threads)

    def prepare(self) -> None:
        """Make the file where there is none; a place that cannot be written to is found before any work.

        Raises:
            ConfigError: it cannot be written to, or is no tuning database.
        """
        with self._write():
            pass

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """A transaction that no other process writes beside."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from error
        with self._open("rwc", "immediate") as connection:
            if not connection.execute("pragma user_version").fetchone()[0]:
                connection.execute(_CREATE)
                connection.execute(f"pragma user_version = {FORMAT}")
                connection.execute(f"pragma application_id = {_APPLICATION}")
            yield connection

    @contextmanager
    def _open(self, mode: str, lock: str) -> Iterator[sqlite3.Connection]:
        """A transaction. What the file is, is asked within: another process may just be making it."""
        try:
            uri = f"{self.path.absolute().as_uri()}?mode={mode}"
            with closing(sqlite3.connect(uri, uri=True, timeout=_WAIT, isolation_level=None)) as connection:
                connection.execute(f"begin {lock}")
                self._check(connection)
                yield connection
                connection.execute("commit")
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"the tuning database cannot be used: {error}",
            where=str(self.path),
            remedy="give a file that tuning wrote, or a path without a file in a folder that can be written",
        )

    def _check(self, connection: sqlite3.Connection) -> None:
        """Refuse what is not a tuning database of this format; an empty file may become one."""
        application, found = (
            connection.execute(f"pragma {p}").fetchone()[0] for p in ("application_id", "user_version")
        )
        tables = connection.execute("select count(*) from sqlite_master").fetchone()[0]
        if tables and (application, found) != (_APPLICATION, FORMAT):
            known = application == _APPLICATION
            raise ConfigError(
                f"its format is {found}, this version reads {FORMAT}" if known else "it is not a tuning database",
                where=str(self.path),
                remedy="give a path where there is no file yet: tuning makes a new one",
            )
