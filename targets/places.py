"""Where tuning measures, and what forbids to: found before any work, with what to do about it."""

from __future__ import annotations

import importlib.util
import socket

from qcompile.device import lacks
from qcompile.errors import ConfigError, DeviceError
from qcompile.executable import check_threads, pool_size
from qcompile.targets.base import Target
from qcompile.targets.database import NO_THREADS
from qcompile.targets.measure import LocalGpu, Place, Remote, pool_of
from qcompile.targets.nvidia import Gpu
from qcompile.targets.workers import Workers
from qcompile.tuning import Tuning

NEEDED = ("cloudpickle", "psutil")  # by TVM's worker processes
_HERE = "tune on that machine itself"


def where_to_measure(target: Target, tuning: Tuning, threads: int | None) -> Place:
    """On a device or on this machine; whatever forbids to tune is found here, before any work.

    Raises:
        ConfigError, DeviceError: as `tune` does.
    """
    if tuning.database is None:
        raise ConfigError("tuning has no database to remember in", remedy='give a path: Tuning("tuned.sqlite")')
    check_threads(threads, None if tuning.address else pool_size())
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"tuning needs {' and '.join(missing)}", remedy="pip install 'qcompile[tune]'")
    near_only = _near_only(target)
    if tuning.address:
        remote = Remote(*tuning.address)
        if near_only:
            raise DeviceError(
                f"code for {target.name} cannot be measured through RPC: {near_only}", where=str(remote), remedy=_HERE
            )
        _reach(remote)
        return remote
    if reason := lacks(target.machine, target.features):
        through_rpc = 'measure on a device: tuning=Tuning(..., device="KEY@HOST:PORT") of a TVM RPC tracker'
        raise DeviceError(
            f"code for {target.name} cannot be measured here: this machine {reason}",
            remedy="tune on a machine that can run it, and copy the database" if near_only else through_rpc,
        )
    place = local(target)
    if isinstance(place, LocalGpu) and threads is not None:
        raise ConfigError(
            f"threads is {threads!r}, and {target.name} is a GPU, which has no threads to choose",
            where="threads",
            remedy="leave threads out",
        )
    return place


def _near_only(target: Target) -> str:
    """Why code for `target` cannot be measured through RPC; "" where it can."""
    if target.isa.matrix is not None:
        return "its server asks Linux for no tile registers"
    return "its server takes no kernels of a GPU" if isinstance(target.isa, Gpu) else ""


def local(target: Target) -> LocalGpu | None:
    """What of this machine runs code for `target`."""
    return LocalGpu() if isinstance(target.isa, Gpu) else None


def threads_at(place: Place, asked: int | None, workers: Workers) -> int:
    """As many as were asked for, or all that are there; NO_THREADS on a GPU. Raises ConfigError where the device has
    fewer, DeviceError where it does not answer."""
    if isinstance(place, LocalGpu):
        return NO_THREADS
    if place is None:
        return asked or pool_size()
    try:
        largest: int = workers.submit(pool_of, place).result()
    except Exception as error:
        raise DeviceError(
            f"the device does not answer: {reason_of(error)}",
            where=str(place),
            remedy="see whether its server has registered: python -m tvm.exec.query_rpc_tracker",
        ) from error
    check_threads(asked, largest)
    return asked or largest


def _reach(remote: Remote) -> None:
    """Raises DeviceError where nothing listens; TVM's client would go on trying for a minute, each time."""
    try:
        socket.create_connection((remote.host, remote.port), timeout=10).close()
    except OSError as error:
        raise DeviceError(
            f"no RPC tracker answers: {error}",
            where=f"{remote.host}:{remote.port}",
            remedy="start it (python -m tvm.exec.rpc_tracker), and the device's server (python -m tvm.exec.rpc_server)",
        ) from error


def reason_of(error: Exception) -> str:
    """Why a task of a worker failed, in a line."""
    if isinstance(error, TimeoutError):
        return "it took too long"
    if isinstance(error, ChildProcessError):
        return "its process crashed"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
