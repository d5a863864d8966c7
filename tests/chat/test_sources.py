"""`chat/sources.py`: catches a file that is misread, and a broken line that ends the reading."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pytest
import zstandard
from pyarrow import parquet

from k2train.chat.conversation import conversation_of
from k2train.chat.sources import Item, SourceReader, list_sources
from k2train.chat.stdlib_conversations import MAX_CHARACTERS, docstring_conversations, summary
from k2train.errors import DataError
from k2train.files import sha256_file

RECORDS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"q{n} ü"}, {"role": "assistant", "content": "r"}]}
    for n in range(5)
]


def _read(path: Path) -> list[Item]:
    (source,) = list_sources([str(path)])
    reader = SourceReader(source)
    items = list(reader)
    assert reader.sha256 == sha256_file(path)
    return items


def _lines() -> bytes:
    return "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


@pytest.mark.parametrize("suffix", ("jsonl", "jsonl.gz", "jsonl.zst", "parquet"))
def test_each_kind_of_file_is_read(suffix: str, tmp_path: Path) -> None:
    """Catches a compression that is not undone, a nested column lost, and a folder's name taken
    for the library.
    """
    path = tmp_path / "stdlib" / f"chat.{suffix}"
    path.parent.mkdir()
    if suffix == "parquet":
        parquet.write_table(arrow.Table.from_pylist(RECORDS), path)
    else:
        pack = {"jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}.get(suffix, bytes)
        path.write_bytes(pack(_lines()))
    items = _read(path)
    assert [item.line for item in items] == [1, 2, 3, 4, 5]
    found = [conversation_of(item.record) for item in items]
    assert found == [conversation_of(record) for record in RECORDS]


def test_parquet_of_pairs(tmp_path: Path) -> None:
    """Catches columns that only some rows fill."""
    path = tmp_path / "flan.parquet"
    rows = [{"inputs": "q", "targets": "r", "task": "t"}, {"inputs": "q", "targets": None}]
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    first, second = _read(path)
    assert conversation_of(first.record).messages[1].content == "r"
    with pytest.raises(DataError, match="targets has no text"):
        conversation_of(second.record)
    parquet.write_table(arrow.table({"text": ["a"]}), path)
    with pytest.raises(DataError, match="it has text"):
        _read(path)


def test_a_broken_line_is_named_and_passed_over(tmp_path: Path) -> None:
    """Catches one bad line that ends the reading, or shifts the numbers behind it."""
    path = tmp_path / "chat.jsonl"
    good = json.dumps(RECORDS[0]).encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\n{bad\n\n\xff\n" + b"[" * 10**5 + b"\n" + good)
    items = _read(path)
    assert [(item.line, bool(item.problem)) for item in items] == [
        (1, False),
        (2, True),
        (4, True),
        (5, True),
        (6, False),
    ]
    assert items[1].problem.startswith("not JSON") and items[2].problem.startswith("not UTF-8")


def test_a_file_that_was_cut_off_is_an_error(tmp_path: Path) -> None:
    """Catches a download that ended early and passes for a small data set."""
    path = tmp_path / "chat.jsonl.gz"
    path.write_bytes(gzip.compress(_lines())[:-9])
    with pytest.raises(DataError, match="cut off"):
        _read(path)


def test_a_parquet_file_that_was_cut_off_is_an_error(tmp_path: Path) -> None:
    """Catches the traceback of a file whose footer, or one of whose pages, is not there."""
    path = tmp_path / "chat.parquet"
    parquet.write_table(arrow.Table.from_pylist(RECORDS), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not a complete Parquet file"):
        _read(path)
    path.write_bytes(whole[:4] + bytes(60) + whole[64:])
    with pytest.raises(DataError, match="not a complete Parquet file"):
        _read(path)


def test_inputs_that_are_none(tmp_path: Path) -> None:
    """Catches a pattern that matches nothing and passes for no data."""
    for given in (tmp_path / "none.jsonl", tmp_path / "*.jsonl"):
        with pytest.raises(DataError, match="matches no file"):
            list_sources([str(given)])
    with pytest.raises(DataError, match="is no file"):
        list_sources([str(tmp_path)])


def test_conversations_about_the_library() -> None:
    """Catches a question without its name, an answer that is cut, and one that differs by run."""
    code = b'''"""A module of things that people want to have."""

class Thing:
    """Keep a thing and show it.  It is
    shown at once, as often as anybody asks for it.

    More about it.
    """

    def _hidden(self):
        """Nobody asks for what is hidden in here. """ + "." * 80
'''
    found = list(docstring_conversations("a/b.py", code))
    assert found == list(docstring_conversations("a/b.py", code)) and len(found) == 1
    (line, record) = found[0]
    messages = conversation_of(record).messages
    assert line == 4 and "a.b.Thing" in messages[1].content
    assert messages[2].content == (
        "Keep a thing and show it. It is shown at once, as often as anybody asks for it."
    )
    assert list(docstring_conversations("a.py", b"def f(:")) == []


@pytest.mark.parametrize(
    ("docstring", "expected"),
    (
        ("Short.", ""),
        ("No end of a sentence in here", ""),
        ("One sentence of many words.", "One sentence of many words."),
        (f"The first of two. {'x' * MAX_CHARACTERS} Then.", ""),
        (f"The first one of two. {'X' * MAX_CHARACTERS}.", "The first one of two."),
    ),
)
def test_summaries_are_whole_sentences(docstring: str, expected: str) -> None:
    """Catches an answer that stops in the middle."""
    assert summary(docstring) == expected
