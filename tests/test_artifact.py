"""An artifact comes back as it was saved, or not at all: every damage is found, every refusal is clear."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile import container, tensors
from qcompile.artifact import Artifact, CoverageRow, Golden, PassRow, TensorSpec, Variant
from qcompile.errors import ArtifactError

RNG = np.random.default_rng(0)


def _artifact(seed: int = 0) -> Artifact:
    rng = np.random.default_rng(seed)
    targets: list[tuple[Any, ...]] = [
        ("x86-avx2", "x86_64", ("avx2", "fma")),
        ("arm64-neon", "aarch64", ("asimd",), b"", "", (4,)),
        ("cuda-sm_80", "x86_64", ("sm_80",), rng.bytes(777), '{"func_info": {}}'),
    ]
    return Artifact(
        inputs=(TensorSpec("x", (("batch", 1, 8), 3), "float32", scale=0.25, zero_point=-4),),
        outputs=(TensorSpec("y", (("batch", 1, 8),), "int64"),),
        output_structure={"tuple": [0]},
        variants=tuple(
            Variant(
                name,
                machine,
                features,
                rank,
                rng.bytes(1000 + rank),
                {
                    "weight": rng.integers(-128, 128, (5, 7), dtype=np.int8),
                    "nothing": np.empty((0, 4), np.float32),
                    "scalar": np.asarray(rng.random(), np.float32),
                    "bias": rng.integers(-9, 9, 5, dtype=np.int32),
                },
                *device,
            )
            for rank, (name, machine, features, *device) in enumerate(targets)
        ),
        coverage=(CoverageRow("aten.linear.default", "linear", "float", "topi", "not quantized: no reason", "head"),),
        passes=(PassRow("canonicalize", True, 9, 7),),
        toolchain={"apache-tvm": "0.27"},
        golden=(Golden((rng.random((2, 3), np.float32),), (rng.integers(0, 9, 2),)),),
        tolerance=0.01,
    )


ORIGINAL = _artifact()
DATA = bytes(ORIGINAL.to_bytes())


def _same(a: Artifact, b: Artifact) -> bool:
    return bytes(a.to_bytes()) == bytes(b.to_bytes())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    ORIGINAL.save(tmp_path / "model.qcm")
    loaded = Artifact.load(tmp_path / "model.qcm")
    assert _same(loaded, ORIGINAL)
    for name in ("inputs", "outputs", "output_structure", "coverage", "passes", "toolchain", "tolerance", "exact"):
        assert getattr(loaded, name) == getattr(ORIGINAL, name)
    for got, want in zip(loaded.variants, ORIGINAL.variants, strict=True):
        assert (got.name, got.machine, got.features, got.rank) == (want.name, want.machine, want.features, want.rank)
        assert bytes(got.library) == want.library
        assert (bytes(got.device_code), got.device_kernels) == (want.device_code, want.device_kernels)
        assert list(got.constants) == list(want.constants)
        for key, array in want.constants.items():
            np.testing.assert_array_equal(got.constants[key], array, strict=True)
    np.testing.assert_array_equal(loaded.golden[0].inputs[0], ORIGINAL.golden[0].inputs[0], strict=True)
    np.testing.assert_array_equal(loaded.golden[0].outputs[0], ORIGINAL.golden[0].outputs[0], strict=True)


def test_equal_artifacts_are_equal_files_and_others_are_not() -> None:
    assert bytes(_artifact().to_bytes()) == DATA
    assert bytes(_artifact(seed=1).to_bytes()) != DATA


def test_constants_are_mapped_where_they_lie_and_aligned(tmp_path: Path) -> None:
    ORIGINAL.save(tmp_path / "model.qcm")
    loaded = Artifact.load(tmp_path / "model.qcm")
    for array in loaded.variants[1].constants.values():
        assert not array.flags.owndata
        assert array.ctypes.data % 64 == 0
        assert array.flags.writeable  # a private mapping: TVM takes no read-only memory
    loaded.variants[0].constants["weight"][...] = 0  # does not reach the file
    assert _same(Artifact.load(tmp_path / "model.qcm"), ORIGINAL)


def test_any_zip_and_safetensors_tool_can_read_it(tmp_path: Path) -> None:
    ORIGINAL.save(tmp_path / "model.qcm")
    with zipfile.ZipFile(tmp_path / "model.qcm") as archive:
        assert archive.testzip() is None
        assert archive.namelist()[0] == "manifest.json"
        stored = safetensors.numpy.load(archive.read("targets/x86-avx2/constants.safetensors"))
    for key, array in ORIGINAL.variants[0].constants.items():
        np.testing.assert_array_equal(stored[key], array, strict=True)


def test_sizes_name_every_member() -> None:
    sizes = ORIGINAL.sizes()
    assert sizes["targets/arm64-neon/library.so"] == 1001
    assert sum(sizes.values()) < len(DATA)


@pytest.mark.parametrize("length", [*range(0, 80), *range(80, len(DATA), 97), *range(len(DATA) - 100, len(DATA))])
def test_every_truncation_is_found(length: int) -> None:
    with pytest.raises(ArtifactError):
        Artifact.from_bytes(DATA[:length])


def test_every_flipped_byte_is_found() -> None:
    """Each byte of the file, members and bookkeeping alike, by one random bit."""
    bits = RNG.integers(0, 8, len(DATA))
    changed = bytearray(DATA)
    for offset in range(len(DATA)):
        changed[offset] ^= 1 << int(bits[offset])
        with pytest.raises(ArtifactError):
            Artifact.from_bytes(memoryview(changed))
        changed[offset] = DATA[offset]
    assert _same(Artifact.from_bytes(memoryview(changed)), ORIGINAL)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (ORIGINAL.variants[0].library, r"targets/x86-avx2/library\.so"),
        (ORIGINAL.variants[2].device_code, "targets/cuda-sm_80/device_code"),
    ],
)
def test_a_damaged_member_is_named(data: bytes, name: str) -> None:
    changed = bytearray(DATA)
    changed[DATA.index(data) + 500] ^= 4
    with pytest.raises(ArtifactError, match=f"damaged: member {name}"):
        Artifact.from_bytes(memoryview(changed))


def test_a_target_without_a_gpu_has_no_part_for_one() -> None:
    cpu = ORIGINAL._replace(variants=ORIGINAL.variants[:2])
    assert not [name for name in cpu.sizes() if "device" in name]
    assert b"device_kernels" not in bytes(cpu.to_bytes())
    assert ORIGINAL.sizes()["targets/cuda-sm_80/device_code"] == 777


@pytest.mark.parametrize("kernels", [None, 5, "without their code"])
def test_kernels_of_a_gpu_that_are_no_kernels_are_refused(kernels: Any) -> None:
    manifest, members = ORIGINAL._manifest(), ORIGINAL._members()
    manifest["targets"][2]["device_kernels"] = kernels
    if isinstance(kernels, str):
        del members["targets/cuda-sm_80/device_code"]
    with pytest.raises(ArtifactError, match="not as the format says"):
        Artifact.from_bytes(container.encode(manifest, members))


@pytest.mark.parametrize("size", [0, 1, 1000, 1001, 2999, 3000])
@pytest.mark.parametrize("cores", [1, 2, 7])
def test_a_member_of_several_parts_is_checked_in_all_of_them(
    size: int, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container, "PART", 1000)
    monkeypatch.setattr(container, "cores", lambda: cores)
    data, called = RNG.bytes(size), list[str]()
    encoded = container.encode({"format": container.FORMAT}, {"large": data, "small": b"abc"})
    manifest, members = container.decode(encoded, "here", lambda: called.append("meanwhile"))
    assert bytes(members["large"]) == data
    assert len(manifest["members"]["large"]["sha256"]) == max(1, -(-size // 1000))
    assert called == ["meanwhile"]
    for offset in range(0, size, 499):
        members["large"][offset] ^= 2
        with pytest.raises(ArtifactError, match="member large"):
            container.decode(encoded, "here")
        members["large"][offset] ^= 2


def test_what_fails_meanwhile_is_said_once_the_other_threads_have_ended() -> None:
    def fail() -> None:
        raise OSError("no library")

    with pytest.raises(OSError, match="no library"):
        container.decode(memoryview(DATA), "here", fail)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    for tail in (b"", container._COMMENT % (container.FORMAT, b"0" * 64)):
        with pytest.raises(ArtifactError):
            Artifact.from_bytes(data + tail)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(DATA) - 1), st.binary(min_size=1, max_size=40))
def test_inserted_and_overwritten_bytes_are_found(offset: int, data: bytes) -> None:
    with pytest.raises(ArtifactError):
        Artifact.from_bytes(DATA[:offset] + data + DATA[offset:])
    overwritten = DATA[:offset] + data + DATA[offset + len(data) :]
    if overwritten != DATA:
        with pytest.raises(ArtifactError):
            Artifact.from_bytes(overwritten)


def test_a_manifest_that_is_not_ours_is_refused() -> None:
    with pytest.raises(ArtifactError, match="manifest is not as the format says"):
        Artifact.from_bytes(container.encode({"format": container.FORMAT, "inputs": [{"shape": [1]}]}, {}))


@pytest.mark.parametrize(
    "header",
    [
        b"[1]",
        b"[" * 100_000,
        {"a": 5},
        {"0.input.0": {"dtype": "I8", "shape": [4], "data_offsets": [-4, 0]}},
        {"0.input.0": {"dtype": "I8", "shape": [-1], "data_offsets": [0, 4]}},
        {"0.input.0": {"dtype": "I8", "shape": [[]], "data_offsets": [0, 4]}},
        {"0.input.0": {"dtype": "I8", "shape": [4], "data_offsets": []}},
        {"0.input.0": {"dtype": "I8", "shape": [4], "data_offsets": [0, 8]}},
        {"0.input.0": {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}},
        {"0.input.0": {"dtype": "I8", "shape": [2**70], "data_offsets": [0, 2**70]}},
        {"1000000000000.input.0": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}},
    ],
    ids=lambda header: str(header)[:60],
)
def test_tensors_that_do_not_lie_in_their_file_are_refused(header: Any) -> None:
    """With right hashes: a file of another origin, not a damaged one."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    member = struct.pack("<Q", len(text)) + text + bytes(4)
    forged = container.encode(ORIGINAL._manifest(), {**ORIGINAL._members(), "golden.safetensors": member})
    with pytest.raises(ArtifactError, match="not as the format says"):
        Artifact.from_bytes(forged)


@pytest.mark.parametrize("change", [{"inputs": [{"name": "x", "shape": [1], "dtype": "O"}]}, {"tolerance": None}])
def test_a_manifest_of_nonsense_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="not as the format says"):
        Artifact.from_bytes(container.encode({**ORIGINAL._manifest(), **change}, ORIGINAL._members()))


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.qcm"
    with pytest.raises(ArtifactError, match=r"cannot be read: No such file"):
        Artifact.load(path)
    with pytest.raises(ArtifactError, match="cannot be read: Is a directory"):
        Artifact.load(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(ArtifactError, match="the file is empty"):
        Artifact.load(path)
    path.write_bytes(b"\x7fELF" + bytes(1000))
    with pytest.raises(ArtifactError, match="this is not a qcompile artifact"):
        Artifact.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", "{}")
    with pytest.raises(ArtifactError, match="truncated or damaged"):
        Artifact.load(path)


def test_a_folder_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be saved: No such file"):
        ORIGINAL.save(tmp_path / "nowhere" / "model.qcm")


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ORIGINAL.save(tmp_path / "model.qcm")

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(ArtifactError, match="No space left on device"):
        _artifact(seed=1).save(tmp_path / "model.qcm")
    assert [path.name for path in tmp_path.iterdir()] == ["model.qcm"]
    assert _same(Artifact.load(tmp_path / "model.qcm"), ORIGINAL)


def test_a_save_that_is_killed_leaves_the_old_file(tmp_path: Path) -> None:
    """The process dies with everything written but the name not yet changed."""
    path = tmp_path / "model.qcm"
    ORIGINAL.save(path)
    code = """
import os, signal, sys
from qcompile.artifact import Artifact
old = Artifact.load(sys.argv[1])
os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
import json
old._replace(toolchain={"another": "1"}).save(sys.argv[1])
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # the part that was written is there, under another name
    assert _same(Artifact.load(path), ORIGINAL)
    ORIGINAL.save(path)
    assert len(list(tmp_path.iterdir())) == 1


def test_the_next_save_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    for left in (".model.qcm.k1ll3d__.part", ".model.qcm.qcm.k1ll3d__.part", ".model.qcm.k1ll3d__.party"):
        (tmp_path / left).write_bytes(RNG.bytes(100))
    ORIGINAL.save(tmp_path / "model.qcm")
    kept = {".model.qcm.qcm.k1ll3d__.part", ".model.qcm.k1ll3d__.party", "model.qcm"}  # the first is another file's
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert _same(Artifact.load(tmp_path / "model.qcm"), ORIGINAL)


@pytest.mark.parametrize("place", [(fcntl, "flock"), (os, "chmod")], ids=["before its lock", "before its new name"])
def test_saves_of_one_path_at_once_leave_each_other_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[Any, str]
) -> None:
    """A whole save happens while another one is at `place`."""
    path, (module, name) = tmp_path / "model.qcm", place
    original = getattr(module, name)

    def save_another(*args: Any) -> None:
        monkeypatch.undo()
        _artifact(seed=1).save(path)
        assert not _same(Artifact.load(path), ORIGINAL)
        original(*args)

    monkeypatch.setattr(module, name, save_another)
    ORIGINAL.save(path)
    assert getattr(module, name) is original
    assert _same(Artifact.load(path), ORIGINAL)
    assert [path.name for path in tmp_path.iterdir()] == ["model.qcm"]


def test_saving_to_a_symbolic_link_writes_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    target, link = tmp_path / "store" / "v1.qcm", tmp_path / "model.qcm"
    link.symlink_to(target)
    for artifact in (ORIGINAL, _artifact(seed=1)):  # a target that is not there yet, and one that is
        artifact.save(link)
        assert link.is_symlink()
        assert not target.is_symlink()
        assert _same(Artifact.load(target), artifact)
    assert [path.name for path in target.parent.iterdir()] == ["v1.qcm"]


def test_saving_over_a_loaded_artifact_keeps_the_loaded_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "model.qcm"
    ORIGINAL.save(path)
    loaded = Artifact.load(path)
    loaded._replace(toolchain={"another": "1"}).save(path)
    assert _same(loaded, ORIGINAL)
    assert Artifact.load(path).toolchain == {"another": "1"}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(tensors.NAMES)), st.lists(st.integers(0, 5), max_size=4)), max_size=6))
def test_tensors_of_every_dtype_and_shape_come_back(kinds: list[tuple[str, list[int]]]) -> None:
    arrays = {
        f"t{i}": RNG.integers(0, 2, shape).astype(dtype) * np.ones((), dtype) for i, (dtype, shape) in enumerate(kinds)
    }
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    encoded = tensors.encode(arrays)
    back = tensors.decode(encoded)
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array, strict=True)
    assert set(arrays) <= set(safetensors.numpy.load(encoded))
