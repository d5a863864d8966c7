"""K2's chunk files in and out: the same ids in order, and nothing accepted that JSON refuses."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from k2train.data.chunk import (
    ChunkInfo,
    Manifest,
    check_files,
    read_manifest,
    verify_chunk,
)
from k2train.data.loader import Loader, Share
from k2train.data.order import make_order
from k2train.data.prepare.k2_format import chunk as k2_chunk
from k2train.data.prepare.k2_format import export_folder, import_folder
from k2train.data.prepare.k2_format import lines as k2_lines
from k2train.data.prepare.k2_format import provenance as k2_provenance
from k2train.data.prepare.k2_format.export_folder import export_k2
from k2train.data.prepare.k2_format.import_folder import UNKNOWN_TOKENIZER, import_k2
from k2train.data.prepare.k2_format.lines import KEYS, parse_lines
from k2train.data.prepare.progress import Progress
from k2train.data.prepare.run.executor import exclusive
from k2train.data.tokenizer_training import train_tokenizer
from k2train.errors import DataError
from k2train.files import sha256_file
from tests.support.data_folder import add_chunk, finish, hashes, rewrite, with_files

LENGTH, VOCAB = 8, 32032
REPOSITORY = Path(__file__).parents[3]
Sample = dict[str, Any]


def sample(seed: int, **changes: Any) -> Sample:
    """A line as K2 writes it, with ids of every number of digits."""
    rng = np.random.default_rng(seed)
    ids = (VOCAB ** rng.random(LENGTH)).astype(int) - 1
    subset = ("refinedweb", "redpajama.arxiv", "starcoder.ada")[seed % 3]
    values = (ids.tolist(), subset, subset, f"data/{subset}/{seed % 5}.jsonl", seed * 7)
    return {**dict(zip(KEYS, values, strict=True)), **changes}


def text_of(samples: Iterable[Sample]) -> bytes:
    return b"".join(json.dumps(item).encode() + b"\n" for item in samples)


def write_source(folder: Path, chunks: dict[int, list[Sample]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, samples in chunks.items():
        (folder / f"chunk_{number}.jsonl").write_bytes(text_of(samples))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(
        tmp_path / "k2", {i: [sample(10 * i + k) for k in range(4 + i)] for i in range(2)}
    )


def parse(
    content: bytes, piece_bytes: int = 100, length: int = LENGTH
) -> tuple[list[list[int]], list[Sample]]:
    pieces = (content[i : i + piece_bytes] for i in range(0, len(content), piece_bytes))
    blocks = list(parse_lines(pieces, "chunk_0.jsonl", length, VOCAB))
    assert [block.first for block in blocks] == np.cumsum([1, *(len(b.ids) for b in blocks)])[
        :-1
    ].tolist()
    return [row for block in blocks for row in block.ids.tolist()], [
        item for b in blocks for item in b.fields
    ]


# Lines


@given(st.integers(1, 12), st.integers(1, 3000), st.booleans(), st.integers(1, 40))
@settings(deadline=None, max_examples=60)
def test_lines_come_out_as_json_reads_them(
    count: int, piece_bytes: int, ended: bool, length: int
) -> None:
    """Catches a number cut at a block boundary, digits of a neighbour, and a lost last line."""
    rng = np.random.default_rng(count * piece_bytes)
    expected = [(VOCAB ** rng.random(length)).astype(int).tolist() for _ in range(count)]
    samples = [sample(i, token_ids=ids) for i, ids in enumerate(expected)]
    content = text_of(samples)
    ids, fields = parse(content if ended else content[:-1], piece_bytes, length)
    assert ids == expected
    assert fields == [{**item, "token_ids": None} for item in samples]
    assert [list(item) for item in fields] == [list(KEYS)] * count


def test_numbers_of_every_length_beside_each_other() -> None:
    """Catches a fifth digit taken from the left neighbour, and one that is dropped."""
    values = [0, 1, 9, 10, 19, 99, 100, 909, 999, 1000, 9999, 10000, 20001, 32031]
    pairs = [value for a in values for b in values for value in (a, b)]
    found, _ = parse(text_of([sample(0, token_ids=pairs)] * 2), 10**6, len(pairs))
    assert found == [pairs, pairs]


def test_plain_lines_take_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a fast path that always declines: all results would be right, and slow."""
    content = text_of(sample(i) for i in range(40))
    expected = parse(content)

    def refuse(*_: object) -> Any:
        raise AssertionError("the slow path was taken")

    monkeypatch.setattr(k2_lines, "parse_line", refuse)
    assert parse(content, 1000) == expected
    with pytest.raises(AssertionError, match="slow path"):
        parse(content.replace(b", ", b",", 1))


BYTES = st.sampled_from(
    [bytes([b]) for b in b'0123456789,, []{}":/-.eE\\\nnult\x00\xff'] + [b"", b", ", b"00", b"],"]
)


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 2), BYTES), min_size=1, max_size=3),
    st.integers(1, 900),
)
@settings(deadline=None, max_examples=500)
def test_nothing_is_accepted_that_json_refuses(
    edits: list[tuple[int, int, bytes]], piece_bytes: int
) -> None:
    """Catches a fast path that accepts an invalid line, or reads a valid line differently."""
    content = bytearray(text_of(sample(i) for i in range(3)))
    for offset, removed, put in edits:
        offset %= len(content)
        content[offset : offset + removed] = put

    try:
        lines = [json.loads(line) for line in bytes(content).removesuffix(b"\n").split(b"\n")]
        valid = all(
            isinstance(line, dict)
            and set(KEYS) <= set(line)
            and isinstance(line["subset_name"], str)
            and isinstance(line["token_ids"], list)
            and len(line["token_ids"]) == LENGTH
            and all(type(i) is int and 0 <= i < VOCAB for i in line["token_ids"])
            for line in lines
        )
    except ValueError:
        valid = False

    if not valid:
        with pytest.raises(DataError, match=r"^chunk_0\.jsonl:\d+: "):
            parse(bytes(content), piece_bytes)
        return

    ids, fields = parse(bytes(content), piece_bytes)
    assert ids == [line["token_ids"] for line in lines]
    assert fields == [{**line, "token_ids": None} for line in lines]
    assert [list(item) for item in fields] == [list(line) for line in lines]


def numbers(text: str) -> bytes:
    """A line whose ids are written as `text`."""
    return json.dumps(sample(1, token_ids=None)).replace("null", f"[{text}]").encode()


BROKEN: list[tuple[str, bytes, str]] = [
    ("no JSON", b'{"token_ids": [1, 2', r"chunk_1\.jsonl:2: not valid JSON"),
    ("no object", b"[1, 2]", "must be a JSON object, is list"),
    ("empty line", b"", "chunk_1.jsonl:2: not valid JSON"),
    ("not UTF-8", text_of([sample(1)]).strip().replace(b"redp", b"red\xff"), "not valid JSON"),
    (
        "one short",
        text_of([sample(1, token_ids=[1] * 7)]),
        r":2: token_ids has 7 ids, all samples must have 8",
    ),
    ("one long", text_of([sample(1, token_ids=[1] * 9)]), r":2: token_ids has 9 ids"),
    ("two lines of one", text_of([sample(1, token_ids=[1] * 16)]), "token_ids has 16 ids"),
    (
        "above",
        text_of([sample(1, token_ids=[5] * 6 + [VOCAB, 5])]),
        r":2: token_ids\[6\] is 32032, not below vocab_si",
    ),
    (
        "far above",
        text_of([sample(1, token_ids=[2**40] * 8)]),
        r"token_ids\[0\] must be a whole number from 0",
    ),
    (
        "negative",
        text_of([sample(1, token_ids=[5] * 7 + [-1])]),
        r":2: token_ids\[7\] must be a whole number",
    ),
    ("a fraction", text_of([sample(1, token_ids=[5] * 7 + [1.5])]), r"token_ids\[7\] .* is 1.5"),
    ("a truth", text_of([sample(1, token_ids=[5] * 7 + [True])]), r"token_ids\[7\] .* is True"),
    ("leading zero", numbers("1, 2, 3, 04, 5, 6, 7, 8"), ":2: not valid JSON"),
    ("zeros", numbers("1, 2, 3, 00, 5, 6, 7, 8"), ":2: not valid JSON"),
    ("a number missing", numbers("1, 2, 3, , 5, 6, 7, 8"), ":2: not valid JSON"),
    ("a comma missing", numbers("1, 2, 3, 4 4, 5, 6, 7, 8"), ":2: not valid JSON"),
    ("a comma too many", numbers("1, 2, 3, 4, 5, 6, 7, 8, "), ":2: not valid JSON"),
    (
        "too deep",
        text_of([sample(1)]).replace(b'"source": ', b'"source": ' + b"[" * 10**5),
        ":2: not valid JSON",
    ),
    ("after the end", text_of([sample(1)]).strip() + b" 1", ":2: not valid JSON"),
    ("twice on a line", text_of([sample(1)]).strip() * 2, ":2: not valid JSON"),
    (
        "no subset",
        json.dumps({k: v for k, v in sample(1).items() if k != "subset_name"}).encode(),
        "'subset_name' is mi",
    ),
    ("subset no text", text_of([sample(1, subset_name=None)]), "subset_name must be text, is None"),
    ("no ids", text_of([sample(1, token_ids=[])]), "token_ids must be a list of ids, is empty"),
    (
        "ids no list",
        text_of([sample(1, token_ids={"a": 1})]),
        "token_ids must be a list of ids, is dict",
    ),
]


def break_line(source: Path, line: bytes) -> None:
    lines = (source / "chunk_1.jsonl").read_bytes().split(b"\n")
    lines[1] = line.removesuffix(b"\n")
    (source / "chunk_1.jsonl").write_bytes(b"\n".join(lines))


@pytest.mark.parametrize(
    ("line", "words"), [pytest.param(line, words, id=name) for name, line, words in BROKEN]
)
def test_broken_line_is_named(source: Path, tmp_path: Path, line: bytes, words: str) -> None:
    """Catches a broken sample that is trained on, a message without the place, and half a folder
    left.
    """
    break_line(source, line)
    with pytest.raises(DataError, match=words) as caught:
        import_k2(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert "chunk_1.jsonl:2: " in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list(tmp_path.rglob("chunk_001.*"))


def test_broken_line_is_named_by_a_worker(source: Path, tmp_path: Path) -> None:
    """Catches a mistake that comes out of a process as a traceback, or not at all."""
    break_line(source, b"{")
    with pytest.raises(DataError, match=r"^chunk_1\.jsonl:2: not valid JSON"):
        import_k2(source, tmp_path / "out", workers=2)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("chunk_001.*"))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(
            text_of(sample(0, token_ids=[5] * n) for n in (7, 9)),
            id="ids of a line counted for the next",
        ),
        pytest.param(text_of([sample(0)]).replace(b"{", b"{\n"), id="a line end at the beginning"),
        pytest.param(
            text_of([sample(0)]).replace(b'"source"', b'\n"source"'), id="a line end at the end"
        ),
        pytest.param(text_of([sample(0)]).replace(b", ", b",\n", 1), id="a line end between ids"),
    ],
)
def test_a_sample_is_one_line(content: bytes) -> None:
    """Catches a block that is right as a whole, made of lines that are not."""
    with pytest.raises(DataError, match=r"^chunk_0\.jsonl:1: "):
        parse(content, 10**6)


def test_a_file_without_line_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a wrong file that is taken into memory whole."""
    monkeypatch.setattr(k2_lines, "MAX_LINE_BYTES", 1000)
    with pytest.raises(DataError, match=r"chunk_0.jsonl:5: longer than 1000 bytes"):
        parse(text_of(sample(i) for i in range(4)) + b"1, " * 1000)


# Folders


def test_import_keeps_ids_order_and_origin(source: Path, tmp_path: Path) -> None:
    """Catches rows out of order, a chunk under another number, counts that are not the file's, and
    lost origin.
    """
    manifest = import_k2(source, tmp_path / "out")
    check_files(manifest)
    assert [info.name for info in manifest.chunks] == ["chunk_000", "chunk_001"]
    assert (manifest.sequence_length, manifest.vocab_size, manifest.dtype) == (
        LENGTH,
        VOCAB,
        "uint16",
    )
    assert manifest.tokenizer_sha256 == UNKNOWN_TOKENIZER
    totals = dict.fromkeys(manifest.facts.account, 0)
    for number, info in enumerate(manifest.chunks):
        verify_chunk(manifest, info)
        samples = [
            json.loads(line) for line in (source / f"chunk_{number}.jsonl").read_text().splitlines()
        ]
        assert np.load(manifest.folder / info.file).tolist() == [
            item["token_ids"] for item in samples
        ]
        table = parquet.read_table(manifest.folder / str(info.provenance)).to_pydict()
        assert table["row"] == list(range(len(samples)))
        assert set(table["start"]) == set(table["offset"]) == set(table["repeat"]) == {0}
        assert (set(table["length"]), set(table["fim"])) == ({LENGTH}, {"none"})
        assert table["subset"] == [item["subset_name"] for item in samples]
        assert table["source"] == [item["src_filename"] for item in samples]
        assert table["document"] == [str(item["line_idx_in_src"]) for item in samples]
        assert info.provenance_sha256 == sha256_file(manifest.folder / str(info.provenance))
        for name, tokens in info.tokens_per_subset.items():
            assert tokens == LENGTH * table["subset"].count(name)
            totals[name] += tokens
    assert {name: item["used_tokens"] for name, item in manifest.facts.account.items()} == totals
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k2", "out"]


def test_chunks_are_trained_on_as_they_stand_in_the_files(tmp_path: Path) -> None:
    """Catches chunk_10 before chunk_2, and rows that reach the model in another order than K2's
    lines.
    """
    source = write_source(
        tmp_path / "k2", {i: [sample(10 * i + k) for k in range(4)] for i in range(12)}
    )
    manifest = import_k2(source, tmp_path / "out")
    assert [info.name for info in manifest.chunks] == [f"chunk_{i:03d}" for i in range(12)]
    expected = [sample(10 * i + k)["token_ids"] for i in range(12) for k in range(4)]
    order = make_order(manifest, None, 2, LENGTH)
    with Loader(manifest, order, Share(0, 1, 2), VOCAB, verify=True) as loader:
        steps = [loader.step(step) for step in range(1, order.total_steps + 1)]
    rows = torch.cat([part.tokens for batch in steps for part in batch])
    assert rows.tolist() == expected


ODD: list[Sample] = [
    sample(1, source={"name": "x", "list": [1, None]}),
    sample(1, source=None),
    sample(1, line_idx_in_src="17"),
    sample(1, line_idx_in_src=[3, 4]),
    sample(1, line_idx_in_src=-3),
    sample(1, line_idx_in_src=10**30),
    sample(1, line_idx_in_src=True),
    sample(1, src_filename=None),
    sample(1, src_filename="\ud800"),
    sample(1, subset_name="\udfff\u00e9"),
    sample(1, source='quote " slash / \\ \n \u2028 \u00e9'),
    sample(1, more=1),
    dict(reversed(sample(1).items())),
    {"more": {"token_ids": [1]}, **sample(1)},
    {"more": {"token_ids": [1] * LENGTH}, **sample(1)},
    sample(1, more={"token_ids": [1, 2]}),
    sample(1, source='"token_ids": ['),
]


@pytest.mark.parametrize("item", ODD, ids=lambda item: json.dumps(item)[-60:])
def test_what_no_column_holds_comes_back_exactly(tmp_path: Path, item: Sample) -> None:
    """Catches a text that comes back as a number, and a key that is lost or moved."""
    source = write_source(tmp_path / "k2", {0: [sample(0), item, sample(2)]})
    manifest = import_k2(source, tmp_path / "out")
    (exported,) = export_k2(manifest, tmp_path / "back")
    assert exported.read_bytes() == (source / "chunk_0.jsonl").read_bytes()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda x: st.lists(x, max_size=2),
    max_leaves=3,
)


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, VOCAB - 1), min_size=LENGTH, max_size=LENGTH),
            st.text() | JSON,
            st.text(max_size=4),
            st.text() | JSON,
            st.integers() | JSON,
        ),
        min_size=1,
        max_size=6,
    )
)
@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_export_gives_back_what_was_imported(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any]
) -> None:
    """Catches any line that does not survive the way in and out, byte for byte; and a second import
    that differs.
    """
    folder = tmp_path_factory.mktemp("property")
    samples = [dict(zip(KEYS, row, strict=True)) for row in rows]
    source = write_source(folder / "k2", {7: samples})
    first = import_k2(source, folder / "first")
    export_k2(first, folder / "back")
    assert (folder / "back/chunk_7.jsonl").read_bytes() == (source / "chunk_7.jsonl").read_bytes()
    again = import_k2(folder / "back", folder / "again")
    assert (again.chunks, again.facts.account) == (first.chunks, first.facts.account)


def test_groups_of_rows_do_not_change_the_content(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches rows numbered within their group, and an export that stops between groups."""
    monkeypatch.setattr(k2_provenance, "GROUP_ROWS", 2)
    monkeypatch.setattr(k2_chunk, "EXPORT_ROWS", 3)
    monkeypatch.setattr(k2_chunk, "PIECE_BYTES", 300)
    manifest = import_k2(source, tmp_path / "out")
    path = manifest.folder / str(manifest.chunks[1].provenance)
    assert parquet.ParquetFile(path).metadata.num_row_groups == 3
    assert parquet.read_table(path)["row"].to_pylist() == list(range(5))
    for exported in export_k2(manifest, tmp_path / "back"):
        assert exported.read_bytes() == (source / exported.name).read_bytes()


@pytest.mark.parametrize("frames", [1, 3])
def test_zst_is_the_same(source: Path, tmp_path: Path, frames: int) -> None:
    """Catches frames after the first zstd frame being left out."""
    plain = import_k2(source, tmp_path / "plain")
    packed = tmp_path / "packed"
    packed.mkdir()

    for path in source.iterdir():
        content = path.read_bytes()
        cuts = [len(content) * i // frames for i in range(frames + 1)]
        parts = [zstandard.compress(content[a:b]) for a, b in pairwise(cuts)]
        (packed / f"{path.name}.zst").write_bytes(b"".join(parts))

    assert import_k2(packed, tmp_path / "out").chunks == plain.chunks

    for damage, words in (
        (lambda b: b[:-5], "truncated"),
        (lambda b: b"\0" * 20, "cannot be unpacked"),
    ):
        (packed / "chunk_1.jsonl.zst").write_bytes(
            damage((packed / "chunk_1.jsonl.zst").read_bytes())
        )
        with pytest.raises(DataError, match=rf"chunk_1.jsonl.zst: {words}"):
            import_k2(packed, tmp_path / "out2")


def test_the_files_must_be_a_row_of_chunks(source: Path, tmp_path: Path) -> None:
    """Catches a chunk missing from a download, and one that exists twice."""

    def refused(words: str) -> None:
        with pytest.raises(DataError, match=words):
            import_k2(source, tmp_path / "out")

    (source / "chunk_4.jsonl").write_bytes(text_of([sample(4)]))
    refused(r"2 of chunk_0 to chunk_4 missing \(chunk_2, chunk_3\)")
    (source / "chunk_4.jsonl").rename(source / "chunk_01.jsonl")
    refused("chunk_01.jsonl and chunk_1.jsonl are the same chunk")
    (source / "chunk_01.jsonl").unlink()

    for number in (0, 1):
        content = (source / f"chunk_{number}.jsonl").read_bytes()
        (source / f"chunk_{number}.jsonl").write_bytes(b"")
        refused(f"chunk_{number}.jsonl: holds no line")
        (source / f"chunk_{number}.jsonl").write_bytes(content)

    for path in source.iterdir():
        path.unlink()
    refused("holds no chunk_<i>.jsonl")
    source.rmdir()
    refused("is not a folder")
    assert not (tmp_path / "out").exists()


def test_finished_chunks_are_not_read_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches work done twice after a stop, and a file of another size or source taken for
    finished.
    """
    good = (source / "chunk_1.jsonl").read_bytes()
    (source / "chunk_1.jsonl").write_bytes(b"{\n")
    read: list[str] = []
    usual = k2_chunk.read_pieces
    monkeypatch.setattr(k2_chunk, "read_pieces", lambda path: read.append(path.name) or usual(path))
    first = "chunk_0.jsonl"  # its first line is read for the length of the samples, at every start

    def attempt(expected: list[str]) -> None:
        read.clear()
        with pytest.raises(DataError, match=r"chunk_1\.jsonl:1"):
            import_k2(source, tmp_path / "out")
        assert read == expected

    work = tmp_path / "out.work/k2_import"
    attempt([first, first, "chunk_1.jsonl"])
    attempt([first, "chunk_1.jsonl"])
    (work / "data/chunk_000.npy").write_bytes(b"half")
    attempt([first, first, "chunk_1.jsonl"])
    (source / first).write_bytes((source / first).read_bytes() + text_of([sample(99)]))
    attempt([first, first, "chunk_1.jsonl"])
    (work / "records/chunk_000.json").write_text("{")
    attempt([first, first, "chunk_1.jsonl"])
    (source / "chunk_1.jsonl").write_bytes(good)
    (work / "data/chunk_005.npy.tmp").write_bytes(b"left by a kill")
    read.clear()
    manifest = import_k2(source, tmp_path / "out")
    assert read == [first, "chunk_1.jsonl"]
    assert sorted(hashes(manifest.folder)) == sorted(
        ["manifest.json", *(f"chunk_00{i}.{kind}" for i in range(2) for kind in ("npy", "parquet"))]
    )
    assert [info.rows for info in manifest.chunks] == [5, 5]
    assert not (tmp_path / "out.work").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from k2train.data.prepare.k2_format.import_folder import import_k2
count, usual = 0, os.replace
def replace(*names):
    globals()["count"] += 1
    if count == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    usual(*names)
os.replace = replace
import_k2(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_killed_anywhere_it_ends_with_the_same_bytes(source: Path, tmp_path: Path) -> None:
    """Catches a half-written file taken for complete, at a kill before any rename."""
    expected = hashes(import_k2(source, tmp_path / "whole/out").folder)
    # Three renames a chunk, one of the manifest, one of the folder.
    for number in range(1, 9):
        output = tmp_path / f"killed_{number}" / "out"
        command = [sys.executable, "-c", KILLED, str(source), str(output), str(number)]
        done = subprocess.run(command, cwd=REPOSITORY, check=False, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not output.exists()
        import_k2(source, output)
        assert hashes(output) == expected
        assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_workers_change_no_byte(source: Path, tmp_path: Path) -> None:
    """Catches chunks in the order in which they finished."""
    alone = hashes(import_k2(source, tmp_path / "1/out").folder)
    assert hashes(import_k2(source, tmp_path / "2/out", workers=2).folder) == alone


def test_what_is_there_is_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a folder replaced without being asked, and an import done twice."""
    output = tmp_path / "out"
    manifest = import_k2(source, output)
    monkeypatch.setattr(import_folder, "import_chunk", lambda task: pytest.fail("imported again"))
    assert import_k2(source, output) == manifest
    for change in ({"vocab_size": 40000}, {"tokenizer_sha256": "f" * 64}):
        with pytest.raises(DataError, match="holds other data: name another, or give --force"):
            import_k2(source, output, **change)

    (source / "chunk_2.jsonl").write_bytes(text_of([sample(5)]))
    with pytest.raises(DataError, match="holds other data"):
        import_k2(source, output)
    monkeypatch.undo()
    assert len(import_k2(source, output, force=True).chunks) == 3
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter").write_text("the only copy")
    for force in (False, True):
        with pytest.raises(DataError, match="is not a data folder"):
            import_k2(source, other, force=force)

    assert (other / "chapter").read_text() == "the only copy"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k2", "out", "thesis"]


def test_the_tokenizer_travels_along(source: Path, tmp_path: Path) -> None:
    """Catches a manifest that names another tokenizer than the given one."""
    tokenizer = train_tokenizer([f"the value of {i} is a list\n" for i in range(200)], 300)
    model = tmp_path / "some.model"
    tokenizer.save(model)
    manifest = import_k2(source, tmp_path / "out", tokenizer=model)
    assert manifest.tokenizer_sha256 == tokenizer.sha256
    assert (manifest.folder / manifest.facts.tokenizer.file).read_bytes() == model.read_bytes()
    assert manifest.facts.tokenizer.specials == tuple(tokenizer.specials)
    assert (
        import_k2(source, tmp_path / "named", tokenizer_sha256="a" * 64).tokenizer_sha256
        == "a" * 64
    )
    with pytest.raises(DataError, match="its hash is"):
        import_k2(source, tmp_path / "other", tokenizer=model, tokenizer_sha256="a" * 64)
    with pytest.raises(DataError, match=r"vocab_size \(317\) must be at least that of .*\(318\)"):
        import_k2(source, tmp_path / "other", tokenizer=model, vocab_size=317)


def test_what_the_ids_of_a_published_folder_begin_with_is_said(
    source: Path, tmp_path: Path
) -> None:
    """Catches imported ids that claim the spelling of a recipe, which nobody here decided."""
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"the value of {i} is a list" for i in range(200)]),
        model_writer=content,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        minloglevel=2,
    )
    model = tmp_path / "llama.model"
    model.write_bytes(content.getvalue())
    facts = import_k2(source, tmp_path / "out", tokenizer=model).facts.tokenizer
    assert facts is not None and facts.dummy_prefix == "as published"


def test_a_large_vocabulary(tmp_path: Path) -> None:
    """Catches ids wrapped at 65536, and numbers of six digits read as five."""
    samples = [sample(0, token_ids=[0, 65535, 65536, 99999, 100000, 123456, 7, 149999])] * 3
    manifest = import_k2(
        write_source(tmp_path / "k2", {0: samples}), tmp_path / "out", vocab_size=150000
    )
    assert np.load(manifest.folder / "chunk_000.npy").tolist() == [
        item["token_ids"] for item in samples
    ]


def test_a_full_disk_is_one_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback, and a half-written chunk, where the disk is full."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(k2_chunk, "_write_header", full)
    with pytest.raises(DataError, match=r"chunk_0\.jsonl: .*No space left on device; make room"):
        import_k2(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["k2"]


def lines_of(progress: Progress) -> list[str]:
    assert isinstance(progress.stream, io.StringIO)
    return progress.stream.getvalue().splitlines()


def test_an_existing_import_is_reported(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches `import: 0 chunks`, and an existing folder reported as imported."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "out"
    monkeypatch.setattr(import_folder, "swap_in", killed)
    with pytest.raises(KeyboardInterrupt):
        import_k2(source, output)
    monkeypatch.undo()
    progress = Progress(io.StringIO())
    import_k2(source, output, progress=progress)
    assert lines_of(progress) == [], "all chunks were finished before"
    import_k2(source, output, progress=progress)
    assert lines_of(progress) == [f"{output}: already holds this import"]


def test_a_failed_import_leaves_no_empty_folder(source: Path, tmp_path: Path) -> None:
    """Catches a work folder that holds only a lock or leftovers of a kill, and created parents that
    stay.
    """
    break_line(source, b"{")
    (source / "chunk_0.jsonl").write_bytes(b'{"token_ids": [1, 2], ')
    work = tmp_path / "out.work/k2_import"
    (work / "records").mkdir(parents=True)
    (work / "records/chunk_000.json.tmp").write_text("left by a kill")

    for output in (tmp_path / "out", tmp_path / "deep/er/out"):
        for workers in (1, 2):
            with pytest.raises(DataError, match="not valid JSON"):
                import_k2(source, output, workers=workers)
            assert [path.name for path in tmp_path.iterdir()] == ["k2"]

    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"k2_import: cannot be created \(Not a directory\)"):
        import_k2(source, tmp_path / "file" / "out")


def test_two_imports_into_one_folder(source: Path, tmp_path: Path) -> None:
    """Catches two that write, and at the end remove, the same work folder."""
    output = tmp_path / "out"
    work = tmp_path / "out.work/k2_import"
    work.mkdir(parents=True)

    with (
        exclusive(work),
        pytest.raises(DataError, match=rf"already running \(pid {os.getpid()}\)"),
    ):
        import_k2(source, output)

    assert work.is_dir() and not output.exists()
    import_k2(source, output)
    work.mkdir(parents=True)
    with exclusive(work), pytest.raises(DataError, match="already running"):
        import_k2(source, output)
    assert work.is_dir(), "that of the one that replaces the folder"
    import_k2(source, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k2", "out"]


# Export of folders that were not imported


def test_an_export_reports_what_is_lost(source: Path, tmp_path: Path) -> None:
    """Catches sources, a held-out chunk, boundaries or masks lost silently, and a report where
    nothing is lost.
    """
    progress = Progress(io.StringIO())
    export_k2(import_k2(source, tmp_path / "out"), tmp_path / "back", progress)
    assert [line.split(":")[0] for line in lines_of(progress)] == ["export"]
    manifest = ours(tmp_path / "ours")
    export_k2(manifest, tmp_path / "second", progress)
    first = (
        "not exported: the sources of 1 of 3 pieces (a line names the document its row begins with)"
    )
    assert lines_of(progress)[-1] == first
    (info,) = manifest.chunks
    manifest = rewrite(
        manifest.folder,
        chunks=[with_files(manifest.folder, info, borders=[3])],
        held_out=add_chunk(
            manifest.folder, "held_out", np.ones((1, LENGTH)), VOCAB, {"code": LENGTH}
        ),
    )
    files = export_k2(manifest, tmp_path / "third", progress)
    assert lines_of(progress)[-1] == f"{first}, held_out (1 row), the document borders"
    assert [path.name for path in files] == ["chunk_12.jsonl"]

    def masked(info: Any) -> Any:
        learned = np.arange(LENGTH) > np.zeros((info.rows, 1))
        return with_files(manifest.folder, info, mask=learned)

    chunks, held_out = [masked(manifest.chunks[0])], masked(manifest.held_out)
    export_k2(rewrite(manifest.folder, chunks=chunks, held_out=held_out), tmp_path / "4", progress)
    assert lines_of(progress)[-1].endswith("the document borders, the loss masks")


def ours(folder: Path) -> Manifest:
    """Two rows not from K2: the first holds two documents, the second the rest of the last one."""
    folder.mkdir()
    ids = np.arange(2 * LENGTH).reshape(2, LENGTH)
    columns = {
        "row": [0, 0, 1],
        "start": [0, 3, 0],
        "length": [3, LENGTH - 3, LENGTH],
        "subset": ["code"] * 3,
    }

    columns |= {"source": ["a.py", "b.jsonl", "b.jsonl"], "document": ["a.py:f", "007", "42"]}
    info = add_chunk(folder, "chunk_012", ids, VOCAB, {"code": 2 * LENGTH}, pieces=columns)
    return finish(folder, [info], LENGTH, VOCAB)


def test_our_own_rows_are_named_by_their_first_piece(tmp_path: Path) -> None:
    """Catches a line per piece instead of per row, ids out of order, and names that K2's readers do
    not know.
    """
    manifest = ours(tmp_path / "ours")
    (path,) = export_k2(manifest, tmp_path / "back")
    assert path.name == "chunk_12.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [tuple(line) for line in lines] == [KEYS, KEYS]
    assert [line["token_ids"] for line in lines] == np.arange(2 * LENGTH).reshape(
        2, LENGTH
    ).tolist()
    assert [list(line.values())[1:] for line in lines] == [
        ["code", "code", "a.py", "a.py:f"],
        ["code", "code", "b.jsonl", 42],
    ]
    again = import_k2(tmp_path / "back", tmp_path / "again")
    assert again.chunks[0].sha256 == manifest.chunks[0].sha256
    (second,) = export_k2(again, tmp_path / "second")
    assert second.read_bytes() == path.read_bytes()


def test_export_refuses_what_it_cannot_vouch_for(tmp_path: Path) -> None:
    """Catches export of a damaged chunk, and writing into a folder that is not empty."""
    manifest = ours(tmp_path / "ours")
    back = tmp_path / "back"
    back.mkdir()
    (back / "chunk_12.jsonl").write_text("the only copy")
    with pytest.raises(DataError, match="exists already, and an export never overwrites"):
        export_k2(manifest, back)
    assert (back / "chunk_12.jsonl").read_text() == "the only copy"
    (back / "chunk_12.jsonl").unlink()

    for file in ("chunk_012.parquet", "chunk_012.npy"):
        path = manifest.folder / file
        good = path.read_bytes()
        path.write_bytes(good[:-3] + b"x" + good[-2:])
        with pytest.raises(DataError, match=file):
            export_k2(manifest, back)
        path.write_bytes(good)

    for change, words in (
        ({"provenance": None}, "no provenance"),
        ({"name": "extra"}, "its name has no number"),
    ):
        content = json.loads(manifest.path.read_text())
        content["chunks"][0].update(change)
        (manifest.folder / "other.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match=words):
            export_k2(read_manifest(manifest.folder / "other.json"), back)

    assert list(back.iterdir()) == []


def test_a_stopped_export_is_resumed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches work done twice, a half-written file taken for complete, and files of two data sets
    in one folder.
    """
    manifest, back = import_k2(source, tmp_path / "out"), tmp_path / "back"
    usual = export_folder.export_chunk
    asked: list[str] = []

    def stop_at_the_second(manifest: Manifest, info: ChunkInfo, path: Path) -> None:
        asked.append(info.name)
        if info.name == "chunk_001":
            path.with_name(path.name + ".tmp").write_text("half")
            raise KeyboardInterrupt
        usual(manifest, info, path)

    monkeypatch.setattr(export_folder, "export_chunk", stop_at_the_second)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            export_k2(manifest, back)

    assert asked == ["chunk_000", "chunk_001", "chunk_001"]
    monkeypatch.undo()
    assert not back.exists()
    export_k2(manifest, back)
    assert hashes(back) == hashes(source)
    (tmp_path / "back.tmp").mkdir()
    (tmp_path / "back.tmp" / "chunk_0.jsonl").write_text("of another data set")
    back.rename(tmp_path / "first")
    export_k2(manifest, back)
    assert hashes(back) == hashes(source)
