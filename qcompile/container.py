"""The container of an artifact: an uncompressed zip whose members can be mapped, and whose every byte is checked.

Any zip tool opens it. Members start at multiples of 64 bytes (the local header's extra field is
padded, as Android's zipalign does), so that tensors inside can be used where they lie. Its comment
is fixed in length and holds the format version and a SHA-256:

    "qcompile-qcm <version, 4 digits> sha256 <hex>"

That digest covers the manifest and every byte before it that is in no member; the manifest holds the
SHA-256 of every other member. So any flipped, missing or added byte is found. This protects against
damage, not against forgery: who can write the file can write matching hashes. Load artifacts only
from whom you would take a program.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import struct
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qcompile.errors import ArtifactError

FORMAT = 1
ALIGNMENT = 64
MANIFEST = "manifest.json"
_COMMENT = b"qcompile-qcm %04d sha256 %s"
_DIGEST_BYTES = 64
_COMMENT_BYTES = len(_COMMENT % (FORMAT, b"0" * _DIGEST_BYTES))
_LOCAL_HEADER = 30  # bytes before the name in a zip's local file header
_BROKEN = (zipfile.BadZipFile, struct.error, ValueError, KeyError, EOFError, OverflowError, NotImplementedError)
_COPY_AGAIN = "copy or download the file again, or save it again"

Buffer = bytes | memoryview


def _digest(parts: Iterable[Buffer]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()


def _put(archive: zipfile.ZipFile, name: str, data: Buffer) -> tuple[int, int]:
    """Add a member at an aligned offset; returns (begin, end) of its bytes."""
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))  # equal artifacts are equal files
    info.external_attr = 0o644 << 16
    header = archive.start_dir + _LOCAL_HEADER + len(name.encode())
    padding = -(header + 4) % ALIGNMENT  # an extra field is (id, size) and its bytes
    info.extra = struct.pack("<HH", 0xD935, padding) + bytes(padding)
    archive.writestr(info, data)
    end = archive.start_dir
    return end - len(data), end


def encode(manifest: Mapping[str, Any], members: Mapping[str, Buffer]) -> memoryview:
    """The bytes of a container. `manifest` gains "members": the size and SHA-256 of each."""
    table = {name: {"bytes": len(data), "sha256": _digest([data])} for name, data in members.items()}
    text = json.dumps({**manifest, "members": table}, indent=1, allow_nan=False).encode()
    out, spans = io.BytesIO(), []
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
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


def write_atomically(path: Path, data: Buffer) -> None:
    """Write so that `path` holds either what it held before or all of `data`, whatever happens.

    A temporary file beside it is written, flushed to the disk, then put in its place in one step.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
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
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name survives a power cut too
    finally:
        os.close(folder)


def map_file(path: Path) -> memoryview:
    """The bytes of a file, mapped copy-on-write (TVM takes no read-only memory)."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise ArtifactError("the file is empty", where=str(path), remedy=_COPY_AGAIN)
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    except OSError as error:
        raise ArtifactError(
            f"the artifact cannot be read: {error.strerror}", where=str(path), remedy="check the path"
        ) from error


def decode(whole: memoryview, where: str) -> tuple[dict[str, Any], dict[str, memoryview]]:
    """The manifest and the other members (views into `whole`), every byte checked.

    Raises:
        ArtifactError: it is not an artifact, is truncated or altered, or has a newer format.
    """
    written = _read_comment(whole, where)
    try:
        with zipfile.ZipFile(_Reader(whole)) as archive:
            spans = {info.filename: _span(whole, info) for info in archive.infolist()}
        manifest_span = spans.pop(MANIFEST)
        found = _outside(whole, sorted(spans.values()))
    except _BROKEN as error:
        raise ArtifactError(
            "the artifact is damaged: its table of contents", where=where, remedy=_COPY_AGAIN
        ) from error
    if found != written:
        raise ArtifactError(
            "the artifact is damaged: its manifest or table of contents", where=where, remedy=_COPY_AGAIN
        )
    manifest = json.loads(bytes(whole[slice(*manifest_span)]))
    members = {name: whole[slice(*span)] for name, span in spans.items()}
    table = manifest["members"]
    if set(table) != set(members):
        raise ArtifactError("the artifact is damaged: members are missing", where=where, remedy=_COPY_AGAIN)
    for name, data in members.items():
        if _digest([data]) != table[name]["sha256"]:
            raise ArtifactError(f"the artifact is damaged: member {name}", where=where, remedy=_COPY_AGAIN)
    return manifest, members


def _read_comment(whole: memoryview, where: str) -> bytes:
    """The digest in the comment, after checking that this is an artifact of a format we read."""
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
    return fields[3]


def _span(whole: memoryview, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Where the bytes of a member lie."""
    name_bytes, extra_bytes = struct.unpack_from("<HH", whole, info.header_offset + 26)
    begin = info.header_offset + _LOCAL_HEADER + name_bytes + extra_bytes
    end = begin + info.file_size
    if info.compress_type != zipfile.ZIP_STORED or end > len(whole):
        raise ValueError("a member is compressed or out of bounds")
    return begin, end


class _Reader(io.RawIOBase):
    """A file over a buffer, without copying it."""

    def __init__(self, whole: memoryview) -> None:
        self.whole, self.at = whole, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: len(self.whole)}[whence]
        if base + offset < 0:
            raise ValueError("a seek before the beginning")
        self.at = base + offset
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        part = self.whole[self.at : self.at + len(buffer)]
        buffer[: len(part)] = part
        self.at += len(part)
        return len(part)
