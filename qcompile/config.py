"""QuantConfig: how a model is quantized. One frozen value, checked when it is made."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from qcompile import selectors
from qcompile.errors import ConfigError
from qcompile.selectors import Selector, selects

PRESETS = {"fast": 0, "balanced": 32, "best": 128}  # name -> samples that are kept, to choose weights by
_KEPT_SAMPLES = 64  # without a preset, for a pipeline that asks for them
ACTIVATIONS = ("static", "dynamic", "float")
_GROUP = 128  # weights that share a scale, for weights of few bits
_OBSERVER_OF = {"percentile": "percentile", "averaging": "moving_average"}  # option -> the observer that it is for
OBSERVERS = ("minmax", "moving_average", "percentile", "mse", "lsq", "entropy")
PERCENTILE, AVERAGING = 99.99, 0.1  # where none is given


@dataclass(frozen=True)
class QuantConfig:
    """How to quantize.

    Attributes:
        preset: how much time to spend on accuracy. "fast": ranges by least squared error. "balanced": and weights
            chosen so that each layer makes up for what was lost before it. "best": the same from more samples.
            `default_pipeline` adds the pass.
        observer: what calibration makes of the values of each activation; default: "mse" with a preset,
            else "minmax". "minmax": the range from the
            smallest to the largest ever seen. "moving_average": an exponential average of each batch's
            extremes. "percentile": the range that holds `percentile` per cent of all values. "mse": the
            range with the smallest mean squared error, of rounding and of clipping together. "lsq": from there,
            scale and zero point refined to a local minimum of it. "entropy": the range with the smallest
            Kullback-Leibler divergence between the distribution of the values and that of the quantized ones.
        percentile: for "percentile", in (50, 100]; default 99.99.
        averaging: for "moving_average", the weight of each new batch, in (0, 1]; default 0.1.
        weight_bits: how many bits a weight has, 2 to 8: integers from -(2^(bits - 1) - 1) to 2^(bits - 1) - 1.
            Fewer than 8 are computed with, and stored, as int8; with activations="float", up to 4 are stored as int4.
        activations: what becomes of a layer's input. "static": int8, with a scale that calibration measures.
            "dynamic": int8, with a scale for each row that is found when the row is there. "float": it stays float, and
            the weights alone are integers. The last two are for linear layers; others then stay float.
        group_size: for activations="float", how many weights along a row of the matrix share a scale, a multiple of
            8; default: all of a row, and 128 where weights have up to 4 bits.
        exclude: layers that stay float (see `qcompile.selectors`): module paths with their submodules,
            as shell patterns ("layer1.*.conv2", "head"), classes of module, or predicates.
        overrides: selector -> other values of the fields above, for the weights of these layers and the activations
            that they compute; of several that select a layer, later ones win. A model's input is selected by its name.

    A selector that selects nothing is an error.

    Raises:
        ConfigError: a field is out of its range or names something unknown, or contradicts another.
    """

    observer: str | None = None
    percentile: float | None = None
    averaging: float | None = None
    exclude: tuple[Selector, ...] = ()
    overrides: Mapping[Selector, Mapping[str, Any]] = field(default_factory=dict)
    preset: str | None = None
    weight_bits: int = 8
    activations: str = "static"
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.preset is not None:
            _one_of("preset", self.preset, PRESETS)
        if self.observer is None:
            object.__setattr__(self, "observer", "minmax" if self.preset is None else "mse")
        _one_of("observer", self.observer, OBSERVERS)
        _in_range("percentile", self.percentile, 50, 100, "in (50, 100], such as 99.99")
        _in_range("averaging", self.averaging, 0, 1, "in (0, 1], such as 0.1")
        if type(self.weight_bits) is not int or not 2 <= self.weight_bits <= 8:
            raise ConfigError(f"weight_bits is {self.weight_bits!r}", remedy="use a whole number from 2 to 8")
        _one_of("activations", self.activations, ACTIVATIONS)
        size = self.group_size
        if size is not None and (type(size) is not int or size < 8 or size % 8):
            raise ConfigError(f"group_size is {size!r}", remedy="use a multiple of 8, such as 32, 64 or 128")
        if isinstance(self.exclude, Iterable) and not isinstance(self.exclude, (str, type)):
            object.__setattr__(self, "exclude", tuple(self.exclude))
        if not isinstance(self.exclude, tuple) or not _all_selectors(self.exclude):
            raise ConfigError(
                f"exclude is {self.exclude!r}", remedy="give a tuple of module path patterns, such as ('head',)"
            )
        nested = isinstance(self.overrides, Mapping) and all(isinstance(v, Mapping) for v in self.overrides.values())
        if not nested or not _all_selectors(self.overrides):
            raise ConfigError(
                f"overrides is {self.overrides!r}",
                remedy="give a dict such as {'head': {'observer': 'percentile'}}",
            )
        object.__setattr__(self, "overrides", {key: dict(value) for key, value in self.overrides.items()})
        each = [self, *(self._with(options, key) for key, options in self.overrides.items())]
        for name, observer in _OBSERVER_OF.items():
            if getattr(self, name) is not None and not any(config.observer == observer for config in each):
                raise ConfigError(
                    f"{name} is {getattr(self, name)}, and no activation is observed by {observer!r}",
                    where=name,
                    remedy=f"add observer={observer!r}, or leave {name} out",
                )
        if self.group_size is not None and not any(config.activations == "float" for config in each):
            raise ConfigError(
                f"group_size is {self.group_size}, and no layer has activations='float'",
                where="group_size",
                remedy="add activations='float', or leave group_size out",
            )

    def group_of(self, features: int) -> int:
        """How many of `features` weights of a row share a scale."""
        few = _GROUP if self.weight_bits <= 4 else features
        return min(features, self.group_size or few)

    @property
    def weight_max(self) -> int:
        """The largest integer that a weight may be."""
        return 2 ** (self.weight_bits - 1) - 1

    @property
    def kept_samples(self) -> int:
        """How many samples calibration keeps, for passes that run the model again."""
        return _KEPT_SAMPLES if self.preset is None else PRESETS[self.preset]

    def _with(self, options: Mapping[str, Any], selector: Selector) -> QuantConfig:
        """This configuration with the options of an override."""
        place, known = (
            f"overrides[{selector!r}]",
            ("observer", *_OBSERVER_OF, "weight_bits", "activations", "group_size"),
        )
        unknown = [name for name in options if name not in known]
        if unknown or not options:
            raise ConfigError(
                f"an override has {'no options' if not options else f'an unknown option {unknown[0]!r}'}",
                where=place,
                remedy=f"it may have {', '.join(known)}",
            )
        observer = options.get("observer", self.observer)
        for name, wanted in _OBSERVER_OF.items():
            if options.get(name) is not None and observer != wanted:
                raise ConfigError(
                    f"{name} is for the observer {wanted!r}, not for {observer!r}",
                    where=place,
                    remedy=f"add 'observer': {wanted!r}, or leave {name} out",
                )
        activations = options.get("activations", self.activations)
        if options.get("group_size") is not None and activations != "float":
            raise ConfigError(
                f"group_size is for activations='float', not for {activations!r}",
                where=place,
                remedy="add 'activations': 'float', or leave group_size out",
            )
        own: dict[str, Any] = {"group_size": self.group_size if activations == "float" else None}
        own |= {name: getattr(self, name) if observer == wanted else None for name, wanted in _OBSERVER_OF.items()}
        return replace(self, **{"exclude": (), "overrides": {}, "observer": observer, **own, **options})

    def of(self, nodes: Iterable[fx.Node]) -> QuantConfig:
        """The configuration of `nodes`: an operator and what it absorbs."""
        nodes, merged = list(nodes), self
        for selector, options in self.overrides.items():
            if any(selects(selector, node) for node in nodes):
                merged = merged._with(options, selector)
        return merged

    def excludes(self, node: fx.Node) -> Selector | None:
        """The selector that keeps `node` float, or None."""
        return next((selector for selector in self.exclude if selects(selector, node)), None)

    def check(self, operators: Iterable[fx.Node], inputs: Iterable[fx.Node]) -> None:
        """Refuse selectors that select none of a graph's operators (or, to override, inputs).

        Raises:
            ConfigError: names the selector, and the layers most like it.
        """
        operators = list(operators)
        selectors.check(self.exclude, operators, "exclude")
        selectors.check(self.overrides, [*operators, *inputs], "overrides")


def _one_of(name: str, value: Any, known: Collection[str]) -> None:
    if value not in list(known):  # a list asks for equality alone: the value may not be hashable
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f"did you mean {near[0]}? There are" if near else "use one of"
        raise ConfigError(f"unknown {name} {value!r}", remedy=f"{hint} {', '.join(known)}")


def _in_range(name: str, value: float | None, above: float, most: float, allowed: str) -> None:
    if value is not None and not (isinstance(value, (int, float)) and above < value <= most):
        raise ConfigError(f"{name} is {value!r}", remedy=f"use a value {allowed}")


def _all_selectors(values: Iterable[Any]) -> bool:
    return all(map(selectors.is_selector, values))
