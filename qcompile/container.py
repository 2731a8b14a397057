"""The container of an artifact: an uncompressed zip whose members can be mapped, and whose every byte is checked.

Any zip tool opens it. Members start at multiples of 64 bytes (the local header's extra field is
padded, as Android's zipalign does), so that tensors inside can be used where they lie. Its comment
is fixed in length and holds the format version and a SHA-256:

    "qcompile-qcm <version, 4 digits> sha256 <hex>"

That digest covers the manifest and every byte before it that is in no member; the manifest holds the SHA-256 of
every MiB of every other member, so that several cores can check a large one. So any flipped, missing or added
byte is found. This protects against damage, not against forgery: who can write the file can write matching hashes. Load
artifacts only from whom you would take a program.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import re
import struct
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from qcompile.device import cores
from qcompile.errors import ArtifactError

if TYPE_CHECKING:
    from zipfile import ZipFile

FORMAT = 4
ALIGNMENT = 64
PART = 1 << 20  # bytes of a member that one digest covers
_OLDER_PARTS = {3: 4 << 20}  # in formats 1 and 2 it covers all of a member
MANIFEST = "manifest.json"
_PART = ".part"  # how the name of a temporary file ends
_COMMENT = b"qcompile-qcm %04d sha256 %s"
_DIGEST_BYTES = 64
_COMMENT_BYTES = len(_COMMENT % (FORMAT, b"0" * _DIGEST_BYTES))
# A zip's, up to the name: signature, compressed and plain size, lengths of name and extra field.
_LOCAL_HEADER = struct.Struct("<4s14xIIHH")
_BROKEN = (struct.error, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
_COPY_AGAIN = "copy or download the file again, or save it again"

Buffer = bytes | memoryview


def _digest(parts: Iterable[Buffer]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()


def _parts(data: Buffer, size: int) -> list[memoryview]:
    view = memoryview(data)
    return [view[begin : begin + size] for begin in range(0, max(len(view), 1), size)]


def _put(archive: ZipFile, name: str, data: Buffer) -> tuple[int, int]:
    """Add a member at an aligned offset; returns (begin, end) of its bytes."""
    from zipfile import ZipInfo

    info = ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))  # equal artifacts are equal files
    info.external_attr = 0o644 << 16
    header = archive.start_dir + _LOCAL_HEADER.size + len(name.encode())
    padding = -(header + 4) % ALIGNMENT  # an extra field is (id, size) and its bytes
    info.extra = struct.pack("<HH", 0xD935, padding) + bytes(padding)
    archive.writestr(info, data)
    end = archive.start_dir
    return end - len(data), end


def encode(manifest: Mapping[str, Any], members: Mapping[str, Buffer]) -> memoryview:
    """The bytes of a container. `manifest` gains "members": the size of each, and the SHA-256 of its parts."""
    from zipfile import ZIP_STORED, ZipFile  # a device only reads, and this imports every compression there is

    table = {
        name: {"bytes": len(data), "sha256": [_digest([part]) for part in _parts(data, PART)]}
        for name, data in members.items()
    }
    text = json.dumps({**manifest, "members": table}, indent=1, allow_nan=False).encode()
    out, spans = io.BytesIO(), []
    with ZipFile(out, "w", ZIP_STORED) as archive:
        _put(archive, MANIFEST, text)
        spans = [_put(archive, name, data) for name, data in members.items()]
        archive.comment = _COMMENT % (manifest["format"], b"0" * _DIGEST_BYTES)
    whole = out.getbuffer()
    whole[-_DIGEST_BYTES:] = _outside(whole, spans)
    return whole


def _outside(whole: Buffer, spans: list[tuple[int, int]]) -> bytes:
    """SHA-256 of `whole` without `spans` (in order) and without the digest at its end."""
    view, parts, at = memoryview(whole), [], 0
    for begin, end in spans:
        parts.append(view[at:begin])
        at = end
    return _digest([*parts, view[at:-_DIGEST_BYTES]]).encode()


def write_atomically(path: str, data: Buffer) -> None:
    """Write so that `path` holds either what it held before or all of `data`, whatever happens.

    A temporary file beside it is written, flushed to the disk, then put in its place in one step. A symbolic
    link stays one: what it leads to is written. What killed calls for the same path left is removed.
    """
    from fcntl import LOCK_EX, flock
    from tempfile import mkstemp

    path = os.path.realpath(path)
    folder, name = os.path.split(path)
    _remove_abandoned(folder, name)
    handle, temporary = mkstemp(prefix=f".{name}.", suffix=_PART, dir=folder)
    with os.fdopen(handle, "wb") as file:
        try:
            with suppress(OSError):  # where the file system has no locks, nothing is taken for abandoned
                flock(file, LOCK_EX)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes it private; a saved file is like any other
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name survives a power cut too
    finally:
        os.close(directory)


def _remove_abandoned(folder: str, name: str) -> None:
    """Remove the temporary files for `name` whose writers are gone: nobody holds their lock.

    A writer takes it before its first byte, so an empty file may be about to be locked.
    """
    from fcntl import LOCK_EX, LOCK_NB, flock

    for entry in os.listdir(folder):
        if not re.fullmatch(rf"\.{re.escape(name)}\.\w+\{_PART}", entry):
            continue
        part = os.path.join(folder, entry)
        with suppress(OSError), open(part, "rb") as file:  # it may be held, gone, or another user's
            flock(file, LOCK_EX | LOCK_NB)
            if os.fstat(file.fileno()).st_size:
                os.unlink(part)


def map_file(path: str) -> memoryview:
    """The bytes of a file, mapped copy-on-write (TVM takes no read-only memory)."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise ArtifactError("the file is empty", where=path, remedy=_COPY_AGAIN)
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    except OSError as error:
        raise ArtifactError(
            f"the artifact cannot be read: {error.strerror}", where=path, remedy="check the path"
        ) from error


def decode(
    whole: memoryview, where: str, meanwhile: Callable[[], object] | None = None
) -> tuple[dict[str, Any], dict[str, memoryview]]:
    """The manifest and the other members (views into `whole`), every byte checked. `meanwhile` is called while other
    cores check.

    Raises:
        ArtifactError: it is not an artifact, is truncated or altered, or has a newer format.
    """
    number, written = _read_comment(whole, where)
    try:
        manifest, spans = _contents(whole)
        digests = {name: manifest["members"][name]["sha256"] for name in spans}
        part = _OLDER_PARTS.get(number, PART)
        found = _outside(whole, list(spans.values()))
    except _BROKEN as error:
        raise ArtifactError(
            "the artifact is damaged: its table of contents", where=where, remedy=_COPY_AGAIN
        ) from error
    if found != written or manifest.get("format") != number:
        raise ArtifactError(
            "the artifact is damaged: its manifest or table of contents", where=where, remedy=_COPY_AGAIN
        )
    members = {name: whole[begin:end] for name, (begin, end) in spans.items()}
    damaged = _damaged(members, digests, part, meanwhile)
    if damaged:
        raise ArtifactError(f"the artifact is damaged: member {damaged[0]}", where=where, remedy=_COPY_AGAIN)
    return manifest, members


def _damaged(
    members: Mapping[str, Buffer], digests: Mapping[str, Any], part: int, meanwhile: Callable[[], object] | None
) -> list[str]:
    """The members that have other digests, each of `part` bytes."""
    parts: list[tuple[str, memoryview, str]] = []
    damaged: list[str] = []
    for name, data in members.items():
        of = digests[name]
        size, wanted = (max(len(data), 1), [of]) if isinstance(of, str) else (part, of)
        found = _parts(data, size)
        if not isinstance(wanted, list) or len(found) != len(wanted):
            damaged.append(name)
            continue
        parts += [(name, piece, digest) for piece, digest in zip(found, wanted, strict=True)]

    def check() -> None:
        with suppress(IndexError):  # another thread took the last one
            while True:
                name, piece, digest = parts.pop()
                if _digest([piece]) != digest:
                    damaged.append(name)

    others = [threading.Thread(target=check) for _ in range(min(cores(), len(parts)) - 1 or 1)]
    for other in others:
        other.start()
    try:
        if meanwhile is not None:
            meanwhile()
        check()
    finally:
        for other in others:
            other.join()
    return damaged


def _contents(whole: memoryview) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """The manifest, and (begin, end) of each other member; not checked yet.

    Members follow each other, the manifest first. Their sizes are read there, since a header has room for
    4 GB only. A zip's table of contents at the end is for other tools.
    """
    name, begin, size = _header(whole, 0)
    if name != MANIFEST:
        raise ValueError("the manifest is not the first member")
    at = begin + size
    manifest, spans = json.loads(bytes(whole[begin:at])), {}
    for _ in manifest["members"]:
        name, begin, _ = _header(whole, at)
        at = begin + manifest["members"][name]["bytes"]
        spans[name] = begin, at
    return manifest, spans


def _header(whole: memoryview, at: int) -> tuple[str, int, int]:
    """Of the member whose header is at `at`: its name, where its bytes begin, and how many the header says they are."""
    signature, size, _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack_from(whole, at)
    if signature != b"PK\3\4":
        raise ValueError("no member begins here")
    end = at + _LOCAL_HEADER.size + name_bytes
    return bytes(whole[end - name_bytes : end]).decode(), end + extra_bytes, size


def _read_comment(whole: memoryview, where: str) -> tuple[int, bytes]:
    """The format and the digest in the comment, after checking that this is an artifact of a format we read."""
    fields = bytes(whole[-_COMMENT_BYTES:]).split(b" ")
    if len(fields) != 4 or fields[0] != b"qcompile-qcm" or not fields[1].isdigit():
        begun = bytes(whole[:2]) == b"PK" and MANIFEST.encode() in bytes(whole[:64])
        what = "the artifact is truncated or damaged" if begun else "this is not a qcompile artifact"
        raise ArtifactError(what, where=where, remedy=_COPY_AGAIN if begun else "give a .qcm file that qcompile saved")
    if int(fields[1]) > FORMAT:
        raise ArtifactError(
            f"the artifact has format {int(fields[1])}; this qcompile reads up to {FORMAT}",
            where=where,
            remedy="upgrade qcompile on this machine, or save the artifact with the older version",
        )
    return int(fields[1]), fields[3]
