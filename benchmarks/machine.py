"""The machine that is measured, in words."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from benchmarks.engines.base import ROOT
from qcompile.device import processor

DOT_PRODUCTS = ("amx_int8", "avx512_vnni", "avx_vnni", "avx2", "asimddp", "i8mm")


def commit() -> str:
    """Which commit of this project is measured; "+" where files differ from it, other than what is written here."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/*.json", ":!docs")
    return (git("describe", "--always") or "no commit") + ("+" if changed else "")


def machine() -> dict[str, str]:
    """Processor, cores, instruction sets that matter here, memory, operating system."""
    cpuinfo: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        cpuinfo.setdefault(key.strip(), value.strip())  # those of the first core
    flags = (cpuinfo.get("flags") or cpuinfo.get("Features") or "").split()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "instruction sets": ", ".join(flag for flag in DOT_PRODUCTS if flag in flags),
        "memory": f"{memory / 2**30:.0f} GiB" + (", a virtual machine" if "hypervisor" in flags else ""),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }
