"""Tuning: which measured configs compile() uses, and whether it measures those that are missing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from qcompile.errors import ConfigError

_DEVICE = re.compile(r"(?P<key>[^@\s]+)@(?P<host>[^@:\s]+):(?P<port>\d+)")


@dataclass(frozen=True)
class Tuning:
    """What is known, or to be found out, about the fastest config of each kernel. No bit depends on it.

    Attributes:
        database: a file that tuning wrote, or a path where there is none yet; None: no such file. Several
            processes may use one file at once, and a process that is killed leaves it whole.
        measure: measure the kernels that the database does not know, and remember the best of each.
        device: where to measure, "KEY@HOST:PORT" of a TVM RPC tracker; default: on this machine.
        shipped: what neither of these knows is looked up in the database that ships with the package.

    Raises:
        ConfigError: `device` is not of that form, or there is nothing to measure on it; `database` is no path.
    """

    database: str | Path | None = None
    measure: bool = True
    device: str | None = None
    shipped: bool = True

    def __post_init__(self) -> None:
        if self.database is not None and not isinstance(self.database, (str, Path)):
            raise ConfigError(
                f"the tuning database is {self.database!r}", remedy='give its path, for example tuning="tuned.sqlite"'
            )
        if self.device is None:
            return
        found = _DEVICE.fullmatch(str(self.device))
        if found is None or not 0 < int(found["port"]) < 1 << 16:
            raise ConfigError(
                f"device is {self.device!r}", remedy='give "KEY@HOST:PORT", for example "pi5@127.0.0.1:9190"'
            )
        if self.database is None or not self.measure:
            raise ConfigError(
                "a device was given, and nothing to measure on it",
                remedy='give a database too: Tuning("tuned.sqlite", device=...)',
            )

    @property
    def address(self) -> tuple[str, int, str] | None:
        """(host, port, key) of `device`."""
        found = _DEVICE.fullmatch(self.device or "")
        return (found["host"], int(found["port"]), found["key"]) if found else None
