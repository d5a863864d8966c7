"""The search index, against searches that look at every position."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k2train.data.inspect.run_progress import History
from k2train.data.manifest import Manifest, read_manifest
from k2train.data.order import ChunkOrder
from k2train.data.tokenizer import EOS_ID
from k2train.data.trace import build, index_files
from k2train.data.trace.build import open_index
from k2train.data.trace.exposures import Stage, checkpoint_steps
from k2train.data.trace.query import search_tokens
from k2train.data.trace.row_losses import RowLosses, append_losses, losses_path
from k2train.data.trace.search import Place, Queries, Span
from k2train.data.trace.spans import Searcher
from k2train.errors import DataError, UserError
from k2train.record.events import CheckpointRemoved, CheckpointSaved, Resumed
from tests.support.data_folder import add_chunk, finish, rewrite
from tests.support.events import entries, event

pytest.importorskip("pydivsufsort", reason="the extra `trace` is not installed")

ALL = 10**6
Chunks = dict[str, Any]


def folder_of(folder: Path, chunks: Chunks, vocab: int) -> Manifest:
    """A data folder of these ids, without provenance."""
    folder.mkdir(exist_ok=True)
    infos = [add_chunk(folder, name, np.asarray(ids), vocab) for name, ids in chunks.items()]
    return finish(folder, infos, np.shape(next(iter(chunks.values())))[1], vocab)


def spans_of(
    manifest: Manifest, *queries: Any, least: int = 8, part_tokens: int = 2**25
) -> list[Span]:
    searcher = Searcher(open_index(manifest, part_tokens=part_tokens))
    return searcher.spans(Queries.of(queries), least, ALL)


def places_by_looking(chunks: Chunks, wanted: Any) -> list[Place]:
    """Every place of a token sequence within a row, by comparing bytes."""
    needle = np.asarray(wanted, dtype="<u4").tobytes()
    found = []
    for name, ids in chunks.items():
        for row, content in enumerate(np.asarray(ids, dtype="<u4")):
            hay, at = content.tobytes(), -1
            while (at := hay.find(needle, at + 1)) >= 0:
                if at % 4 == 0:
                    found.append(Place(name, row, at // 4, len(wanted)))
    return found


# 65,536 ids fill two bytes, so one that ends a row needs a third; ids of 1 and 4 bytes besides.
@pytest.mark.parametrize("vocab", [255, 256, 32_000, 65_536, 100_000])
def test_planted_spans_are_all_found(tmp_path: Path, vocab: int) -> None:
    """Catches spans that are lost or misplaced: at row ends, in later parts, with bytes 0 and 255
    in their ids, or where a chunk of another dtype is read with the wrong one.
    """
    rng = np.random.default_rng(vocab)
    chunks = {f"chunk_{i:03d}": rng.integers(0, vocab, (9, 256)) for i in range(3)}
    # Ids whose bytes are 0 and 255, and text that occurs twice.
    edges = np.array([0, 255, 256, 511, 65_280, 65_535, vocab - 1])
    chunks["chunk_001"][4] = rng.choice(edges[edges < vocab], 256)
    chunks["chunk_002"][8] = chunks["chunk_000"][3]
    manifest = folder_of(tmp_path / "data", chunks, vocab)

    planted = []
    for i in range(200):
        row = chunks[f"chunk_{i % 3:03d}"][i % 9]
        length = int(rng.integers(8, 201))
        start = (0, 256 - length, int(rng.integers(0, 257 - length)))[i % 3]
        planted.append(row[start : start + length])
    found = spans_of(manifest, *planted, part_tokens=1024)

    starts = np.cumsum([0, *map(len, planted)])
    assert [(span.start, span.length) for span in found] == [
        (start, len(one)) for start, one in zip(starts, planted, strict=False)
    ]
    for span, one in zip(found, planted, strict=True):
        expected = places_by_looking(chunks, one)
        assert list(span.places) == expected and span.count == len(expected)


def longest_by_looking(chunks: Chunks, query: list[int], start: int) -> int:
    length = 0
    while start + length < len(query) and places_by_looking(
        chunks, query[start : start + length + 1]
    ):
        length += 1
    return length


@pytest.mark.parametrize("seed", range(8))
def test_the_longest_match_of_every_position(tmp_path: Path, seed: int) -> None:
    """Few ids, so that everything occurs in parts everywhere: catches a comparison that goes on
    behind a row or a query, and a neighbor that is not the longest match.
    """
    rng = np.random.default_rng(seed)
    chunks = {f"chunk_{i:03d}": rng.integers(0, 2 + seed % 2, (5, 9)) for i in range(2)}
    manifest = folder_of(tmp_path / "data", chunks, 3)
    query = rng.integers(0, 3, 40).tolist()
    searcher = Searcher(open_index(manifest, part_tokens=9 * (1 + seed % 3)))

    lengths = searcher.matches(Queries.of([query])).max(axis=0)
    assert lengths.tolist() == [longest_by_looking(chunks, query, i) for i in range(len(query))]
    for span in searcher.spans(Queries.of([query]), 3, ALL):
        expected = places_by_looking(chunks, query[span.start : span.stop])
        assert sorted(map(repr, span.places)) == sorted(map(repr, expected))


def test_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    """Catches a match over the end of a row, over the end of a query, or made up."""
    rng = np.random.default_rng(3)
    ids = rng.integers(0, 500, (20, 32))
    manifest = folder_of(tmp_path / "data", {"chunk_000": ids}, 501)
    across = np.concatenate((ids[4, -7:], ids[5, :7]))
    broken = [np.concatenate((ids[r, :7], [500], ids[r, 8:15])) for r in range(20)]
    assert spans_of(manifest, across, ids[6, :4], ids[6, 4:8], *broken) == []
    assert spans_of(manifest) == spans_of(manifest, []) == []


def test_rows_of_one_repeated_token(tmp_path: Path) -> None:
    """Catches a sort or search that degenerates, and a count of the places shown alone."""
    manifest = folder_of(tmp_path / "data", {"chunk_000": np.full((50, 64), 7)}, 9)
    searcher = Searcher(open_index(manifest))
    found = searcher.spans(Queries.of([[7] * 66]), 8, 3)
    assert [(one.start, one.length, one.count) for one in found] == [(i, 64, 50) for i in range(3)]
    assert {(place.start, place.length) for place in found[0].places} == {(0, 64)}
    assert len(found[0].places) == 3


def test_a_query_ends_with_its_document(tmp_path: Path) -> None:
    """Catches a span from one document into the next, and one that is cut for nothing."""
    ids = np.arange(10, 74).reshape(1, 64)
    ids[0, 30] = EOS_ID
    manifest = folder_of(tmp_path / "data", {"chunk_000": ids}, 100)
    searcher = Searcher(open_index(manifest))
    query = ids[0, 15:50].tolist()
    apart = search_tokens(searcher, query, 8, ALL)
    assert [(one.first, one.last) for one in apart] == [(0, 16), (16, 35)]
    (one,) = search_tokens(searcher, query, 8, ALL, across_documents=True)
    assert (one.first, one.last, one.ids) == (0, 35, tuple(query))


# The index on the disk


def small(tmp_path: Path) -> Manifest:
    ids = np.random.default_rng(1).integers(0, 300, (8, 16))
    return folder_of(tmp_path / "data", {"chunk_000": ids, "chunk_001": ids[::-1]}, 300)


def test_a_chunk_that_was_rewritten_is_refused(tmp_path: Path) -> None:
    """Catches an answer from an index of other data, and a copy that is refused though equal."""
    manifest = small(tmp_path)
    open_index(manifest)
    path = manifest.folder / "chunk_001.npy"
    content = path.read_bytes()
    os.utime(path, (1, 1))
    open_index(manifest)

    path.write_bytes(content[:-2] + b"\1\1")
    with pytest.raises(DataError, match="is not the file that the index was built from"):
        open_index(manifest)

    # Prepared anew, with a manifest of its own: indexed anew.
    changed = add_chunk(manifest.folder, "chunk_001", np.full((8, 16), 5), 300)
    manifest = rewrite(manifest.folder, chunks=[manifest.chunks[0], changed])
    (span,) = spans_of(manifest, [5] * 9)
    assert span.count == 8 * 8


def test_a_killed_build_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a part that counts without being whole, and one that is built twice."""
    manifest, built = small(tmp_path), []

    def write(folder: Path, manifest: Manifest, part: index_files.Part, *rest: Any) -> None:
        if len(built) == 2:
            # What a kill leaves: the array without its header.
            index_files.array_path(folder, part).write_bytes(b"torn")
            raise KeyboardInterrupt
        built.append(part.name)
        index_files.write_part(folder, manifest, part, *rest)

    monkeypatch.setattr(build, "write_part", write)
    with pytest.raises(KeyboardInterrupt):
        open_index(manifest, part_tokens=64)
    built.append("killed")
    found = open_index(manifest, part_tokens=64)
    assert built == ["chunk_000.0", "chunk_000.1", "killed", "chunk_001.0", "chunk_001.1"]
    assert [part.name for part in found.parts] == built[:2] + built[3:]
    assert found.tokens == 256 and found.bytes < 3000

    # A flipped bit is found where the arrays are hashed, and mended.
    path = index_files.array_path(found.folder, found.parts[0])
    flipped = bytearray(path.read_bytes())
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    open_index(manifest, part_tokens=64, check=True)
    assert built[-1] == "chunk_000.0"


def test_four_bytes_a_token(tmp_path: Path) -> None:
    """Catches an index that grows: positions of eight bytes, or a copy of the tokens."""
    ids = np.random.default_rng(1).integers(0, 30_000, (64, 512))
    found = open_index(folder_of(tmp_path / "data", {"chunk_000": ids}, 32_000))
    assert found.bytes < 4.1 * ids.size


def test_without_the_library_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback, and an index that needs the library although it is there."""
    manifest = small(tmp_path)
    monkeypatch.setitem(sys.modules, "pydivsufsort", None)
    with pytest.raises(UserError, match=r"pip install 'k2train\[trace\]'"):
        open_index(manifest)
    monkeypatch.undo()
    open_index(manifest)
    monkeypatch.setitem(sys.modules, "pydivsufsort", None)
    open_index(manifest)


# Documents that go on in another row


LENGTH = 16


def documents_folder(tmp_path: Path) -> tuple[Manifest, list[Any]]:
    """Documents cut into rows that are spread over three chunks; the last one is held out."""
    rng = np.random.default_rng(11)
    documents = [np.append(rng.integers(3, 400, n), EOS_ID) for n in (3, 40, 12, 200, 29, 90, 5)]
    stream = [(d, i, token) for d, ids in enumerate(documents) for i, token in enumerate(ids)]
    stream = stream[: len(stream) // LENGTH * LENGTH]
    rows = rng.permutation(len(stream) // LENGTH)

    infos, folder = [], tmp_path / "data"
    folder.mkdir()
    for name, own in zip(
        ("chunk_000", "chunk_001", "held_out"), np.array_split(rows, 3), strict=True
    ):
        pieces: dict[str, list[Any]] = {
            key: [] for key in ("row", "start", "length", "subset", "source", "document", "offset")
        }
        for number, row in enumerate(own):
            part = stream[row * LENGTH : (row + 1) * LENGTH]
            for start in range(LENGTH):
                if start and part[start][0] == part[start - 1][0]:
                    pieces["length"][-1] += 1
                    continue
                document, offset, _ = part[start]
                values = (number, start, 1, "web", "file", f"d{document}", offset)
                for key, value in zip(pieces, values, strict=True):
                    pieces[key].append(value)
        ids = [[token for *_, token in stream[r * LENGTH : (r + 1) * LENGTH]] for r in own]
        infos.append(add_chunk(folder, name, np.array(ids), 400, {"web": 1}, pieces=pieces))
    return finish(folder, infos, LENGTH, 400), documents


def test_a_span_goes_on_in_the_rows_of_its_document(tmp_path: Path) -> None:
    """Catches a quotation that is told in parts, or lost where each part is short; and one that
    goes on in a row of another document.
    """
    manifest, documents = documents_folder(tmp_path)
    searcher = Searcher(open_index(manifest))
    ids = {info.name: np.load(manifest.folder / info.file) for info in manifest.all_chunks()}
    rng = np.random.default_rng(0)
    for document in (documents[1], documents[3], documents[5]):
        for length in (8, 9, 15, 16, 17, 33, 60, len(document) - 30):
            start = int(rng.integers(0, max(1, len(document) - 25 - length)))
            wanted = document[start : start + length]
            (span,) = searcher.spans(Queries.of([wanted]), 8, ALL)
            assert (span.start, span.length, span.count) == (0, len(wanted), 1)
            read = [
                ids[p.chunk][p.row][p.start : p.start + p.length] for p in span.places[0].rows()
            ]
            assert np.concatenate(read).tolist() == wanted.tolist()
            assert (span.places[0].start + length > LENGTH) == (len(read) > 1)

    # Two documents that do not follow each other, at a border.
    false = np.concatenate((documents[1][:40][-4:], documents[5][:4]))
    assert searcher.spans(Queries.of([false]), 8, ALL) == []


def test_the_borders_are_indexed_once(tmp_path: Path) -> None:
    """Catches an index of borders that is built at every start, or kept for other provenance."""
    manifest, _ = documents_folder(tmp_path)
    heard: list[str] = []
    for _ in range(2):
        open_index(manifest, message=heard.append, check=True)
    assert [text for text in heard if "borders" in text] == ["indexing the borders of 24 rows"]
    header = manifest.folder / "trace_index" / "borders.json"
    facts = json.loads(header.read_text())
    facts["chunks"][0][2] = "0" * 64
    header.write_text(json.dumps(facts))
    open_index(manifest, message=heard.append)
    assert len([text for text in heard if "borders" in text]) == 2


# Exposures


class StubRun:
    """What `Stage` asks of a run: order and progress without the files of a real one."""

    def __init__(self, directory: Path, manifest: Manifest, done: int, events: list[Any]) -> None:
        self.directory, self.name, self.manifest = directory, "run", manifest
        self.order = ChunkOrder(("chunk_001", "chunk_000"), (8, 8), 4)
        self.history = History(self.order, done, frozenset({2}))
        self.entries = entries(*events)


def metrics_row(attempt: int, step: int, chunk: str, first: int, loss: float) -> str:
    row = {
        "step": step,
        "attempt": attempt,
        "chunk": chunk,
        "loss": loss,
        "rows": [first, first + 4],
    }
    return json.dumps(row) + "\n"


@pytest.fixture
def run(tmp_path: Path) -> StubRun:
    """Attempt 1 read chunk_000 at steps 1 and 2; then it was moved behind chunk_001."""
    manifest = small(tmp_path)
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "metrics.jsonl").write_text(
        metrics_row(1, 1, "chunk_000", 0, 5.0)
        + metrics_row(1, 2, "chunk_000", 4, 4.5)
        + "damaged, of chunk_000\n"
        + metrics_row(2, 1, "chunk_001", 0, 4.0)
        + metrics_row(2, 2, "chunk_001", 4, 3.5)
        + metrics_row(2, 3, "chunk_000", 0, 3.0)
    )
    append_losses(directory, 2, 3, [15.0, 30.0, 45.0, 60.0])
    saved = [
        event(CheckpointSaved, checkpoint=f"ckpt_{i:03d}", step=step, manifest_sha256="")
        for i, step in enumerate((0, 2, 3))
    ]
    removed = event(CheckpointSaved, checkpoint="ckpt_000_step_000001", step=1)
    gone = event(CheckpointRemoved, checkpoint="ckpt_000_step_000001")
    return StubRun(directory, manifest, 3, [*saved, removed, gone])


def told(stage: Stage, chunk: str, row: int) -> list[tuple[Any, ...]]:
    keys = ("state", "step", "attempt", "loss", "checkpoint_before", "checkpoint_after")
    return [tuple(getattr(one, key) for key in keys) for one in stage.exposures(chunk, row)]


def test_exposures_of_a_row(run: StubRun) -> None:
    """Catches an undone step that counts, the step of the order before a deferral, and checkpoints
    that are gone or off by one.
    """
    stage = Stage(run)  # type: ignore[arg-type]
    assert told(stage, "chunk_000", 1) == [
        ("undone", 1, 1, 5.0, None, None),
        ("trained", 3, 2, 3.0, "ckpt_001", "ckpt_002"),
    ]
    assert told(stage, "chunk_000", 5) == [
        ("undone", 2, 1, 4.5, None, None),
        ("not trained yet", 4, None, None, None, None),
    ]
    assert told(stage, "chunk_001", 7) == [("skipped", 2, 2, 3.5, "ckpt_000", "ckpt_001")]
    # Mean over the 15 targets of a row.
    assert [e.sequence_loss for e in stage.exposures("chunk_000", 2)] == [None, 3.0]
    assert sum(stage.damaged) == 0


def test_a_step_whose_metrics_are_lost_was_trained_all_the_same(run: StubRun) -> None:
    """Catches a row that the ledger says was trained on, told as never read."""
    (run.directory / "metrics.jsonl").unlink()
    stage = Stage(run)  # type: ignore[arg-type]
    assert told(stage, "chunk_001", 0) == [("trained", 1, None, None, "ckpt_000", "ckpt_001")]


def test_a_branch_ends_with_its_checkpoint(run: StubRun) -> None:
    """Catches steps of the run before that a stage does not come from, told as trained on."""
    run.history = History(run.order, 2)
    stage = Stage(run, branch=True)  # type: ignore[arg-type]
    states = [(state, step) for state, step, *_ in told(stage, "chunk_000", 0)]
    assert states == [("undone", 1), ("after the branch", 3)]


def test_a_checkpoint_set_aside_is_none(run: StubRun) -> None:
    """Catches a checkpoint of a continuation that was given up."""
    back = event(Resumed, attempt=2, step=2, set_aside=("ckpt_002",))
    assert checkpoint_steps([*run.entries, *entries(back)]) == [(0, "ckpt_000"), (2, "ckpt_001")]


def test_row_losses_survive_a_torn_record(tmp_path: Path) -> None:
    """Catches records that shift after a kill, a damaged one that is believed, and a step done
    twice in one attempt of which the wrong one is read.
    """
    append_losses(tmp_path, 1, 7, [1.0, 2.0])
    with losses_path(tmp_path, 1).open("ab") as stream:
        stream.write(b"torn")
    append_losses(tmp_path, 1, 8, [3.0, 4.0])
    append_losses(tmp_path, 1, 7, [5.0, 6.0])
    losses = RowLosses(tmp_path, 2)
    assert [losses.of(1, step, 1) for step in (7, 8, 9)] == [6.0, 4.0, None]
    assert losses.of(1, 7, 1, last=False) == 2.0 and losses.of(2, 7, 1) is None

    content = bytearray(losses_path(tmp_path, 1).read_bytes())
    content[-1] ^= 1
    losses_path(tmp_path, 1).write_bytes(content)
    assert RowLosses(tmp_path, 2).of(1, 7, 0) is None


def test_the_folder_is_still_whole(tmp_path: Path) -> None:
    """Catches an index that changes the data folder it lies in."""
    manifest = small(tmp_path)
    open_index(manifest)
    assert read_manifest(manifest.folder).sha256 == manifest.sha256
