"""Build the folder in which qemu runs AArch64 Python: `python tests/arm_sysroot.py`.

Python comes from Debian's arm64 packages, NumPy and TVM's runtime from the AArch64 wheels; all are
unpacked under .cache/, and nothing on the machine changes (apt works with lists of its own, as any
user). A second call finds it done. Ends with 1 and one line of explanation where it cannot be built.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SYSROOT = ROOT / ".cache" / "aarch64"
READY = SYSROOT / "ready.txt"
# What the interpreter, the extension modules of its library that we use, and NumPy link to.
_LIBRARIES = ("libc6", "libgcc-s1", "libstdc++6", "zlib1g", "libexpat1", "libssl3", "libffi8", "libbz2-1.0", "liblzma5")
_RUNTIME_FILES = re.compile(r"tvm/__init__\.py|tvm/lib/libtvm_runtime\.so")  # of 250 MB, the 3 that a device needs


class Unavailable(Exception):
    """The folder cannot be built here, and why."""


def key() -> str:
    """What the folder is built from: another key means it must be built anew."""
    return f"apache-tvm {version('apache-tvm')}\napache-tvm-ffi {version('apache-tvm-ffi')}\n"


def _run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise Unavailable(f"`{' '.join(command[:2])}` failed: {' '.join(last)}")
    return done.stdout


def _debian_python(folder: Path, root: Path) -> str:
    """Unpack Debian's Python for arm64 into `root`; returns its version, as "3.11"."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise Unavailable("AArch64 Python is taken from Debian packages, and this system has no apt-get")
    for part in ("lists/partial", "cache/archives/partial", "debs"):
        (folder / part).mkdir(parents=True)
    private = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "",
        "Dir::State::Lists": str(folder / "lists"),
        "Dir::State::status": "/dev/null",
        "Dir::Cache": str(folder / "cache"),
    }
    options = [f"-o{name}={value}" for name, value in private.items()]
    _run("apt-get", *options, "update", cwd=folder)
    depends = _run("apt-cache", *options, "depends", "python3-minimal", cwd=folder)
    found = re.search(r"Depends: python(3\.\d+)-minimal", depends)
    if not found:
        raise Unavailable("the package lists hold no arm64 Python")
    name = f"python{found[1]}"
    packages = [f"{name}-minimal", f"lib{name}-minimal", f"lib{name}-stdlib", *_LIBRARIES]
    _run("apt-get", *options, "download", *packages, cwd=folder / "debs")
    for package in sorted((folder / "debs").glob("*.deb")):
        _run("dpkg-deb", "-x", str(package), str(root), cwd=folder)
    return found[1]


def _wheels(folder: Path, site: Path, python: str) -> None:
    """Unpack NumPy and TVM's runtime into `site`."""
    wanted = [f"apache-tvm=={version('apache-tvm')}", f"apache-tvm-ffi=={version('apache-tvm-ffi')}"]
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (28, 27, 24, 17)]
    where = ["--platform=manylinux2014_aarch64", f"--python-version={python}", f"--dest={folder / 'wheels'}"]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--no-deps"]
    _run(*pip, *platforms, *where, *wanted, "numpy>=1.26", "typing_extensions", cwd=folder)
    for wheel in sorted((folder / "wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            if wheel.name.startswith("apache_tvm-"):
                names = [name for name in names if _RUNTIME_FILES.fullmatch(name)]
            archive.extractall(site, names)


def build() -> None:
    """Build the folder, unless it is there.

    Raises:
        Unavailable: not possible here; says why.
    """
    if READY.exists() and READY.read_text() == key():
        return
    SYSROOT.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="aarch64-", dir=SYSROOT.parent) as temporary:
        folder = Path(temporary)
        root = folder / "root"
        root.mkdir()
        python = _debian_python(folder, root)
        _wheels(folder, root / "site", python)
        os.symlink(f"python{python}", root / "usr" / "bin" / "python")
        (root / READY.name).write_text(key())
        shutil.rmtree(SYSROOT, ignore_errors=True)
        root.rename(SYSROOT)


if __name__ == "__main__":
    try:
        build()
    except Unavailable as reason:
        sys.exit(f"the ARM tests will skip: {reason}")
