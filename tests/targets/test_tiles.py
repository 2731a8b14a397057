"""The register tiles that are taken without measuring."""

from __future__ import annotations

import numpy as np
import pytest
from execution import CPUS

from qcompile.targets import get
from qcompile.targets.cpu.choose import generator_for
from qcompile.targets.cpu.conv import configs, dot_of
from qcompile.targets.cpu.epilogue import Requantize
from qcompile.targets.cpu.tasks import best_order
from qcompile.targets.filters import ConvShape, Filters
from qcompile.targets.layout import Layout


@pytest.mark.parametrize("target", CPUS)
@pytest.mark.parametrize(("channels", "size", "kernel"), [(64, 56, 3), (256, 14, 3), (512, 7, 3), (256, 28, 1)])
def test_the_default_tile_spends_its_time_on_products_not_on_loads(
    target: str, channels: int, size: int, kernel: int
) -> None:
    """A step of the sum loads its weights once and its activations once, and uses each several times."""
    isa, pad = get(target).isa, kernel // 2
    weight = np.random.default_rng(0).integers(-127, 128, (channels, channels, kernel, kernel), dtype=np.int8)
    filters = Filters(weight, np.zeros(channels, np.int32), np.ones(channels, np.float32), 3)
    layout = Layout((1, channels, size, size), True, channels, (pad, pad, pad, pad))
    shape = ConvShape(layout, layout, None, (kernel, kernel), (1, 1), (pad, pad), (1, 1), 1)
    dot, best = dot_of(shape, filters, isa), configs(shape, filters, isa)[0]
    loads = dot.planes * best.vectors + best.rows
    assert loads <= dot.cycles * best.rows * best.vectors


def test_a_tile_of_a_small_image_takes_several_of_its_rows() -> None:
    """Its weights are loaded for fewer tiles then."""
    isa = get("x86-avx512-vnni").isa
    weight = np.random.default_rng(0).integers(-127, 128, (512, 512, 3, 3), dtype=np.int8)
    filters = Filters(weight, np.zeros(512, np.int32), np.ones(512, np.float32), 3)
    layout = Layout((1, 512, 7, 7), True, 512, (1, 1, 1, 1))
    best = configs(ConvShape(layout, layout, None, (3, 3), (1, 1), (1, 1), (1, 1), 1), filters, isa)[0]
    assert best.rows > 7
    assert best.rows % 7 == 0


@pytest.mark.parametrize("target", CPUS)
@pytest.mark.parametrize(("channels", "groups"), [(32, 1), (32, 32)])
def test_kernels_of_different_tiles_have_different_names(target: str, channels: int, groups: int) -> None:
    """By which tuning tells them apart; the order of the loops is in the name, too."""
    isa = get(target).isa
    weight = np.random.default_rng(0).integers(-127, 128, (channels, channels // groups, 3, 3), dtype=np.int8)
    filters = Filters(weight, np.zeros(channels, np.int32), np.ones(channels, np.float32), 3)
    layout = Layout((1, channels, 14, 14), True, channels, (1, 1, 1, 1))
    shape = ConvShape(layout, layout, None, (3, 3), (1, 1), (1, 1), (1, 1), groups)
    generator = generator_for(shape, isa)
    tiles = generator.configs(shape, filters, isa)[:6]
    names = [generator.kernel(shape, filters, Requantize(-128), isa, config=tile).name for tile in tiles]
    assert len(set(names)) == len(names) > 1


KIB, L2 = 1 << 10, 2 << 20


@pytest.mark.parametrize(
    ("order", "weights", "activations", "tiles"),
    [
        ("strips", 64 * KIB, 400 * KIB, 25),  # the image is what would come from other threads' caches
        ("channels", 2048 * KIB, 100 * KIB, 4),  # the weights are far more than that
        ("pixels", 64 * KIB, 400 * KIB, 3),  # strips would keep the threads waiting for each other
        ("pixels", 64 * KIB, 1600 * KIB, 200),  # for every block the image would come from beyond the cache again
    ],
)
def test_a_thread_reads_as_little_as_it_can_from_beyond_its_caches(
    order: str, weights: int, activations: int, tiles: int
) -> None:
    assert best_order(weights, activations, tiles, 8, L2) == order
