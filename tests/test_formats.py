"""What an artifact's format number decides: older files still load, newer ones are refused by their number."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import tiny

from qcompile import container
from qcompile.artifact import Artifact
from qcompile.errors import ArtifactError

RNG = np.random.default_rng(0)


def test_format_3_has_a_digest_for_every_4_mib(monkeypatch: pytest.MonkeyPatch) -> None:
    data = RNG.bytes((4 << 20) + 1)
    with monkeypatch.context() as older:
        older.setattr(container, "PART", 4 << 20)
        encoded = container.encode({"format": 3}, {"large": data})
    manifest, members = container.decode(encoded, "here")
    assert len(manifest["members"]["large"]["sha256"]) == 2
    assert bytes(members["large"]) == data
    for offset in (0, 4 << 20):
        members["large"][offset] ^= 1
        with pytest.raises(ArtifactError, match="member large"):
            container.decode(encoded, "here")
        members["large"][offset] ^= 1


@pytest.mark.parametrize("number", [1, 2])
def test_formats_1_and_2_have_one_digest_for_a_member(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write = json.dumps

    def older(value: Any, **options: Any) -> str:
        for member in value.get("members", {}).values():
            (member["sha256"],) = member["sha256"]
        return write(value, **options)

    monkeypatch.setattr(json, "dumps", older)
    monkeypatch.setattr(container, "FORMAT", number)
    data, original = tiny.artifact("x86-avx2").to_bytes(), tiny.artifact("x86-avx2")
    monkeypatch.undo()
    assert b'"sha256": "' in bytes(data)
    assert f"qcompile-qcm {number:04}".encode() in bytes(data)
    loaded = Artifact.from_bytes(data)
    assert loaded.golden[0].outputs[0].tolist() == original.golden[0].outputs[0].tolist()
    assert bytes(loaded.to_bytes()) == bytes(original.to_bytes())


def test_a_newer_format_is_refused_by_its_number() -> None:
    newer = container.encode({"format": 7, "anything": "else"}, {"something": b"new"})
    with pytest.raises(ArtifactError, match=f"format 7; this qcompile reads up to {container.FORMAT}") as caught:
        Artifact.from_bytes(newer)
    assert "upgrade qcompile" in str(caught.value)


@pytest.mark.parametrize("alignments", [5, [0], [4, 4], ["4"], [None], [-4], [4.5], [True], "4", {"4": 1}, [3], [128]])
def test_alignments_that_are_none_are_refused(alignments: Any) -> None:
    artifact = tiny.artifact("x86-avx2")
    manifest, members = artifact._manifest(), artifact._members()
    manifest["targets"][0]["alignments"] = alignments
    with pytest.raises(ArtifactError, match="not as the format says"):
        Artifact.from_bytes(container.encode(manifest, members))


@pytest.mark.parametrize("number", [0, 3, 99])
def test_the_manifest_has_the_number_of_the_file(number: int) -> None:
    artifact = tiny.artifact("x86-avx2")
    whole = bytearray(container.encode({**artifact._manifest(), "format": number}, artifact._members()))
    begin = len(whole) - container._COMMENT_BYTES
    whole[begin:-65] = (container._COMMENT % (container.FORMAT, b""))[:-1]
    _, spans = container._contents(memoryview(whole))
    whole[-64:] = container._outside(bytes(whole), list(spans.values()))
    with pytest.raises(ArtifactError, match="damaged: its manifest"):
        Artifact.from_bytes(bytes(whole))
