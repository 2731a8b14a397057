"""QuantConfig: how a model is quantized. One frozen value, checked when it is made."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass

from qcompile.errors import ConfigError

OBSERVER_NAMES = ("minmax", "moving_average", "percentile")


@dataclass(frozen=True)
class QuantConfig:
    """How to quantize.

    Attributes:
        observer: what calibration measures of each activation. "minmax": the smallest and largest
            value ever seen. "moving_average": an exponential average of each batch's extremes.
            "percentile": the range that holds `percentile` per cent of all values.
        percentile: for "percentile", in (50, 100].
        averaging: for "moving_average", the weight of each new batch, in (0, 1].
        exclude: module paths that stay float, with their submodules; shell patterns
            ("layer1.*.conv2", "head"). A pattern that matches nothing is an error.

    Raises:
        ConfigError: a field is out of its range or names something unknown.
    """

    observer: str = "minmax"
    percentile: float = 99.99
    averaging: float = 0.1
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.observer not in OBSERVER_NAMES:
            raise ConfigError(f"unknown observer {self.observer!r}", remedy=f"use one of {', '.join(OBSERVER_NAMES)}")
        if not 50 < self.percentile <= 100:
            raise ConfigError(f"percentile is {self.percentile}", remedy="use a value in (50, 100], such as 99.99")
        if not 0 < self.averaging <= 1:
            raise ConfigError(f"averaging is {self.averaging}", remedy="use a value in (0, 1], such as 0.1")
        if isinstance(self.exclude, str) or not all(isinstance(p, str) and p for p in self.exclude):
            raise ConfigError(
                f"exclude is {self.exclude!r}", remedy="give a tuple of module path patterns, such as ('head',)"
            )
        object.__setattr__(self, "exclude", tuple(self.exclude))

    def excludes(self, path: str) -> str | None:
        """The pattern that keeps the module at `path` float, or None."""
        parts = path.split(".")
        prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return next((p for p in self.exclude for prefix in prefixes if fnmatch.fnmatchcase(prefix, p)), None)

    def check_exclude(self, paths: Iterable[str]) -> None:
        """Refuse an `exclude` pattern that matches none of the model's module `paths`.

        Raises:
            ConfigError: names the pattern and the paths most like it.
        """
        known = {".".join(path.split(".")[: i + 1]) for path in paths for i in range(path.count(".") + 1)} - {""}
        for pattern in self.exclude:
            if not any(fnmatch.fnmatchcase(path, pattern) for path in known):
                near = difflib.get_close_matches(pattern, sorted(known), n=3, cutoff=0.4) or sorted(known)[:3]
                raise ConfigError(
                    f"the exclude pattern {pattern!r} matches no module that computes something",
                    remedy=f"did you mean {' or '.join(near)}?" if near else "the model has no named submodules",
                )
