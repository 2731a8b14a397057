"""The tuning database that ships with the package: nothing in it is out of date."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from execution import TARGETS

from qcompile.targets import get
from qcompile.targets.base import InstructionSet
from qcompile.targets.cpu.choose import generator_for
from qcompile.targets.database import SHIPPED, Database, Entry, features_of, toolchain
from qcompile.targets.filters import ConvShape, Filters
from qcompile.targets.layout import Layout
from qcompile.targets.workload import describe

SHAPE = ConvShape(
    x=Layout((1, 64, 14, 14), True, 64, (1, 1, 1, 1)),
    y=Layout((1, 96, 14, 14), True, 96),
    residual=Layout((1, 96, 14, 14), True, 112, (0, 1, 2, 3)),
    kernel=(3, 3),
    stride=(1, 1),
    padding=(1, 1),
    dilation=(1, 1),
    groups=1,
)


def filters(shape: ConvShape, dot: str) -> Filters:
    """Some with which this dot product is exact; a config depends on nothing else of them."""
    most = 1 if dot == "vpmaddubsw" else 127
    size = (shape.y.channels, shape.x.channels // shape.groups, *shape.kernel)
    weight = np.random.default_rng(0).integers(-most, most + 1, size).astype(np.int8)
    weight.flat[:4] = most
    return Filters(weight, np.zeros(size[0], np.int32), np.ones(size[0], np.float32), x_zero_point=0)


def read(text: str) -> tuple[ConvShape, str]:
    """(shape, dot product) of what `describe` wrote."""
    parts = text.split(", ")

    def numbers(pattern: str, within: str) -> tuple[int, ...]:
        found = re.search(rf"{pattern}([\dx]+)", within)
        return tuple(map(int, found[1].split("x"))) if found else ()

    def pair(name: str) -> tuple[int, int]:
        first, second = numbers(f"{name} ", parts[1])
        return first, second

    def layout(place: str) -> Layout:
        batch, height, width, channels = numbers("^", place)
        top, bottom, left, right = numbers("halo ", place) or (0, 0, 0, 0)
        (pitch,) = numbers("pitch ", place)
        return Layout((batch, channels, height, width), True, pitch, (top, bottom, left, right))

    x, y = map(layout, parts[0].split(" -> "))
    kernel, stride, padding, dilation = (pair(name) for name in ("kernel", "stride", "padding", "dilation"))
    (groups,) = numbers("groups ", parts[1])
    residual = layout(parts[2].removeprefix("residual ")) if parts[2].startswith("residual ") else None
    return ConvShape(x, y, residual, kernel, stride, padding, dilation, groups), parts[-1]


def complaint(entry: Entry) -> str:
    """What is out of date in an entry; "" where nothing is."""
    target = next((t for t in map(get, TARGETS) if features_of(t) == entry.features), None)
    if target is None or entry.toolchain != toolchain():
        return "it is of another version"
    shape, dot = read(entry.shape)
    assert describe(shape, dot, ()) == entry.shape
    generator, config = generator_for(shape, target.isa), json.loads(entry.config)
    if generator.name != entry.operator:
        return f"{generator.name} computes it now"
    offered = [asdict(c) for c in generator.configs(shape, filters(shape, dot), target.isa)]
    if config == offered[0]:
        return "it pins what is the default today"
    return "" if config in [{}, *offered] else "its config is not offered any more"


def configs(isa: InstructionSet, dot: str) -> list[dict[str, Any]]:
    return [asdict(c) for c in generator_for(SHAPE, isa).configs(SHAPE, filters(SHAPE, dot), isa)]


@pytest.mark.parametrize(("target", "dot"), [("x86-avx512-vnni", "vpdpbusd"), ("x86-avx2", "vpmaddubsw")])
@pytest.mark.parametrize(
    ("config", "found"),
    [
        (lambda offered: {}, ""),
        (lambda offered: offered[1], ""),
        (lambda offered: offered[0], "pins what is the default"),
        (lambda offered: {**offered[0], "rows": 100}, "not offered"),
    ],
)
def test_what_is_out_of_date_is_seen(
    target: str, dot: str, config: Callable[[list[dict[str, Any]]], dict[str, Any]], found: str
) -> None:
    where = get(target)
    stored = json.dumps(config(configs(where.isa, dot)))
    entry = Entry(
        "conv", describe(SHAPE, dot, ()), features_of(where), toolchain(), 2, stored, 1.5, 10.0, "a processor"
    )
    assert bool(complaint(entry)) is bool(found)
    assert found in complaint(entry)
    assert complaint(replace(entry, toolchain="qcompile 0.0.1, apache-tvm 0.20"))
    assert complaint(replace(entry, operator="depthwise"))


def test_nothing_that_ships_is_out_of_date() -> None:
    found = {f"{entry.operator} {entry.shape}": complaint(entry) for entry in Database(SHIPPED).entries()}
    assert {entry: why for entry, why in found.items() if why} == {}


def test_what_ships_is_faster_than_the_default() -> None:
    for entry in Database(SHIPPED).entries():
        assert entry.microseconds > 0
        assert entry.gain > 1 if json.loads(entry.config) else entry.gain == 1
