"""Which processor this is, and what it can do: read before any foreign code is loaded.

On x86-64 Linux the flags of /proc/cpuinfo name what the processor has and the system enabled
(avx512_vnni is written avx512vnni here, and so on). On AArch64 the kernel hands every process its
capabilities in the auxiliary vector, AT_HWCAP and AT_HWCAP2 ("ARM64 ELF hwcaps" in the Linux kernel's
documentation); that is right under an emulator too, where /proc/cpuinfo shows the host.

A feature "sm_80" is a GPU of NVIDIA's of compute capability 8.0 or later. Its driver is asked, but only for code that
needs one: starting it takes longer than all else.

Part of every start of a deployed process: it imports as little as it can.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from functools import cache

_AT_HWCAP, _AT_HWCAP2 = 16, 26
_AMX = frozenset({"amxtile", "amxint8", "amxbf16", "amxfp16", "amxcomplex"})
# Numbers of arch/x86/include/uapi/asm/prctl.h, and of the system call.
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18
# Bit numbers of arch/arm64/include/uapi/asm/hwcap.h.
_HWCAP = {"fp": 0, "asimd": 1, "fphp": 9, "asimdhp": 10, "asimddp": 20, "sve": 22}
_HWCAP2 = {"sve2": 1, "i8mm": 13, "bf16": 14}
_GPU = "sm_"  # how features of GPUs begin
_DRIVER = "libcuda.so.1"
_CUDA = (
    13000  # the version of CUDA that TVM's runtime is built with, as the driver writes it: 1000 * major + 10 * minor
)
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


def _architecture() -> str:
    if hasattr(os, "uname"):
        name = os.uname().machine
    else:
        import platform

        name = platform.machine()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name.lower(), name.lower())


def _cpuinfo() -> str:
    with open("/proc/cpuinfo") as file:
        return file.read()


def _x86_features(cpuinfo: str) -> frozenset[str]:
    flags = next((line.partition(":")[2] for line in cpuinfo.splitlines() if line.startswith("flags")), "")
    return frozenset(flag.replace("_", "") for flag in flags.split())


@cache
def libc() -> ctypes.CDLL:
    """The C library of this process."""
    return ctypes.CDLL(None)


def _may_use_amx(found: frozenset[str]) -> bool:
    """Ask Linux for the tile registers, which it keeps from a process until then ("Using XSTATE features in user
    space applications" in its documentation)."""
    if "amxtile" not in found:
        return False
    request = (ctypes.c_long(number) for number in (_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA))
    return bool(libc().syscall(*request) == 0)


def _arm_features(hwcap: int, hwcap2: int) -> frozenset[str]:
    found = [name for name, bit in _HWCAP.items() if hwcap >> bit & 1]
    return frozenset(found + [name for name, bit in _HWCAP2.items() if hwcap2 >> bit & 1])


@cache
def machine() -> tuple[str, frozenset[str]]:
    """The architecture ("x86_64", "aarch64", ...) and the names of the features it has.

    An architecture or system that is neither has no known features: an artifact for it cannot exist.
    """
    name = _architecture()
    if sys.platform != "linux":
        return name, frozenset()
    if name == "x86_64":
        found = _x86_features(_cpuinfo())
        return name, found if _may_use_amx(found) else found - _AMX
    if name == "aarch64":
        getauxval = libc().getauxval
        getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
        return name, _arm_features(getauxval(_AT_HWCAP), getauxval(_AT_HWCAP2))
    return name, frozenset()


def lacks(wanted_machine: str, features: Iterable[str]) -> str:
    """What this machine lacks to run code for `wanted_machine` with `features`; "" when nothing."""
    name, found = machine()
    if name != wanted_machine:
        return f"is {name}, not {wanted_machine}"
    features = list(features)
    missing = [feature for feature in features if feature not in found and not feature.startswith(_GPU)]
    if missing:
        return f"lacks {', '.join(missing)}"
    return next(filter(None, (_gpu_lacks(feature) for feature in features if feature.startswith(_GPU))), "")


def capability(feature: str) -> tuple[int, int] | None:
    """The compute capability that a feature stands for: (8, 0) for "sm_80"; None where it is none of a GPU."""
    number = feature.removeprefix(_GPU)
    return (int(number[:-1]), int(number[-1])) if feature != number and number.isdecimal() and number[1:] else None


def gpu() -> tuple[int, int] | None:
    """The compute capability of the first GPU; None where there is none that code for GPUs can run on."""
    found = _gpu()
    return None if isinstance(found, str) else found


def _gpu_lacks(feature: str) -> str:
    found, wanted = _gpu(), capability(feature)
    if isinstance(found, str):
        return found
    if wanted is None:
        return f"lacks {feature}"
    return "" if found >= wanted else f"has a GPU that is {_GPU}{found[0]}{found[1]}, not {feature} or later"


@cache
def _gpu() -> tuple[int, int] | str:
    """The compute capability of the first GPU, or why there is none."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return f"has no NVIDIA driver ({_DRIVER} cannot be loaded)"
    number = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(number))
    if number.value < _CUDA:
        old, needed = (f"{version // 1000}.{version % 1000 // 10}" for version in (number.value, _CUDA))
        return f"has an NVIDIA driver for CUDA {old}, and needs one for CUDA {needed} or later"
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(number))
    if status == _NO_DEVICE or not (status or number.value):
        return "has no NVIDIA GPU"
    found = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        status = status or driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, 0)
        found.append(number.value)
    return f"has an NVIDIA driver that does not start (error {status} of CUDA)" if status else (found[0], found[1])


def gpu_name() -> str:
    """What the first GPU is called; "" where there is none that code for GPUs can run on."""
    name = ctypes.create_string_buffer(256)
    if gpu() is None or ctypes.CDLL(_DRIVER).cuDeviceGetName(name, len(name), 0):
        return ""
    return name.value.decode(errors="replace")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def current_core() -> int:
    """The core that the calling thread is on. Linux only."""
    return int(libc().sched_getcpu())


def pool_cores() -> list[int]:
    """The cores that this process may use: the calling thread's, then the others, the fastest first. Linux only."""
    own = current_core()
    others = sorted(os.sched_getaffinity(0) - {own})
    if len(others) > 1:
        others.sort(key=_frequency, reverse=True)
    return [own, *others]


def _frequency(core: int) -> int:
    """The most that a core's clock can be, in kHz; 0 where the system does not say."""
    try:
        with open(f"/sys/devices/system/cpu/cpu{core}/cpufreq/cpuinfo_max_freq") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0


def processor() -> str:
    """What this processor is called; a virtual machine's name may say little, so with family and model."""
    lines = _cpuinfo().splitlines() if sys.platform == "linux" else []
    pairs = (line.partition(":") for line in reversed(lines))  # reversed: those of the first core win
    cpu = {key.strip(): value.strip() for key, _, value in pairs}
    name = cpu.get("model name", _architecture())
    return f"{name} (family {cpu['cpu family']}, model {cpu['model']})" if "cpu family" in cpu else name
