"""The targets by name, and what each row says of itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import tvm
from execution import CPUS, CUDA, TARGETS
from tvm.target.codegen import llvm_get_cpu_features

from qcompile import device
from qcompile.errors import DeviceError, TargetError
from qcompile.targets import Target, get, names, registry
from qcompile.targets.nvidia import Gpu

X86 = get("x86-avx512-vnni").features  # VNNI is the last of them
# What a processor must have to take dot products in this way.
NEEDS = {
    "vpdpbusd": "avx512vnni",
    "vpmaddubsw": "avx2",
    "vpxor_vpmaddubsw": "avx2",
    "sdot": "asimddp",
    "smull": "asimd",
}


def test_native_comes_first_and_every_name_is_known() -> None:
    assert names()[0] == "native"
    assert {"x86-avx512-vnni", "x86-avx2", "arm64-dotprod", "arm64-neon"} <= set(names())
    assert [get(name).name for name in TARGETS] == list(TARGETS)


@pytest.mark.parametrize(
    ("machine", "features", "best"),
    [
        ("x86_64", X86, "x86-avx512-vnni"),
        ("x86_64", X86[:-1], "x86-avx2"),
        ("x86_64", (*X86, "amxint8", "somethingnew"), "x86-avx512-vnni"),
        ("aarch64", ("fp", "asimd", "asimddp", "i8mm"), "arm64-dotprod"),
        ("aarch64", ("fp", "asimd"), "arm64-neon"),
    ],
)
def test_native_is_the_best_that_the_machine_can_run(
    machine: str, features: tuple[str, ...], best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "machine", lambda: (machine, frozenset(features)))
    assert get("native").name == best


@pytest.mark.parametrize(
    ("machine", "features"), [("x86_64", ("sse42",)), ("aarch64", ()), ("riscv64", ("avx2", "fma", "asimd"))]
)
def test_a_machine_that_fits_no_target_is_told_so(
    machine: str, features: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "machine", lambda: (machine, frozenset(features)))
    with pytest.raises(DeviceError, match=f"no target fits this machine .{machine}"):
        get("native")


GPUS = {
    f"cuda-sm_{number}": replace(get("x86-avx2"), name=f"cuda-sm_{number}", features=(f"sm_{number}",), rank=number)
    for number in (75, 80, 90)
}


@pytest.fixture
def _gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_table", lambda: GPUS)
    monkeypatch.setattr(device, "machine", lambda: ("x86_64", frozenset[str]()))


@pytest.mark.parametrize(("gpu", "best"), [((7, 5), 75), ((8, 9), 80), ((12, 0), 90)])
@pytest.mark.usefixtures("_gpus")
def test_cuda_is_the_best_that_the_gpu_can_run(
    gpu: tuple[int, int], best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_gpu", lambda: gpu)
    assert get("cuda").name == f"cuda-sm_{best}"


@pytest.mark.parametrize(
    ("gpu", "reason"),
    [
        ((7, 0), "this machine has a GPU that is sm_70, not sm_75 or later"),
        ("has no NVIDIA GPU", "this machine has no NVIDIA GPU"),
    ],
)
@pytest.mark.usefixtures("_gpus")
def test_without_a_gpu_that_fits_the_reason_is_said(gpu: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_gpu", lambda: gpu)
    with pytest.raises(DeviceError, match=reason) as caught:
        get("cuda")
    assert "cuda-sm_75, cuda-sm_80, cuda-sm_90" in str(caught.value)


def test_a_wrong_name_lists_the_right_ones() -> None:
    with pytest.raises(TargetError, match=r"did you mean 'x86-avx2'\?.* known targets: native, .*arm64-neon"):
        get("x86-avx")


@pytest.fixture
def fresh_table() -> Iterator[None]:
    """The table is read anew, and again afterwards."""
    registry._table.cache_clear()
    yield
    registry._table.cache_clear()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no.such.module:TARGET", "a target cannot be loaded: ModuleNotFoundError"),
        ("qcompile.targets.x86:NOTHING", "a target cannot be loaded: AttributeError"),
        ("qcompile.errors:TargetError", "is not a target"),
    ],
)
@pytest.mark.usefixtures("fresh_table")
def test_an_entry_point_that_gives_no_target_is_named(
    value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = EntryPoint("theirs", value, registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [broken])
    with pytest.raises(TargetError, match=message) as caught:
        names()
    assert str(caught.value.where).startswith(f"entry point 'theirs' ({value})")
    assert caught.value.remedy


@pytest.mark.parametrize("name", CPUS)
def test_a_target_asks_for_what_its_dot_products_need(name: str) -> None:
    target = get(name)
    assert {NEEDS[dot.name] for dot in target.isa.dots} <= set(target.features)


# What LLVM knows a processor to have, by its own names, and the compiler does not choose by itself: all x86-64 and all
# ARMv8-A has; for the system or on request only; a preference that needs nothing.
BASELINE = {"64bit", "64bit-mode", "cmov", "cx8", "fp-armv8", "fxsr", "mmx", "neon", "sse", "sse2", "v8a", "x87"}
ON_REQUEST = {
    *("adx", "aes", "clflushopt", "clwb", "crc32", "cx16", "fsgsbase", "invpcid", "nopl", "pclmul"),
    *("pku", "prfchw", "rdrnd", "rdseed", "sahf", "xsave", "xsavec", "xsaveopt", "xsaves"),
    *("CONTEXTIDREL2", "ccpp", "el2vmsa", "el3", "ete", "lor", "pan", "pan-rwv", "ras", "trbe", "uaops", "vh"),
}
PREFERENCE = re.compile(
    r"allow-|enable-|ermsb|false-deps-|fast|fuse-|idivq-to-divl|macrofusion|no-bypass-|slow-|tuning-|use-|vzeroupper"
)
# Where LLVM's name is not the system's.
NAMES = {"amx-int8": "amxint8", "amx-tile": "amxtile", "bmi": "bmi1", "dotprod": "asimddp", "lzcnt": "abm"}
IMPLIED = {
    "avx2": {"avx", "sse3", "ssse3", "sse4.1", "sse4.2"},
    "asimddp": {"v8.1a", "v8.2a", "crc", "lse", "rdm"},  # it came with ARMv8.2-A, which has these
}


@pytest.mark.parametrize("name", CPUS)
def test_a_target_asks_for_all_that_the_compiler_may_use(name: str) -> None:
    target = get(name)
    implied = {one for feature in target.features for one in IMPLIED.get(feature, ())}
    may_use = llvm_get_cpu_features(tvm.target.Target(target.tvm)) - BASELINE - ON_REQUEST - implied
    assert {NAMES.get(one, one) for one in may_use if not PREFERENCE.match(one)} <= set(target.features)


@pytest.mark.parametrize("name", CPUS)
def test_a_target_is_consistent(name: str) -> None:
    target = get(name)
    assert target.tvm["mtriple"].split("-")[0] == target.machine
    assert len(set(target.features)) == len(target.features)
    assert target.linkers
    isa = target.isa
    # The widest registers of the processor, and as many as it has.
    wide = {"avx512f": (16, 32), "avx2": (8, 16), "asimd": (4, 32)}
    assert (isa.lanes, isa.registers) == next(wide[f] for f in ("avx512f", "avx2", "asimd") if f in target.features)
    assert isa.offset == {"uint8": 128, "int8": 0}[isa.storage]


@pytest.mark.parametrize("name", CUDA)
def test_a_gpu_is_consistent(name: str) -> None:
    """All that code for it needs is the GPU: its host code is for every processor of the kind."""
    target = get(name)
    assert isinstance(target.isa, Gpu)
    assert (*target.features, f"cuda-{target.tvm['arch']}") == (target.isa.architecture, name)
    assert target.linkers
    may_use = llvm_get_cpu_features(tvm.target.Target(target.tvm["host"])) - BASELINE - ON_REQUEST
    assert all(map(PREFERENCE.match, may_use))


def test_the_dot_product_that_is_exact_for_every_weight_comes_last() -> None:
    extreme = np.full((1, 16, 4), -127, np.int8)
    for target in map(get, CPUS):
        assert target.isa.dot_for(extreme) is target.isa.dots[-1]


def test_native_for_bfloat16_is_what_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 code gains nothing from it: it stays the code that older machines run too, and whose kernels are tuned."""
    for features, best in (((*X86, "avx512bf16"), "x86-avx512-bf16"), (X86, "x86-avx512-vnni")):
        monkeypatch.setattr(registry, "machine", lambda features=features: ("x86_64", frozenset(features)))
        assert get("native", bfloat16=True).name == best
        assert get("native").name == "x86-avx512-vnni"


def test_native_has_the_matrix_unit_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    features = frozenset((*X86, "avx512bf16", "amxtile", "amxint8"))
    monkeypatch.setattr(registry, "machine", lambda: ("x86_64", features))
    assert get("native").name == get("native", bfloat16=True).name == "x86-amx"


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_of_two_targets_for_one_machine_the_higher_rank_needs_more(machine: str, bfloat16: bool) -> None:
    def rank(target: Target) -> int:
        return target.rank

    able = [get(name) for name in CPUS if get(name).machine == machine]
    ordered = sorted((t for t in able if (t.isa.bfloat16 is not None) == bfloat16), key=rank)
    assert len({target.rank for target in able}) == len(able)
    for low, high in pairwise(ordered):
        assert set(low.features) < set(high.features), f"{high.name} would be chosen over {low.name}"
