"""Chunk files: damage is detected and named, and writing follows the format."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k2train.data import chunk
from k2train.data.chunk import (
    Manifest,
    check_files,
    open_chunk,
    read_manifest,
    verify_chunk,
    write_chunk,
)
from k2train.errors import DataError
from tests.support.data_folder import add_chunk, edit, edit_json, finish, rehash

ROWS, LENGTH, VOCAB = 10, 16, 500


def make(folder: Path, vocab: int = VOCAB, chunks: int = 2) -> Manifest:
    """A data folder with ids that differ everywhere, so that a swapped row or column shows."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = np.random.default_rng(0).integers(0, vocab, (chunks, ROWS, LENGTH)).astype(np.uint32)

    infos = [
        write_chunk(
            folder,
            f"chunk_{i:03d}",
            iter([ids[i, :4], ids[i, 4:]]),
            ROWS,
            vocab,
            {"code": ROWS * LENGTH},
        )
        for i in range(chunks)
    ]

    infos.append(add_chunk(folder, "held_out", ids[0] // 2, vocab, {"code": ROWS * LENGTH}))
    return finish(folder, infos, LENGTH, vocab)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make(tmp_path / "data")


@pytest.mark.parametrize(("vocab", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_plain_numpy_reads_what_was_written(tmp_path: Path, vocab: int, dtype: str) -> None:
    """Catches ids wrapped at 65536, a wrong header, and blocks written out of order."""
    manifest = make(tmp_path, vocab)
    expected = np.random.default_rng(0).integers(0, vocab, (2, ROWS, LENGTH))

    for i, info in enumerate(manifest.chunks):
        plain = np.load(tmp_path / info.file, mmap_mode="r")
        assert plain.dtype == dtype
        assert np.array_equal(plain, expected[i])
        assert np.array_equal(open_chunk(manifest, info)[:], expected[i])
        assert info.sha256 == hashlib.sha256((tmp_path / info.file).read_bytes()).hexdigest()
        verify_chunk(manifest, info)

    assert not list(tmp_path.glob("*.tmp"))


def test_manifest_hash_names_the_data(manifest: Manifest) -> None:
    """Catches a manifest hash that does not cover the chunks' own."""
    assert manifest.sha256 == hashlib.sha256(manifest.path.read_bytes()).hexdigest()
    assert read_manifest(manifest.folder) == manifest


def test_facts_are_kept_as_written(manifest: Manifest) -> None:
    """Catches a fact that is lost or converted on reading, and a required one: older folders have
    fewer, other writers more.
    """
    facts = {
        "name": "x",
        "recipe": {"seed": 1, "subsets": {"code": {"repeat": 1, "kind": "text"}}, "new": [1.0]},
        "account": {"code": {"repeat": 2.0, "used_tokens": 3}},
        "later": {"a": None},
    }
    again = edit(manifest, lambda content: content.update(facts=facts))
    assert json.dumps(again.facts.model_dump(exclude_unset=True)) == json.dumps(facts)
    plain = edit(manifest, lambda content: content.pop("facts"))
    assert plain.facts.model_dump(exclude_unset=True) == {}


def test_write_refuses_bad_id_and_leaves_nothing(tmp_path: Path) -> None:
    """Catches a preparation with another tokenizer, and a half-written file under the final
    name.
    """
    blocks = [np.zeros((2, 4), np.uint32), np.full((1, 4), 7, np.uint32)]
    with pytest.raises(
        DataError, match=r"chunk_000: row 2, position 0: id 7 is not below vocab_size 7"
    ):
        write_chunk(tmp_path, "chunk_000", blocks, 3, 7, {})
    assert list(tmp_path.iterdir()) == []


BROKEN: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("no chunks", lambda c: c.update(chunks=[]), "'chunks' must be a list"),
    ("missing key", lambda c: c.pop("sequence_length"), "key 'sequence_length' is missing"),
    (
        "missing in chunk",
        lambda c: c["chunks"][1].pop("sha256"),
        r"chunks\[1\]: key 'sha256' .* missing",
    ),
    (
        "mistyped",
        lambda c: c["chunks"][0].update(rows="10"),
        "'rows' must be a whole number above 0, is '10'",
    ),
    ("a boolean", lambda c: c.update(vocab_size=True), "'vocab_size' must be"),
    (
        "duplicate",
        lambda c: c["chunks"][1].update(name="chunk_000"),
        "name 'chunk_000' appears twice",
    ),
    (
        "same file",
        lambda c: c["chunks"][1].update(file="chunk_000.npy"),
        "file 'chunk_000.npy' appears twice",
    ),
    ("absolute", lambda c: c["chunks"][0].update(file="/etc/passwd"), "'/etc/passwd' is outside"),
    ("upwards", lambda c: c["chunks"][0].update(file="../chunk_000.npy"), "is outside"),
    (
        "held out outside",
        lambda c: c["held_out"].update(file="../x.npy"),
        "held_out: file '../x.npy' is outside",
    ),
    ("wrong dtype", lambda c: c.update(dtype="uint32"), "vocab_size 500 needs 'uint16'"),
    ("wrong tokens", lambda c: c["chunks"][0].update(tokens=1), "10 rows of 16 are 160"),
    (
        "mistyped subset",
        lambda c: c["chunks"][0]["tokens_per_subset"].update(code=-1),
        r"chunks\[0\].tokens_per_subset: key 'code' must be a whole number from 0, is -1",
    ),
    ("no object", lambda c: c["chunks"].append(3), r"chunks\[2\]: must be an object, is 3"),
    (
        "no hash",
        lambda c: c["held_out"].update(borders="b"),
        "held_out: key 'borders_sha256' is mis",
    ),
    ("later format", lambda c: c.update(format="k2train-chunks-2"), "this version reads"),
]


@pytest.mark.parametrize(
    ("change", "words"), [pytest.param(c, w, id=name) for name, c, w in BROKEN]
)
def test_broken_manifest_is_one_line(
    manifest: Manifest, change: Callable[..., object], words: str
) -> None:
    """Catches a manifest that is believed without being looked at."""
    path = edit_json(manifest, change)
    with pytest.raises(DataError, match=words) as caught:
        read_manifest(path)
    assert "\n" not in str(caught.value)


def test_symlink_out_of_the_folder_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    """Catches reading a file that the data folder does not hold, under a harmless name."""
    file = manifest.folder / "chunk_001.npy"
    file.rename(tmp_path / "elsewhere.npy")
    file.symlink_to(tmp_path / "elsewhere.npy")
    with pytest.raises(DataError, match=r"chunk_001: file 'chunk_001.npy' is outside"):
        read_manifest(manifest.path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b""])
def test_manifest_that_is_no_json_object(tmp_path: Path, content: bytes) -> None:
    """Catches a traceback where a line is due."""
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json"):
        read_manifest(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        read_manifest(tmp_path / "absent.json")


def test_cheap_checks_name_chunk_and_numbers(manifest: Manifest) -> None:
    """Catches a truncated, lengthened, missing or reshaped chunk before any process starts."""
    file = manifest.folder / "chunk_001.npy"
    whole = file.read_bytes()
    check_files(manifest)
    file.write_bytes(whole[:-2])
    with pytest.raises(
        DataError, match=rf"chunk_001 .* truncated: {len(whole) - 2} bytes, must be {len(whole)}"
    ):
        check_files(manifest)

    check_files(manifest, ["chunk_000"])
    file.write_bytes(whole + b"\0")
    with pytest.raises(DataError, match="too long"):
        check_files(manifest)
    file.write_bytes(whole[:20])
    with pytest.raises(DataError, match=r"chunk_001.*not a NumPy file"):
        check_files(manifest)
    for array in (np.zeros((ROWS, LENGTH), ">u2"), np.zeros((LENGTH, ROWS), "<u2")):
        np.save(file, array)
        with pytest.raises(DataError, match=r"chunk_001 .*the manifest says uint16 \[10, 16\]"):
            check_files(manifest)

    np.save(file, np.zeros((ROWS, LENGTH), "<u2", order="F"))
    with pytest.raises(DataError, match="in column order"):
        check_files(manifest)
    file.unlink()
    with pytest.raises(DataError, match=r"chunk_001.*cannot be read"):
        check_files(manifest)


def test_verify_finds_one_flipped_bit(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a hash over part of the file: the bit is in the last row, blocks hold two."""
    monkeypatch.setattr(chunk, "BLOCK_BYTES", 2 * LENGTH * 2)
    file = manifest.folder / "chunk_000.npy"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"chunk_000 .*sha256 is"):
        verify_chunk(manifest, manifest.chunks[0])
    verify_chunk(manifest, manifest.chunks[1])


def test_verify_names_the_bad_id(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an id check that forgets the last block or counts rows from the block's start."""
    monkeypatch.setattr(chunk, "BLOCK_BYTES", 3 * LENGTH * 2)
    file = manifest.folder / "chunk_000.npy"
    ids = np.load(file)
    ids[9, 5] = VOCAB
    np.save(file, ids)
    words = r"chunk_000 .*row 9, position 5: id 500 is not below vocab_size 500"
    with pytest.raises(DataError, match=words + "; its sha256 is not"):
        verify_chunk(manifest, manifest.chunks[0])
    again = rehash(manifest)
    with pytest.raises(DataError, match=words + "$"):
        verify_chunk(again, again.chunks[0])


def test_stopped_verification_gives_no_verdict(manifest: Manifest) -> None:
    """Catches a shutdown that waits for gigabytes to be hashed, or reports a half-read chunk as
    damaged.
    """
    wrong = manifest.chunks[0].model_copy(update={"sha256": "0" * 64})
    verify_chunk(manifest, wrong, stopped=lambda: True)
    with pytest.raises(DataError, match="sha256"):
        verify_chunk(manifest, wrong, stopped=lambda: False)
