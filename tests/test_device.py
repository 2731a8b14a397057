"""What the machine is said to have is what it has."""

from __future__ import annotations

from pathlib import Path

import arm
import pytest

from qcompile import device


def test_x86_flags_lose_their_underscores() -> None:
    cpuinfo = "processor\t: 0\nflags\t\t: fpu avx2 fma avx512_vnni avx_vnni sse4_1\nflags\t\t: other\n"
    assert device._x86_features(cpuinfo) == {"fpu", "avx2", "fma", "avx512vnni", "avxvnni", "sse41"}


def test_tile_registers_count_only_where_the_system_gives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = "flags\t\t: fpu avx2 amx_bf16 amx_tile amx_int8\n"
    monkeypatch.setattr(device, "_architecture", lambda: "x86_64")
    monkeypatch.setattr(device, "_cpuinfo", lambda: cpuinfo)
    for given, features in ((True, {"fpu", "avx2", "amxbf16", "amxtile", "amxint8"}), (False, {"fpu", "avx2"})):
        monkeypatch.setattr(device, "_may_use_amx", lambda found, given=given: given)
        assert device.machine.__wrapped__()[1] == features


@pytest.mark.parametrize(
    ("hwcap", "hwcap2", "features"),
    [
        (0b11, 0, {"fp", "asimd"}),
        (1 << 20 | 0b11, 1 << 13, {"fp", "asimd", "asimddp", "i8mm"}),
        (1 << 22, 0b10, {"sve", "sve2"}),
        (0, 0, set()),
    ],
)
def test_arm_capabilities_are_bits(hwcap: int, hwcap2: int, features: set[str]) -> None:
    assert device._arm_features(hwcap, hwcap2) == features


def test_this_machine_lacks_nothing_that_it_has() -> None:
    name, features = device.machine()
    assert not device.lacks(name, features)
    assert device.lacks(name, ["no-such-feature", *features]) == "lacks no-such-feature"
    assert device.lacks("s390x", []) == f"is {name}, not s390x"


@pytest.mark.parametrize(("cpu", "dot", "i8mm"), [("max", True, True), ("cortex-a72", False, False)])
def test_an_emulated_processor_is_seen_as_it_is(cpu: str, dot: bool, i8mm: bool, arm_machine: arm.ArmMachine) -> None:
    done = arm.run("-c", "from qcompile.device import machine; print(*machine()[1], machine()[0])", cpu=cpu)
    features = done.stdout.split()
    assert features[-1] == "aarch64", done.stderr
    assert "asimd" in features
    assert ("asimddp" in features, "i8mm" in features) == (dot, i8mm)


def test_cores_are_those_of_the_process() -> None:
    assert 1 <= device.cores() <= len(list(Path("/sys/devices/system/cpu").glob("cpu[0-9]*")))
