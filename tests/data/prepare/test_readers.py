"""Document readers: listing and grouping sources, and reading good and broken files."""

import bz2
import errno
import gzip
import hashlib
import io
import json
import lzma
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from k2train import retry
from k2train.data.prepare import source
from k2train.data.prepare.recipe import Recipe, SubsetRecipe
from k2train.data.prepare.source import POSITIONS, Contents, Source, first_position, split_position
from k2train.data.prepare.sources import parquet_rows, stdlib
from k2train.data.prepare.sources.listing import encode_tasks, list_sources
from k2train.data.prepare.sources.readers import Document, Rejection, read_documents
from k2train.data.prepare.sources.stdlib import docstrings, stdlib_sources
from k2train.errors import DataError, UnavailableError


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def recipe_of(subsets: dict[str, Any], **changes: Any) -> Recipe:
    content = {
        "name": "small",
        "output": "out",
        "seed": 5,
        "sequence_length": 16,
        "chunks": 1,
        "tokenizer": {"model": "t.model"},
        "subsets": subsets,
    }
    return Recipe.model_validate(content | changes)


def write_files(*names: str, content: bytes = b"{}\n") -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)


def read(
    path: str, content: bytes | None = None, **subset: Any
) -> tuple[list[Document], list[Rejection]]:
    """Read documents and rejections of a file; checks its hash."""
    if content is not None:
        write_files(path, content=content)
    kind = {".parquet": "parquet", ".txt": "text"}.get(Path(path).suffix, "jsonl")
    given = SubsetRecipe.model_validate({"kind": kind, "paths": [path], **subset})
    reading = read_documents(given, Source("web", path, os.path.abspath(path)))
    found = list(reading)
    content = Path(path).read_bytes()
    assert reading.facts == {
        "key": f"web/{path}",
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "mtime_ns": os.stat(path).st_mtime_ns,
    }

    kept = [item for item in found if isinstance(item, Document)]
    assert [item.ordinal for item in kept] == list(range(len(kept)))
    return kept, [item for item in found if isinstance(item, Rejection)]


# Listing


def test_names_of_files_follow_the_pattern(tmp_path: Path) -> None:
    """Catches names that depend on the corpus's path, files of no subset, and the order of the
    disk.
    """
    write_files(
        "corpus/web/b.jsonl",
        "corpus/web/a/2.jsonl",
        "corpus/web/a.jsonl",
        "corpus/web/.hidden.jsonl",
        "x.jsonl",
    )

    write_files("books/b/1", "books/a", "books/.git/x", content=b"text")
    subsets = {
        "web": {"kind": "jsonl", "paths": ["corpus/web/**/*.jsonl", "corpus/web/*.jsonl"]},
        "one": {"kind": "jsonl", "paths": [str(tmp_path / "x.jsonl")], "origin": "one"},
        "books": {"kind": "text", "paths": ["books"], "origin": "library"},
    }
    found = list_sources(recipe_of(subsets))
    assert [item.key for item in found["web"]] == ["web/a.jsonl", "web/a/2.jsonl", "web/b.jsonl"]
    assert [item.key for item in found["one"]] == ["one/x.jsonl"]
    assert [item.key for item in found["books"]] == ["library/a", "library/b/1"]
    assert found["web"][0] == Source("web", "a.jsonl", str(tmp_path / "corpus/web/a.jsonl"), 3)


@pytest.mark.parametrize(
    ("subsets", "words"),
    [
        ({"a": {"paths": ["no/*.jsonl"]}}, r"subsets.a.paths: no/\*.jsonl matches no file"),
        (
            {"a": {"paths": ["web/"]}},
            r"subsets.a.paths: web/ is a folder; name its files, as web/\*.jsonl or "
            r"web/\*\*/\*.jsonl.zst$",
        ),
        (
            {"a": {"paths": ["web/gone.jsonl"]}},
            r"subsets.a.paths: web/gone.jsonl is missing, or cannot be read",
        ),
        (
            {"a": {"paths": ["web/*.jsonl"]}, "b": {"paths": ["web/x.jsonl"], "origin": "other"}},
            r"subsets.b.paths: .*web/x.jsonl is other/x.jsonl here and web/x.jsonl in subsets.a: "
            r"one file must have one",
        ),
        (
            {"a": {"paths": ["web/x.jsonl"]}, "b": {"paths": ["copy/web/x.jsonl"]}},
            r"subsets.b.paths: .*copy/web/x.jsonl and .*web/x.jsonl \(subsets.a\) are both "
            r"web/x.jsonl: two files",
        ),
    ],
)
def test_files_that_cannot_be_named(subsets: dict[str, Any], words: str) -> None:
    """Catches a corpus that silently lacks files, and a document on both sides of a split."""
    write_files("web/x.jsonl", "copy/web/x.jsonl")
    Path("web/gone.jsonl").symlink_to("nowhere")
    if "gone" not in words:
        Path("web/gone.jsonl").unlink()
    recipe = recipe_of({name: {"kind": "jsonl", **subset} for name, subset in subsets.items()})
    with pytest.raises(DataError, match=words):
        list_sources(recipe)


def test_all_wrong_paths_are_reported_at_once() -> None:
    """Catches a recipe fixed one path at a time, and a line that does not name its subset."""
    write_files("web/x.jsonl")
    subsets = {
        "good": {"paths": ["web/*.jsonl"]},
        "two": {"paths": ["no/*.jsonl", "web/x.jsonl", "web"]},
        "far": {"paths": ["s3://bucket/web/*.jsonl.zst"]},
        "rows": {"kind": "parquet", "paths": ["web"]},
    }
    recipe = recipe_of({name: {"kind": "jsonl", **subset} for name, subset in subsets.items()})
    with pytest.raises(DataError) as caught:
        list_sources(recipe)
    assert str(caught.value).splitlines() == [
        f"subsets.two.paths: no/*.jsonl matches no file, seen from {Path.cwd()}",
        "subsets.two.paths: web is a folder; name its files, as web/*.jsonl or web/**/*.jsonl.zst",
        "subsets.far.paths: s3://bucket/web/*.jsonl.zst is an address; only local paths are read: "
        "copy the files, or mount them",
        "subsets.rows.paths: web is a folder; name its files, as web/*.parquet or web/**/*.parquet",
    ]


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        ("corpus/web", ["web/a", "web/b/c.txt"]),
        ("corpus/web/", ["web/a", "web/b/c.txt"]),
        ("corpus/web/b/c.txt", ["b/c.txt"]),
        ("corpus/web/a", ["a/a"]),
        ("corpus/v1.0/", ["v1.0/x"]),
        ("corpus/*/a", ["corpus/web/a"]),
    ],
)
def test_a_bare_path_names_its_folder(path: str, keys: list[str]) -> None:
    """Catches sibling folders that all get the name of their parent, and a file without a name."""
    write_files("corpus/web/a", "corpus/web/b/c.txt", "corpus/v1.0/x", content=b"text")
    found = list_sources(recipe_of({"it": {"kind": "text", "paths": [path]}}))["it"]
    assert [source.key for source in found] == keys


def test_standard_library_without_tests_and_packages(tmp_path: Path) -> None:
    """Catches installed packages, tests, links and generated files, and the order of the disk."""
    kept = ["a.py", "json/decoder.py", "Z.py"]
    dropped = [
        "site-packages/x.py",
        "test/t.py",
        "idlelib/idle_test/t.py",
        "__pycache__/c.py",
        "pydoc_data/topics.py",
    ]

    write_files(*kept, *dropped, "_sysconfigdata_x.py", "note.txt", content=b"x = 1\n")
    (tmp_path / "link.py").symlink_to(tmp_path / "a.py")
    found = stdlib_sources(tmp_path)
    assert [item.name for item in found] == sorted(kept)
    assert found[0] == Source("stdlib", "Z.py", str(tmp_path / "Z.py"), 6)


def test_position_is_decided_by_the_name() -> None:
    """Catches a split that moves: stage 2 prepared later must still avoid the text of stage 1."""
    position = split_position(Source("stdlib", "json/decoder.py", "here").key)
    assert position / POSITIONS == pytest.approx(0.5783079497436994, abs=1e-12)
    assert split_position("web/a.jsonl\00017") == 36732437623685
    assert split_position("web/a.jsonl\00018") != 36732437623685


@given(st.floats(0, 1), st.integers(0, POSITIONS - 1))
def test_split_boundaries_are_exact(part: float, position: int) -> None:
    """Catches a position on both sides of a boundary, or on neither."""
    assert (position >= first_position(part)) == (position >= part * POSITIONS)
    assert (first_position(0.0), first_position(1.0)) == (0, POSITIONS)


# Tasks


def test_tasks_hold_every_source_once() -> None:
    """Catches sources lost or doubled, subsets that read the same files separately, and empty
    tasks.
    """
    for i in range(40):
        write_files(f"web/{i:02d}.jsonl", content=b"x" * (i * 1000))
    write_files("wiki/a.jsonl")
    web = {"kind": "jsonl", "paths": ["web/*.jsonl"]}
    subsets = {
        "low": {**web, "documents": [0, 0.5]},
        "wiki": {"kind": "jsonl", "paths": ["wiki/a.jsonl"]},
        "high": {**web, "documents": [0.5, 1], "repeat": 2},
        "titles": {**web, "text_key": "title"},
    }

    recipe = recipe_of(subsets, executor={"task_bytes": 100_000, "workers": 3})
    sources = list_sources(recipe)

    tasks = encode_tasks(recipe, sources)
    read_by: dict[tuple[str, ...], list[Source]] = {}
    for task in tasks:
        read_by.setdefault(task.subsets, []).extend(task.sources)
        size_bytes = sum(item.size_bytes for item in task.sources)
        assert task.sources
        assert size_bytes <= 100_000 or len(task.sources) == 1

    assert read_by == {
        ("low", "high"): sources["low"],
        ("wiki",): sources["wiki"],
        ("titles",): sources["low"],
    }
    assert len(tasks) > 10
    assert tasks == encode_tasks(recipe_of(subsets, executor={"task_bytes": 100_000}), sources)


def test_a_small_corpus_still_gives_many_tasks() -> None:
    """Catches a small corpus that keeps one worker busy, or that gives tiny tasks."""
    sources = {"web": [Source("web", f"{i:04d}", "p", 100_000) for i in range(200)]}
    recipe = recipe_of({"web": {"kind": "jsonl", "paths": ["x"]}})
    assert 30 <= len(encode_tasks(recipe, sources)) <= 40
    crumbs = {"web": [Source("web", f"{i:04d}", "p", 1000) for i in range(200)]}
    assert len(encode_tasks(recipe, crumbs)) == 1


# Lines

LINES = [
    {"text": "one </s>", "id": "a"},
    {"text": "zwei \u00e4\u2028\r\n", "id": 2},
    {"text": "\u0000three", "id": "c", "more": [1]},
]
JSONL = b"".join(json.dumps(line).encode() + b"\n" for line in LINES)
PACKED = {
    "x.jsonl": lambda content: content,
    "x.jsonl.gz": lambda content: gzip.compress(content),
    "x.jsonl.zst": lambda content: zstandard.ZstdCompressor().compress(content),
    "x.jsonl.bz2": lambda content: bz2.compress(content),
    "x.JSONL.XZ": lambda content: lzma.compress(content),
}
COMPRESSED = [path for path in PACKED if path != "x.jsonl"]


@pytest.mark.parametrize("path", PACKED)
def test_lines_of_every_packing(path: str) -> None:
    """Catches changed text, a last line without an end, and names or hashes of the decompressed
    file.
    """
    for content in (JSONL, JSONL[:-1], JSONL.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + JSONL):
        found, rejected = read(path, PACKED[path](content))
        assert [(item.name, item.text) for item in found] == [
            (str(i + 1), line["text"]) for i, line in enumerate(LINES)
        ]
        assert rejected == []
    found, _ = read(path, id_key="id")
    assert [item.name for item in found] == ["a", "2", "c"]
    assert read(path, PACKED[path](b"")) == ([], [])


@pytest.mark.parametrize("path", COMPRESSED)
def test_files_packed_in_parts(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a second part that is left out, and a byte lost between parts or blocks."""
    both = (
        PACKED[path](JSONL[:40])
        + PACKED[path](JSONL[40:])
        + (b"\0" * 8 if path.lower().endswith(("gz", "xz")) else b"")
    )
    for block_bytes in (1, 7, 2**18):
        monkeypatch.setattr(source, "BLOCK_BYTES", block_bytes)
        found, rejected = read(path, both)
        assert [item.text for item in found] == [line["text"] for line in LINES]
        assert rejected == []


@pytest.mark.parametrize("path", COMPRESSED)
def test_packed_files_that_are_broken(path: str) -> None:
    """Catches a truncated download taken for a shorter corpus, or for broken lines."""
    packed = PACKED[path](JSONL * 50)
    for content in (
        packed[:-1],
        packed[: len(packed) // 2],
        packed[:3],
        b"no such thing",
        b"",
        packed + packed[:9],
    ):
        with pytest.raises(DataError, match=rf"{path}: (not a complete|cut off)"):
            read(path, content)


@pytest.mark.parametrize("path", COMPRESSED)
def test_the_bytes_decide_and_not_the_name(path: str) -> None:
    """Catches a compressed file that is read as text because of what it is called."""
    for name in ("plain.jsonl", "x.zstd.jsonl", "noise"):
        found, rejected = read(name, PACKED[path](JSONL), kind="jsonl")
        assert [item.text for item in found] == [line["text"] for line in LINES]
        assert rejected == []
    text = "Zwei ä\n\nlines"
    assert read("book.txt", PACKED[path](text.encode())) == ([Document("book.txt", text, 0)], [])


@given(
    st.lists(st.sampled_from([b"a", b"bc", b"\n", b"\r", b"\n\n"]), max_size=30), st.integers(1, 9)
)
@settings(deadline=None)
def test_lines_whatever_the_blocks(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], size: int
) -> None:
    """Catches a line cut at the end of a block of the file."""
    content = b"".join(parts)
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "BLOCK_BYTES", size)
        found = list(Contents(Source("o", "lines.jsonl", str(path))).lines())
    wanted = content.split(b"\n")
    assert found == (wanted[:-1] if wanted[-1] == b"" else wanted)


BAD_LINES = {
    b"{": "not JSON",
    b"[1]": "not an object, but list",
    b"7": "not an object, but int",
    b'{"id": 1}': "'text' is missing",
    b'{"id": 1, "text": null}': "'text' is missing",
    b'{"id": 1, "text": 3}': "'text' is no text, but int",
    b'{"id": "", "text": "x"}': "'id' is empty",
    b'{"id": 1, "text": "\\ud800"}': "'text' has a lone surrogate",
    b'{"id": 1, "text": "\xff"}': "not UTF-8",
    b'{"id": 1, "text": "\xed\xa0\x80"}': "not UTF-8",
    b'{"text": "x"}': "'id' is missing",
    b'{"id": true, "text": "x"}': "'id' is no text, but bool",
    b'{"id": [1], "text": "x"}': "'id' is no text, but list",
    b'{"id": "\\udc80", "text": "x"}': "'id' has a lone surrogate",
    b'{"id": 1, "text": "x", "n": ' + b"9" * 5000 + b"}": "not JSON",
    b"[" * 200_000: "not JSON",
}


def test_broken_lines_are_reported_and_the_rest_is_read() -> None:
    """Catches a broken line that stops the corpus, is read as text, or gets the wrong number."""
    good = b'{"id": 1, "text": "good"}\n'
    found, rejected = read(
        "x.jsonl", good + b"".join(line + b"\n" + good for line in BAD_LINES), id_key="id"
    )
    assert [item.text for item in found] == ["good"] * (len(BAD_LINES) + 1)
    assert [item.line for item in rejected] == [2 * (i + 1) for i in range(len(BAD_LINES))]
    for item, reason in zip(rejected, BAD_LINES.values(), strict=True):
        assert item.reason.startswith(reason)
        assert len(item.reason) < 200


@pytest.mark.parametrize("path", PACKED)
def test_blank_lines_are_passed_over(path: str) -> None:
    """Catches a blank line reported as broken, shifted line numbers, and one read as a document."""
    good = b'{"text": "good"}'
    lines = [b"", good, b"  \t", b"\r", good, b"{", b"", b""]
    for content in (b"\n".join(lines), b"\xef\xbb\xbf" + b"\n".join(lines), b"\r\n".join(lines)):
        found, rejected = read(path, PACKED[path](content))
        assert [item.name for item in found] == ["2", "5"]
        assert [item.line for item in rejected] == [6]


# Parquet


def write_parquet(path: str, **columns: Any) -> None:
    parquet.write_table(arrow.table(columns), path, row_group_size=3)


@pytest.mark.parametrize(
    "kind", [arrow.string(), arrow.large_string(), arrow.dictionary(arrow.int32(), arrow.string())]
)
def test_rows_of_parquet(kind: Any) -> None:
    """Catches rows lost between row groups, a neighbour's column, and unread kinds of text."""
    texts = [f"text {i} ä</s>" for i in range(8)]
    write_parquet(
        "x.parquet",
        other=list(range(8)),
        text=arrow.array(texts).cast(kind),
        id=list(range(10, 18)),
    )

    found, rejected = read("x.parquet")
    assert [(item.name, item.text) for item in found] == [
        (str(i + 1), text) for i, text in enumerate(texts)
    ]
    assert rejected == []
    assert [item.name for item in read("x.parquet", id_key="id")[0]] == [
        str(i) for i in range(10, 18)
    ]


def test_broken_rows_and_files_of_parquet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches one bad cell that costs the whole batch, and a broken file taken for broken rows."""
    cells = arrow.array([b"good", b"\xff\xfe", None, b"", b"fine"], arrow.binary())
    strings = arrow.Array.from_buffers(arrow.string(), 5, cells.buffers())
    write_parquet("x.parquet", text=strings, number=[1, 2, 3, 4, None])
    found, rejected = read("x.parquet")
    assert [(item.name, item.text) for item in found] == [("1", "good"), ("5", "fine")]
    assert [item.line for item in rejected] == [2, 3]
    assert [item.reason.split("(")[0].strip() for item in rejected] == [
        "not UTF-8",
        "'text' is missing",
    ]
    assert [item.reason for item in read("x.parquet", id_key="number")[1]][
        -1
    ] == "'number' is missing"
    assert {item.reason for item in read("x.parquet", text_key="number")[1]} == {
        "'number' is no text, but int",
        "'number' is missing",
    }
    with pytest.raises(DataError, match=r"x.parquet: has no column 'body' .*it has text, number"):
        read("x.parquet", text_key="body")
    content = Path("x.parquet").read_bytes()
    for broken in (content[:-3], b"", content[:40] + b"\xff" * 40 + content[80:]):
        with pytest.raises(DataError, match=r"x.parquet: not a complete Parquet file"):
            read("x.parquet", broken)


def test_a_server_that_is_away_damages_no_parquet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a hiccup of the file system that is called damage (2) and told to be fetched again.

    The bytes come as few at a time as a read may give.
    """
    text = ["word " * 50 + str(number) for number in range(3000)]
    parquet.write_table(arrow.table({"text": text}), "x.parquet", row_group_size=700)
    content, preadv, failing = Path("x.parquet").read_bytes(), os.preadv, [errno.EIO, errno.ESTALE]

    def struck(descriptor: int, buffers: Any, at: int) -> int:
        if 1000 < at < 5000 and failing:
            raise OSError(failing[0], os.strerror(failing.pop(0)))
        return preadv(descriptor, [memoryview(buffers[0])[:777]], at)

    monkeypatch.setattr(os, "preadv", struck)
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.01)
    documents, rejected = read("x.parquet", content)
    assert [document.text for document in documents] == text and not rejected and not failing

    failing += [errno.ESTALE] * 10**6
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 0.05)
    with pytest.raises(UnavailableError, match=r"x\.parquet: .*start the same command again"):
        read("x.parquet", content)


def test_batches_of_parquet_follow_its_rows() -> None:
    """Catches a batch of a thousand books in memory at once."""

    class Metadata:
        num_rows, num_row_groups, size = 1000, 2, 0

        def row_group(self, number: int) -> Any:
            return type("RowGroup", (), {"total_byte_size": self.size // 2})

    for size, rows in ((1000 * 2**20, 4), (1000, 1024), (2**40, 1), (0, 1024)):
        Metadata.size = size
        assert parquet_rows._batch_rows(Metadata()) == rows


NESTED = [
    {"text": "plain", "meta": {"id": "a", "set": "A"}, "dotted.key": "one"},
    {"text": {"text": "inside"}, "meta": {"id": "b", "set": "B"}},
    {"text": {"other": 1}, "meta": {"id": "c"}},
    {"meta": {"id": "d"}},
    {"text": "last", "meta": None},
]


def test_nested_keys_of_json_lines() -> None:
    """Catches text in an object that is called broken, and a field with a dot in its own name."""
    content = "".join(json.dumps(line) + "\n" for line in NESTED).encode()
    keys = {"text_key": ["text", "text.text"], "id_key": "meta.id"}
    found, rejected = read("x.jsonl", content, **keys)
    assert [(item.name, item.text) for item in found] == [("a", "plain"), ("b", "inside")]
    assert [(item.line, item.reason) for item in rejected] == [
        (3, "'text' or 'text.text' is no text, but dict"),
        (4, "'text' or 'text.text' is missing"),
        (5, "'meta.id' is missing"),
    ]
    assert [item.text for item in read("x.jsonl", text_key="dotted.key")[0]] == ["one"]
    subset = SubsetRecipe(kind="jsonl", paths=("x.jsonl",))
    source = Source("web", "x.jsonl", os.path.abspath("x.jsonl"))
    fields = [
        item.fields
        for item in read_documents(subset, source, ["meta.set", "meta", "no"])
        if isinstance(item, Document)
    ]
    assert fields == [("A", NESTED[0]["meta"], None), (None, None, None)]


def test_nested_columns_of_parquet() -> None:
    """Catches struct columns that cannot be read, and a null struct that shifts its neighbours."""
    meta = [{"id": "a", "body": {"en": "one"}}, None, {"id": "c", "body": None}]
    meta.append({"id": "d", "body": {"en": "four"}})
    write_parquet("x.parquet", meta=meta, title=["t1", "t2", None, "t4"], **{"a.b": list("wxyz")})
    found, rejected = read("x.parquet", text_key="meta.body.en", id_key="meta.id")
    assert [(item.name, item.text) for item in found] == [("a", "one"), ("d", "four")]
    assert [item.line for item in rejected] == [2, 3]
    found, rejected = read("x.parquet", text_key=["meta.body.en", "title"])
    assert [item.text for item in found] == ["one", "t2", "four"]
    assert [item.text for item in read("x.parquet", text_key="a.b")[0]] == list("wxyz")
    with pytest.raises(DataError, match=r"has no column 'meta.body.de' .*it has meta, title, a.b"):
        read("x.parquet", text_key="meta.body.de")
    subset = SubsetRecipe(kind="parquet", paths=("x.parquet",), text_key=("a.b",))
    source = Source("web", "x.parquet", os.path.abspath("x.parquet"))
    assert [item.fields for item in read_documents(subset, source, ["meta.id", "title"])] == [
        ("a", "t1"),
        (None, "t2"),
        ("c", None),
        ("d", "t4"),
    ]


@pytest.mark.parametrize("key", ["l.item", "l.element", "m.body.x", "m.key_value.x", "s.l.x", "l."])
def test_no_key_of_parquet_goes_through_a_list(key: str) -> None:
    """Catches a key that is looked for inside a list or a map for ever."""
    kind = arrow.struct({"l": arrow.list_(arrow.struct({"x": arrow.string()}))})
    columns = {
        "l": arrow.array([["a"], []], arrow.list_(arrow.string())),
        "m": arrow.array([[("k", {"x": "a"})], []], arrow.map_("str", arrow.struct({"x": "str"}))),
        "s": arrow.array([{"l": [{"x": "a"}]}, None], kind),
        "text": arrow.array(["one", "two"]),
    }
    parquet.write_table(arrow.table(columns), "x.parquet")
    for keys in ({"text_key": key}, {"id_key": key}):
        with pytest.raises(DataError, match=rf"has no column '{key}' .*it has l, m, s, text"):
            read("x.parquet", **keys)
    subset = SubsetRecipe(kind="parquet", paths=("x.parquet",), where={key: "a"})
    with pytest.raises(DataError, match="has no column"):
        list(read_documents(subset, Source("web", "x", os.path.abspath("x.parquet")), [key]))


def test_a_column_whose_name_is_the_beginning_of_a_key() -> None:
    """Catches a column `a.b` taken for the struct that holds `a.b.c`."""
    write_parquet("x.parquet", **{"a.b": list("wx"), "a": [{"b": {"c": "1"}}, {"b": {"c": "2"}}]})
    assert [item.text for item in read("x.parquet", text_key="a.b.c")[0]] == ["1", "2"]


def test_the_first_text_that_is_not_blank_counts() -> None:
    """Catches documents lost because an export leaves the field that it does not use empty."""
    lines = [
        {"text": "", "content": "one"},
        {"text": " \n", "content": "two"},
        {"text": "three", "content": "other"},
        {"text": "", "content": None},
        {"text": "", "content": 5},
    ]
    keys = ["text", "content"]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    found, rejected = read("x.jsonl", content, text_key=keys)
    assert [item.text for item in found] == ["one", "two", "three"] and rejected == []
    columns = {key: [line[key] for line in lines[:4]] for key in keys}
    write_parquet("x.parquet", **columns)
    assert [item.text for item in read("x.parquet", text_key=keys)[0]] == ["one", "two", "three"]


def test_a_flipped_byte_of_parquet_is_found() -> None:
    """Catches damaged text that is trained on, though the file has a checksum of each page."""
    table = arrow.table({"text": [f"a text of its own, number {i}" for i in range(200)]})
    options = {"use_dictionary": False, "compression": "none", "write_page_checksum": True}
    parquet.write_table(table, "x.parquet", **options)
    content = bytearray(Path("x.parquet").read_bytes())
    content[content.index(b"number 77") + 7] ^= 1
    with pytest.raises(DataError, match=r"x.parquet: not a complete Parquet file .*CRC"):
        read("x.parquet", bytes(content))


# Text and the library


def test_a_text_file_is_one_document() -> None:
    """Catches changed line ends or byte order marks, and bad text that is replaced."""
    found, _ = read("a/x.txt", "\ufeffä\r\nb\r".encode())
    assert found == [Document("a/x.txt", "\ufeffä\r\nb\r", 0)]
    assert read("x.txt", b"a\xff")[1] == [
        Rejection(None, "not UTF-8 (invalid start byte at byte 1)")
    ]
    assert read("x.txt", b" \n") == ([], [])


def library_items(kind: str, content: bytes) -> list[Any]:
    write_files("m.py", content=content)
    return list(read_documents(SubsetRecipe(kind=kind), Source("stdlib", "m.py", "m.py")))  # type: ignore[arg-type]


def test_docstrings_are_named_by_what_they_document() -> None:
    """Catches docstrings lost in classes or redefinitions, short ones kept, and equal names."""
    long = "word " * 20
    code = f'"""{long}m"""\nclass A:\n    """short"""\n    def f(self):\n        """{long}f"""\n'
    code += (
        f'    def f(self, x):\n        """{long}again"""\n'
        f'if 1:\n    async def g():\n        """{long}g"""\n'
    )
    found = {title: text for _, title, text in docstrings("m.py", code)}
    assert found == {
        "m.py:": f"{long}m",
        "m.py:A.f": f"{long}f",
        "m.py:A.f#2": f"{long}again",
        "m.py:g": f"{long}g",
    }
    items = library_items("stdlib_docstrings", code.encode())
    assert {item.name: item.text for item in items} == found


def test_code_that_cannot_be_read() -> None:
    """Catches a broken library file that stops the corpus, and an empty one counted as broken."""
    assert library_items("stdlib_code", b"x = 1\n") == [Document("m.py", "x = 1\n", 0)]
    assert library_items("stdlib_code", b" \n") == []
    assert library_items("stdlib_code", b"# coding: latin-1\nx = '\xe4'\n")[0].text.endswith(
        "'ä'\n"
    )
    for content in (b"x = '\xff'\n", b"# coding: nonsense\n"):
        (item,) = library_items("stdlib_code", content)
        assert item.reason.startswith("not in the encoding that it declares")

    (item,) = library_items("stdlib_docstrings", b"x = 1\ndef (\n")
    assert (item.line, item.reason[:15]) == (2, "does not parse ")
    surrogate = b'"""' + b"word " * 20 + b'\\ud800"""\n'
    assert (
        library_items("stdlib_docstrings", surrogate)[0].reason
        == "'text' has a lone surrogate, which is no character"
    )


def test_pages_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches reference pages that are looked for on the disk."""
    monkeypatch.setattr(stdlib, "topics", {"b": "page b", "a": "page a"})
    recipe = recipe_of({"prose": {"kind": "stdlib_topics"}})
    found = list_sources(recipe)["prose"]
    assert found == [Source("topics", "a", "", 6), Source("topics", "b", "", 6)]
    assert list(read_documents(recipe.subsets["prose"], found[1])) == [Document("b", "page b", 0)]


# Files under way


def test_a_file_that_is_gone_or_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a corpus made of two states of a file, and a traceback for a deleted file."""
    write_files("x.jsonl", content=JSONL)
    reading = Contents(Source("web", "x.jsonl", "x.jsonl"))
    blocks: Iterator[bytes] = reading.blocks()
    next(blocks)
    with open("x.jsonl", "ab") as stream:
        stream.write(b"more")
    with pytest.raises(DataError, match=r"x.jsonl: changed while it was read"):
        list(blocks)
    with pytest.raises(AssertionError, match="not read to its end"):
        _ = reading.facts

    with pytest.raises(DataError, match=r"gone.jsonl: cannot be read \(No such file"):
        list(
            read_documents(
                SubsetRecipe(kind="jsonl", paths=("x",)), Source("web", "gone.jsonl", "gone.jsonl")
            )
        )


def test_reading_holds_one_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a reader that reads the whole file before it yields the first document."""
    write_files("x.jsonl", content=b'{"text": "word"}\n' * 100_000)
    taken = io.StringIO()
    blocks = Contents.blocks

    def counted(self: Contents) -> Iterator[bytes]:
        for block in blocks(self):
            taken.write("x")
            yield block

    monkeypatch.setattr(Contents, "blocks", counted)
    next(
        iter(
            read_documents(
                SubsetRecipe(kind="jsonl", paths=("x",)), Source("web", "x.jsonl", "x.jsonl")
            )
        )
    )

    assert len(taken.getvalue()) == 1
