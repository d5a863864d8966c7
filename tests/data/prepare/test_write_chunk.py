"""Chunk task: sorted runs to chunks, compared with a slow and simple implementation."""

import errno
import hashlib
import itertools
import multiprocessing
import os
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from k2train.data.chunk import ChunkInfo, check_files, verify_chunk, write_chunk, write_manifest
from k2train.data.document_boundaries import write_borders
from k2train.data.prepare.allocate import allocate, mixture
from k2train.data.prepare.allocate.allocate import plan_task
from k2train.data.prepare.allocate.mixture import row_positions
from k2train.data.prepare.allocate.plan_file import Plan
from k2train.data.prepare.workspace import Workspace, read_json
from k2train.data.prepare.write import merge_runs, row_file
from k2train.data.prepare.write.provenance import Provenance
from k2train.data.prepare.write.write_chunk import chunk_task
from k2train.errors import DataError
from tests.support.command_line import HANG_SECONDS
from tests.support.data_folder import hashes
from tests.support.sorted_runs import VOCAB, Text, expected_chunk, recipe_of, workspace_of


def texts_of(origin: str, lengths: list[int], files: int = 3) -> list[Text]:
    return [
        Text(origin, f"f{i % files}", i // files, n, 1000 + i, i % 3) for i, n in enumerate(lengths)
    ]


def run_all(workspace: Workspace, min_tokens: int = 16) -> None:
    plan_task(workspace)
    for number in range(len(workspace.chunk_names)):
        chunk_task(workspace, number, min_tokens)


def sources_in(workspace: Workspace, record: dict[str, Any]) -> set[str]:
    sources = Plan.read(workspace.folder).sources
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(record["sources"]), np.uint8))
    return {key for key, bit in zip(sources, bits.tolist(), strict=False) if bit}


def check_chunk(workspace: Workspace, texts: dict[str, list[Text]], name: str) -> None:
    expected = expected_chunk(workspace, texts, name)
    record = read_json(workspace.chunk_record(name))
    info = ChunkInfo(**record["info"])
    rows = np.load(workspace.target / info.file)
    assert rows.dtype == np.uint16
    assert rows.tolist() == expected.rows
    assert (info.rows, info.tokens) == (len(expected.rows), rows.size)
    assert info.provenance is not None
    file = parquet.ParquetFile(workspace.target / info.provenance)
    assert file.read().to_pylist() == expected.pieces
    assert info.borders is not None
    assert np.load(workspace.target / info.borders).tolist() == expected.boundaries
    counted = dict.fromkeys(texts, 0)
    for piece in expected.pieces:
        counted[piece["subset"]] += piece["length"]
    assert info.tokens_per_subset == counted
    assert sources_in(workspace, record) == expected.sources
    for entry in record["files"]:
        base = {"target": workspace.target, "folder": workspace.folder}[entry["base"]]
        assert entry["bytes"] == (base / entry["path"]).stat().st_size
    by_document = {(text.source, text.name): text.text for ts in texts.values() for text in ts}
    used = {by_document[p["source"], p["document"]] for p in expected.pieces if not p["repeat"]}
    assert np.load(workspace.chunk_texts(name)).tolist() == sorted(used)


corpora = st.fixed_dictionaries(
    {
        "code": st.lists(
            st.one_of(st.integers(1, 12), st.just(1), st.integers(40, 90)), min_size=8, max_size=20
        ),
        "prose": st.lists(st.integers(8, 30), min_size=8, max_size=12),
    }
)


@given(
    corpora,
    st.sampled_from([0.5, 1, 2, 2.5]),
    st.integers(1, 3),
    st.sampled_from([1, 30, 10**6]),
    st.booleans(),
    st.sampled_from([0, 2, 2**14]),
    st.sampled_from([1, 3, 10, mixture.BLOCKS]),
)
@settings(deadline=None, max_examples=40)
def test_chunks_are_the_stream_cut(
    lengths: dict[str, list[int]],
    repeat: float,
    tasks: int,
    capacity: int,
    dropped: bool,
    gap: int,
    blocks: int,
) -> None:
    """Catches tokens lost, doubled or out of order, also in blocks of several samples, and
    wrong provenance, boundaries or counts.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch("os.fsync"),
        mock.patch.object(merge_runs, "GAP_TOKENS", gap),
        mock.patch.object(mixture, "BLOCKS", blocks),
    ):
        tmp_path = Path(folder)
        subsets = {"code": {"repeat": repeat, "drop_duplicates": dropped}, "prose": {"repeat": 2}}
        recipe = recipe_of(tmp_path, subsets, sequence_length=6, document_borders=True)
        texts = {
            name: texts_of(name, [max(n, 2) if i < 8 else n for i, n in enumerate(ns)])
            for name, ns in lengths.items()
        }

        workspace = workspace_of(tmp_path, recipe, texts, tasks, capacity)
        try:
            run_all(workspace)
        except DataError as error:
            assert "fewer than the 2 chunks" in str(error)
            return

        for name in workspace.chunk_names:
            check_chunk(workspace, texts, name)


@pytest.fixture
def texts() -> dict[str, list[Text]]:
    lengths = np.random.Generator(np.random.Philox(key=1)).integers(1, 60, 240).tolist()
    return {"code": texts_of("code", lengths, 20), "prose": texts_of("prose", lengths[:90], 15)}


def test_bytes_do_not_depend_on_runs_and_tasks(
    texts: dict[str, list[Text]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an order, a dictionary or a row group that depends on runs, tasks, batch size or on
    what is read between two parts.
    """
    found = []
    for name, tasks, capacity, least, gap in (
        ("a", 1, 10**6, 2**22, 2**14),
        ("b", 5, 400, 100, 0),
        ("c", 17, 150, 2**22, 3),
    ):
        monkeypatch.setattr(merge_runs, "GAP_TOKENS", gap)
        recipe = recipe_of(
            tmp_path / name,
            {"code": {"repeat": 2.5, "drop_duplicates": True}, "prose": {"repeat": 0.5}},
            document_borders=True,
            held_out={"rows": 12},
            chunks=3,
        )

        (tmp_path / name).mkdir()
        workspace = workspace_of(tmp_path / name, recipe, texts, tasks, capacity)
        run_all(workspace, least)
        found.append(hashes(workspace.target))
        for chunk in workspace.chunk_names:
            check_chunk(workspace, texts, chunk)

    assert len(found[0]) == 4 * 3
    assert found[0] == found[1] == found[2]


def test_a_long_document_fills_no_chunk(tmp_path: Path) -> None:
    """Catches a document of half a subset that is most of one chunk and nothing of the others."""
    texts = {"books": [*texts_of("books", [20] * 400, 20), Text("books", "long", 0, 8000, 7)]}
    recipe = recipe_of(tmp_path, {"books": {}}, chunks=4)
    workspace = workspace_of(tmp_path, recipe, texts, 3, 900)
    run_all(workspace)
    shares = []
    for name in workspace.chunk_names:
        pieces = parquet.read_table(workspace.target / f"{name}.parquet").to_pylist()
        long = sum(piece["length"] for piece in pieces if piece["source"] == "books/long")
        shares.append(long / sum(piece["length"] for piece in pieces))

    assert max(shares) < 0.51 and min(shares) > 0.49


def test_a_slice_of_a_run_is_one_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a column of a run that is opened for itself: a file server answers thousands of opens
    in the time in which it delivers gigabytes.
    """
    texts = {"web": texts_of("web", [30] * 600, 20)}
    recipe = recipe_of(tmp_path, {"web": {}}, chunks=3)
    workspace = workspace_of(tmp_path, recipe, texts, 10, 400)
    plan_task(workspace)
    opened: list[str] = []
    plain_open = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *a: [opened.append(str(path)), plain_open(path, *a)][1]
    )
    chunk_task(workspace, 0)
    runs = Counter(path for path in opened if path.endswith(".safetensors"))
    # The header, where the chunk's part begins and ends, and the part itself.
    assert len(runs) > 40 and set(runs.values()) == {3}
    assert sum(path.endswith(".marks") for path in opened) == 1


def test_documents_longer_than_a_batch(tmp_path: Path) -> None:
    """Catches an empty batch, between two documents longer than a batch, taken for the end."""
    texts = {"books": texts_of("books", [4500 + n for n in range(400)], 200)}
    recipe = recipe_of(tmp_path, {"books": {}}, document_borders=True, held_out={"share": 0.08})
    workspace = workspace_of(tmp_path, recipe, texts, 1, 10**7)
    run_all(workspace, 64)
    check_chunk(workspace, texts, "held_out")


@pytest.fixture
def workspace(texts: dict[str, list[Text]], tmp_path: Path) -> Workspace:
    recipe = recipe_of(tmp_path, {"code": {}, "prose": {"repeat": 2}}, document_borders=True)
    return workspace_of(tmp_path, recipe, texts, 2, 500)


def test_files_are_those_of_the_chunk_format(workspace: Workspace, tmp_path: Path) -> None:
    """Catches a header or byte order other than `write_chunk`'s, and files that verification
    refuses.
    """
    run_all(workspace)
    infos = [
        ChunkInfo(**read_json(workspace.chunk_record(name))["info"])
        for name in workspace.chunk_names
    ]
    facts = {"tokenizer_sha256": "x", "sequence_length": 8, "vocab_size": VOCAB}
    manifest = write_manifest(workspace.target, chunks=infos, **facts)
    check_files(manifest)

    for info in infos:
        verify_chunk(manifest, info)
        assert info.provenance is not None
        assert hashes(workspace.target)[info.provenance] == info.provenance_sha256
        again = write_chunk(
            tmp_path, info.name, [np.load(workspace.target / info.file)], info.rows, VOCAB, {}
        )
        assert again.sha256 == info.sha256
        assert info.borders is not None
        values = np.load(workspace.target / info.borders)
        assert write_borders(tmp_path / "b.npy", values) == info.borders_sha256


def test_provenance_comes_in_blocks(
    texts: dict[str, list[Text]], workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches row groups larger than a reader expects, and rows in another group than their own."""
    monkeypatch.setattr(allocate, "BLOCK_ROWS", 16)
    run_all(workspace, 64)
    check_chunk(workspace, texts, "chunk_001")
    file = parquet.ParquetFile(workspace.target / "chunk_001.parquet")
    rows = [file.read_row_group(i)["row"].to_numpy() for i in range(file.num_row_groups)]
    assert len(rows) > 3
    assert all((group // 16 == number).all() for number, group in enumerate(rows))
    assert [str(kind) for kind in file.schema_arrow.types] == [
        *["int32"] * 3,
        *["dictionary<values=string, indices=int32, ordered=0>"] * 2,
        "string",
        "int64",
        "dictionary<values=string, indices=int32, ordered=0>",
        "int16",
    ]


@pytest.mark.parametrize("rows", [5, 400])
def test_rows_written_in_any_order(rows: int, tmp_path: Path) -> None:
    """Catches a row written at another row's position, with and without joined neighbours."""
    content = np.arange(rows * 3, dtype=np.uint16).reshape(rows, 3)
    order = np.random.Generator(np.random.Philox(key=1)).permutation(rows)
    for size in (rows, 7):
        with row_file.ChunkFile(tmp_path / "c.npy", rows, 3, "uint16") as file:
            for start in range(0, rows, size):
                part = order[start : start + size]
                file.write(content[part], part.astype(np.uint32))
            sha256 = file.finish()
        assert np.load(tmp_path / "c.npy").tolist() == content.tolist()
        assert hashlib.sha256((tmp_path / "c.npy").read_bytes()).hexdigest() == sha256
    assert [path.name for path in tmp_path.iterdir()] == ["c.npy"]


def left_in(workspace: Workspace) -> list[str]:
    found = [*workspace.target.iterdir(), *(workspace.folder / "chunks").iterdir()]
    return sorted(path.name for path in found)


def test_rows_given_are_not_overwritten_while_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a buffer refilled by the caller before a slow disk has written the last rows."""
    real = os.pwrite

    def slow(*arguments: Any) -> int:
        time.sleep(0.002)
        return real(*arguments)

    monkeypatch.setattr(row_file.os, "pwrite", slow)
    rows, at_once = 256, 16

    row_numbers = np.random.default_rng(0).permutation(rows).astype(np.uint32)
    buffers = [np.empty((at_once, 8), np.uint16) for _ in range(2)]
    with row_file.ChunkFile(tmp_path / "c.npy", rows, 8, "uint16") as file:
        for start in range(0, rows, at_once):
            buffers[0][:] = np.arange(start, start + at_once)[:, None]
            file.write(buffers[0], row_numbers[start : start + at_once])
            buffers.reverse()
        file.finish()

    assert np.load(tmp_path / "c.npy")[row_numbers, 0].tolist() == list(range(rows))


def test_no_space_is_reported_before_and_while_writing(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback of a full disk, and files left behind."""
    plan_task(workspace)
    with monkeypatch.context() as patch:
        patch.setattr(row_file, "free_bytes", lambda _: 1000)
        with pytest.raises(
            DataError, match=r"chunk_000 needs [\d,]{5,} bytes in .* 1,000 are free"
        ):
            chunk_task(workspace, 0)

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for function in ("posix_fallocate", "pwrite", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, mock.Mock(side_effect=full))
            with pytest.raises(DataError, match=r"chunk_000 needs .* are free: make room there"):
                chunk_task(workspace, 0)
        assert left_in(workspace) == []

    chunk_task(workspace, 0)
    assert left_in(workspace) == [
        "chunk_000.borders.npy",
        "chunk_000.json",
        "chunk_000.npy",
        "chunk_000.parquet",
        "chunk_000.texts.npy",
    ]


def test_a_chunk_that_stops_has_no_record(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a record written before the last file is on the disk."""
    plan_task(workspace)
    with monkeypatch.context() as patch:
        patch.setattr(Provenance, "write", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            chunk_task(workspace, 0)
    assert left_in(workspace) == ["chunk_000.npy", "chunk_000.texts.npy"]


def test_leftovers_of_the_dead_go_and_of_the_living_stay(workspace: Workspace) -> None:
    """Catches a disk that fills with every kill, and removal of another process's file."""
    plan_task(workspace)
    child = multiprocessing.get_context("fork").Process(target=int)
    child.start()
    child.join()
    host = os.uname().nodename
    dead, living = (f"chunk_000.npy.{host}.{pid}.tmp" for pid in (child.pid, os.getppid()))
    elsewhere = f"chunk_000.npy.elsewhere.{child.pid}.tmp"
    for name in (dead, living, elsewhere):
        (workspace.target / name).write_bytes(b"half")
    folder = workspace.folder / "chunks" / f"chunk_000.{host}.{child.pid}.tmp"
    folder.mkdir()
    chunk_task(workspace, 0)
    left = left_in(workspace)
    assert dead not in left
    assert folder.name not in left
    assert {living, elsewhere} <= set(left)


def test_two_processes_do_one_chunk(workspace: Workspace) -> None:
    """Catches two processes that write one file, or remove each other's."""
    run_all(workspace)
    before = hashes(workspace.target)
    shutil.rmtree(workspace.target)
    workspace.target.mkdir()
    fork = multiprocessing.get_context("fork")
    pair = [
        fork.Process(target=chunk_task, args=(workspace, number, 64)) for number in (0, 0, 1, 1)
    ]
    for process in pair:
        process.start()
    for process in pair:
        process.join(HANG_SECONDS)
        assert process.exitcode == 0

    assert hashes(workspace.target) == before


def test_ids_of_another_tokenizer(texts: dict[str, list[Text]], tmp_path: Path) -> None:
    """Catches ids outside the vocabulary that are written all the same."""
    recipe = recipe_of(tmp_path, {"code": {}, "prose": {}})
    workspace = workspace_of(tmp_path, recipe, texts, vocab=VOCAB // 2)
    plan_task(workspace)
    with pytest.raises(DataError, match=r"subset code: .* the id \d+, which is not below the 150"):
        chunk_task(workspace, 0)
    assert left_in(workspace) == []


def test_a_repeated_subset_is_packed_anew(texts: dict[str, list[Text]], tmp_path: Path) -> None:
    """Catches a second pass in the order of the first."""
    recipe = recipe_of(tmp_path, {"code": {"repeat": 2}, "prose": {}}, chunks=1)
    workspace = workspace_of(tmp_path, recipe, texts)
    run_all(workspace)
    lines = parquet.read_table(workspace.target / "chunk_000.parquet").to_pylist()
    order: dict[int, list[str]] = {0: [], 1: []}
    info = read_json(workspace.chunk_record("chunk_000"))["info"]
    assert info["borders"] is None
    # Back from the shuffled rows to the samples as they were cut from the stream.
    row_numbers = row_positions(info["rows"], recipe.seed, "chunk_000").tolist()
    sample = {row: number for number, row in enumerate(row_numbers)}
    for line in sorted(lines, key=lambda line: (sample[line["row"]], line["start"])):
        if line["subset"] == "code" and line["offset"] == 0:
            order[line["repeat"]].append(line["source"] + line["document"])

    assert len(set(order[0])) == len(order[0]) == 240
    assert set(order[1]) <= set(order[0])
    assert len(order[1]) > 230
    pairs = [set(itertools.pairwise(names)) for names in order.values()]
    assert len(pairs[0] & pairs[1]) < 20, "neighbours of one pass are none in the other"
