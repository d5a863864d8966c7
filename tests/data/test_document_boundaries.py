"""Document boundary files: reading returns what was written, and damaged files give no
documents.
"""

import functools
import hashlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from k2train.data import document_boundaries as module
from k2train.data.chunk import (
    Manifest,
    check_files,
    read_manifest,
    verify_chunk,
)
from k2train.data.document_boundaries import (
    check_borders,
    documents_of,
    open_borders,
    verify_borders,
    write_borders,
)
from k2train.data.held_out import HeldOutSet
from k2train.data.loader import HeldOutLoader, Loader, MicroBatch, Share
from k2train.data.manifest import require_borders
from k2train.data.order import make_order
from k2train.errors import DataError
from tests.support.data_folder import add_chunk, finish
from tests.support.traced_memory import traced_peak

LENGTH, VOCAB, ROWS = 6, 100, 8
NAMES = ("chunk_000", "chunk_001", "held_out")


def by_hand(positions: list[int], rows: range, length: int) -> list[list[int]]:
    """The definition, token by token."""
    listed, found = set(positions), []
    for row in rows:
        document, numbers = 0, []
        for token in range(length):
            document += row * length + token in listed
            numbers.append(document)
        found.append(numbers)
    return found


@st.composite
def chunks(draw: st.DrawFn) -> tuple[int, list[int], range]:
    length, rows = draw(st.integers(2, 9)), draw(st.integers(1, 7))
    legal = [p for p in range(rows * length) if p % length]
    positions = sorted(draw(st.sets(st.sampled_from(legal))))
    start = draw(st.integers(0, rows - 1))
    return length, positions, range(start, draw(st.integers(start + 1, rows)))


@given(chunks())
def test_documents_of_any_rows_equal_the_definition(case: tuple[int, list[int], range]) -> None:
    """Catches an index that starts at 1, runs on into the next row, is late by a token, or reads
    other rows' borders.
    """
    length, positions, rows = case
    documents = documents_of(np.array(positions, dtype=np.uint64), rows, length)
    assert documents.dtype == np.int32 and documents.shape == (len(rows), length)
    assert documents.tolist() == by_hand(positions, rows, length)


def test_plain_numpy_reads_what_was_written(tmp_path: Path) -> None:
    """Catches another type or byte order, a hash of something else, and an empty file that cannot
    be mapped.
    """
    for name, positions in (("some", [1, 5, 7, 2**40]), ("none", [])):
        path = tmp_path / f"{name}.npy"
        digest = write_borders(path, np.array(positions, dtype=np.int64))
        plain = np.load(path)
        assert plain.dtype == "<u8" and plain.tolist() == positions
        assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
        assert np.array_equal(open_borders(path, "c")[:], plain)
        assert check_borders(path, "c")[1] == len(positions)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []
    with pytest.raises(AssertionError, match="are not ascending"):
        write_borders(tmp_path / "bad.npy", [3, 3])


BAD_VALUES = [
    ([3, 8, 8], "border 2 is position 8 (row 1, token 2), not above the one before it, 8"),
    ([3, 9, 8], "border 2 is position 8 (row 1, token 2), not above the one before it, 9"),
    (
        [3, 12],
        "border 1 is position 12 (row 2, token 0): a row's beginning is a border without being "
        "listed",
    ),
    ([3, 49], "border 1 is position 49 (row 8, token 1), outside rows 0 to 7 of 6 tokens"),
    (
        [2**64 - 1],
        "border 0 is position 18446744073709551615 (row 3074457345618258602, token 3), outside "
        "rows 0 to 7",
    ),
]


@pytest.mark.parametrize(("values", "words"), BAD_VALUES)
def test_verify_names_the_bad_border(tmp_path: Path, values: list[int], words: str) -> None:
    """Catches places that are no border of the chunk, told with their number, and the comparison
    lost between blocks.
    """
    path = tmp_path / "c.npy"
    np.save(path, np.array(values, dtype=np.uint64))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()

    for block in (1, 2, 100):
        with (
            pytest.MonkeyPatch.context() as patch,
            pytest.raises(DataError, match=re.escape(words)) as caught,
        ):
            patch.setattr(module, "BLOCK_BORDERS", block)
            verify_borders(path, "chunk_003", digest, ROWS, LENGTH)
        assert str(caught.value).startswith(f"chunk_003 ({path})") and "sha256" not in str(
            caught.value
        )

    with pytest.raises(DataError, match="its sha256 is not the manifest's either"):
        verify_borders(path, "chunk_003", "0" * 64, ROWS, LENGTH)


@pytest.mark.parametrize("values", ([13, 13], [14, 13], [13, 18]), ids=("same", "falls", "row"))
def test_a_step_refuses_the_bad_border_of_its_rows(values: list[int]) -> None:
    """Catches documents made up from a file that was not verified on this rank."""
    positions = np.array([1, *values], dtype=np.uint64)
    with pytest.raises(
        DataError, match=rf"chunk_003: border \d is position {values[1]} "
    ) as caught:
        documents_of(positions, range(2, 6), LENGTH, "chunk_003")
    assert "\n" not in str(caught.value)


def four_rows(path: str) -> Callable[[], object]:
    """Search the borders of four rows, to be called in a process of its own."""
    return functools.partial(documents_of, open_borders(Path(path), "c"), range(1000, 1004), 1000)


def test_reading_some_rows_reads_only_their_borders(tmp_path: Path) -> None:
    """Catches a search that turns the whole mapped file into another type, which is what NumPy does
    with a Python int.
    """
    path = tmp_path / "c.npy"
    write_borders(path, np.arange(1, 4_000_000, 2, dtype=np.uint64))
    documents = documents_of(open_borders(path, "c"), range(1000, 1004), 1000)
    assert documents[:, -1].tolist() == [500] * 4
    # The whole file is 16 MB.
    assert traced_peak(four_rows, path, limit_bytes=500_000) < 500_000


def make(
    folder: Path, with_borders: tuple[str, ...] = NAMES
) -> tuple[Manifest, dict[str, list[int]]]:
    """A data folder, and the positions of its borders by chunk."""
    rng, positions, infos = np.random.default_rng(3), {}, []
    for name in NAMES:
        ids = rng.integers(0, VOCAB, (ROWS, LENGTH))
        legal = np.array([p for p in range(ROWS * LENGTH) if p % LENGTH])
        positions[name] = sorted(rng.choice(legal, 11, replace=False).tolist())
        borders = positions[name] if name in with_borders else None
        infos.append(add_chunk(folder, name, ids, VOCAB, borders=borders))
    return finish(folder, infos, LENGTH, VOCAB), positions


def test_the_manifest_keeps_the_borders(tmp_path: Path) -> None:
    """Catches a field that is written and not read, and a folder without borders that now has the
    key.
    """
    manifest, _ = make(tmp_path, ("chunk_001",))
    again = read_manifest(tmp_path)
    assert again == manifest
    assert [info.borders for info in again.all_chunks()] == [None, "chunk_001.borders.npy", None]
    entries = json.loads(manifest.path.read_text())["chunks"]
    assert (
        "borders" not in entries[0]
        and entries[1]["borders_sha256"] == again.chunks[1].borders_sha256
    )


BROKEN: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    (
        "upwards",
        lambda c: c["chunks"][0].update(borders="../b.npy"),
        "chunk_000: file '../b.npy' is outside",
    ),
    (
        "absolute",
        lambda c: c["held_out"].update(borders="/b.npy"),
        "held_out: file '/b.npy' is outside",
    ),
    (
        "shared",
        lambda c: c["chunks"][0].update(borders="chunk_001.borders.npy"),
        "'chunk_001.borders.npy' appears twi",
    ),
    (
        "no hash",
        lambda c: c["chunks"][1].pop("borders_sha256"),
        r"chunks\[1\]: key 'borders_sha256' .* missing",
    ),
    (
        "mistyped",
        lambda c: c["chunks"][1].update(borders=7),
        r"chunks\[1\]: key 'borders' must be text, is 7",
    ),
]


@pytest.mark.parametrize(
    ("change", "words"), [pytest.param(c, w, id=name) for name, c, w in BROKEN]
)
def test_a_manifest_is_not_believed(
    tmp_path: Path, change: Callable[..., object], words: str
) -> None:
    """Catches a borders file read, or later deleted, outside the folder, or read without its
    hash.
    """
    manifest, _ = make(tmp_path)
    content = json.loads(manifest.path.read_text())
    change(content)
    manifest.path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=words):
        read_manifest(tmp_path)


def test_cheap_checks_see_the_borders_file(tmp_path: Path) -> None:
    """Catches a truncated, lengthened, missing or foreign file found at its first step and not at
    the start.
    """
    manifest, _ = make(tmp_path)
    file = tmp_path / "chunk_001.borders.npy"
    whole = file.read_bytes()
    check_files(manifest)

    for content, words in (
        (whole[:-3], f"truncated: {len(whole) - 3} bytes, must be {len(whole)}"),
        (whole + b"x", "too long"),
        (b"short", "not a NumPy file"),
    ):
        file.write_bytes(content)
        with pytest.raises(DataError, match=rf"chunk_001 .*borders\.npy\): {words}"):
            check_files(manifest)
        check_files(manifest, ["chunk_000"])

    for array in (np.zeros(3, ">u8"), np.zeros(3, "<i8"), np.zeros((3, 1), "<u8")):
        np.save(file, array)
        with pytest.raises(DataError, match=r"chunk_001 .*borders are uint64 of one dimension"):
            check_files(manifest)

    file.unlink()
    with pytest.raises(DataError, match=r"chunk_001 .*cannot be read"):
        check_files(manifest)


def test_verifying_a_chunk_verifies_its_borders(tmp_path: Path) -> None:
    """Catches one border moved by one token, which no header shows.

    A stopped check gives no verdict.
    """
    manifest, positions = make(tmp_path)
    for info in manifest.all_chunks():
        verify_chunk(manifest, info)
    moved = next(
        p for p in range(1, ROWS * LENGTH) if p % LENGTH and p not in positions["chunk_001"]
    )
    changed = sorted([moved, *positions["chunk_001"][1:]])
    np.save(tmp_path / "chunk_001.borders.npy", np.array(changed, dtype=np.uint64))
    verify_chunk(manifest, manifest.chunks[0])
    with pytest.raises(DataError, match=r"chunk_001 .*borders\.npy\): sha256 is"):
        verify_chunk(manifest, manifest.chunks[1])
    verify_chunk(manifest, manifest.chunks[1], stopped=lambda: True)


def test_borders_exchanged_after_their_hash(tmp_path: Path) -> None:
    """Catches attention that stops elsewhere than the manifest says: before the borders are opened,
    and while they are.
    """
    manifest, positions = make(tmp_path)
    order = make_order(manifest, [1, 0], 4)
    file = tmp_path / "chunk_001.borders.npy"
    moved = next(
        p for p in range(1, ROWS * LENGTH) if p % LENGTH and p not in positions["chunk_001"]
    )
    changed = np.array(sorted([moved, *positions["chunk_001"][1:]]), dtype=np.uint64)
    whole = file.read_bytes()
    for opened in (False, True):
        file.write_bytes(whole)
        with Loader(manifest, order, Share(0, 1, 2), VOCAB, verify=True, documents=True) as loader:
            loader.verify_ahead("chunk_001").result()
            if opened:
                loader._read(1)
            time.sleep(0.02)
            np.save(file, changed)
            with pytest.raises(DataError, match=r"chunk_001 .*borders\.npy\): sha256 is"):
                loader._read(1)


@pytest.mark.parametrize(("data", "micro"), [(1, 2), (2, 1), (2, 2)])
def test_the_loader_gives_documents_beside_tokens(tmp_path: Path, data: int, micro: int) -> None:
    """Catches documents of another rank, step or chunk than the tokens they stand beside.

    Held-out batches too.
    """
    manifest, positions = make(tmp_path)
    order = make_order(manifest, [1, 0], 4)
    loaders = [
        Loader(manifest, order, Share(dp, data, micro), VOCAB, verify=True, documents=True)
        for dp in range(data)
    ]

    def check(batches: list[list[MicroBatch]], name: str, rows: range) -> None:
        plain = torch.from_numpy(np.load(tmp_path / f"{name}.npy")[rows].astype(np.int64))
        assert torch.equal(torch.cat([part.tokens for batch in batches for part in batch]), plain)
        parts = [part.documents for batch in batches for part in batch]
        assert all(part.dtype == torch.int32 and part.shape == (micro, LENGTH) for part in parts)
        assert torch.cat(parts).tolist() == by_hand(positions[name], rows, LENGTH)

    for step in (1, 2, 3, 4, 2):
        batches = [loader.step(step) for loader in loaders]
        check(batches, order.position(step).name, order.rows_of(step))

    for loader in loaders:
        loader.close()
    held_out = HeldOutSet.of("held_out", manifest, None)
    scored = [
        HeldOutLoader(held_out, loader.share, 4 // (loader.share.ranks * micro), documents=True)
        for loader in loaders
    ]
    check([loader.read(1) for loader in scored], "held_out", range(4, 8))
    with Loader(manifest, order, Share(0, 1, 4), VOCAB) as unasked:
        assert unasked.step(1)[0].documents is None
    assert HeldOutLoader(held_out, Share(0, 1, 4), 1).read(0)[0].documents is None


def test_data_without_borders_is_refused_at_once(tmp_path: Path) -> None:
    """Catches a run that attends where it was told not to, or finds out in the middle.

    The line says what to do.
    """
    manifest, _ = make(tmp_path, ("chunk_000",))
    words = (
        r"have no document borders: chunk_001; set document_borders: true in the "
        r"recipe"
    )
    with pytest.raises(DataError, match=words):
        Loader(manifest, make_order(manifest, None, 4), Share(0, 1, 4), VOCAB, documents=True)
    with pytest.raises(DataError, match="held_out"):
        held_out = HeldOutSet.of("held_out", manifest, None)
        HeldOutLoader(held_out, Share(0, 1, 4), 1, documents=True)
    require_borders(manifest, ["chunk_000"])
