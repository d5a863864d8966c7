"""Document readers: stream the documents of a source.

- A source is read once from front to back. Its bytes are hashed while documents are read. Memory
  holds one document and one block of the file, whatever the file's size.
- Parquet cannot be read from front to back, so it is hashed by a separate read.
- A broken item inside a file becomes a `Rejection`, and reading continues. A file that is broken
  itself, truncated, or not of its named type raises DataError: nobody knows what it should contain.
- An id that occurs twice in a file is kept; the ordinal breaks the tie. Finding all of them would
  take a table of ids (`sorted_runs` counts those that meet).
- A blank line is neither a document nor a rejection, since files end in them. A document without
  text is not broken, either: it is counted and left out.
"""

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from k2train.data.prepare.field_keys import field_value, named, text_value
from k2train.data.prepare.recipe import SubsetRecipe
from k2train.data.prepare.source import Contents, Source
from k2train.data.prepare.sources.parquet_rows import parquet_rows
from k2train.data.prepare.sources.stdlib import decode, docstrings, topic_page
from k2train.data.tokenizer import is_encodable

MIN_USELESS = 10
"""Broken documents that say of a file without any good one that the recipe is wrong."""


class Document(NamedTuple):
    """A text to train on.

    `name` identifies it within its source; `ordinal` is its number there, from 0. `fields` are the
    values that the reader was asked for.
    """

    name: str
    text: str
    ordinal: int
    fields: tuple[Any, ...] = ()


class Rejection(NamedTuple):
    """An item that should be a document but cannot be used.

    `line` is the line of the file, or the row, from 1.
    """

    line: int | None
    reason: str


ReadItem = Document | Rejection


@dataclass
class ReadCounts:
    """What a reading met: items that are documents, broken, or without any text, and their bytes.

    Bytes are those of the line or text, decompressed. `bare` is 1 for a file that has bytes, but
    neither lines nor rows.
    """

    documents: int = 0
    document_bytes: int = 0
    rejected: int = 0
    rejected_bytes: int = 0
    empty: int = 0
    bare: int = 0

    @property
    def record(self) -> dict[str, int]:
        """The counts as in the record of an encode task; that of one file."""
        return {
            "documents_read": self.documents + self.empty,
            "read_bytes": self.document_bytes,
            "rejected": self.rejected,
            "rejected_bytes": self.rejected_bytes,
            "empty": self.empty,
            "files": int(self.documents + self.rejected + self.empty > 0),
            "broken_files": int(self.is_broken),
            "bare_files": self.bare,
        }

    @property
    def is_useless(self) -> bool:
        """Whether all documents are broken, and not just a few.

        A smaller file may be any damaged one, and counts in the share of broken files.
        """
        return self.rejected >= MIN_USELESS and self.documents == self.empty == 0

    @property
    def is_broken(self) -> bool:
        """Whether more bytes are broken than not."""
        return self.rejected > 0 and self.rejected_bytes >= self.document_bytes


class _RawDocument(NamedTuple):
    """An item as read from a file: text and name not yet validated; `size` in bytes."""

    line: int | None
    name: Any
    text: Any
    size: int
    fields: tuple[Any, ...] = ()


class _Broken(NamedTuple):
    """An item that could not even be parsed."""

    line: int | None
    reason: str
    size: int


class DocumentReader:
    """One reading of a source: iterate to the end, then `facts` and `counts` describe it.

    Each document comes with the values of `fields`, keys that may be nested.
    """

    def __init__(self, subset: SubsetRecipe, source: Source, fields: Sequence[str] = ()) -> None:
        self.subset, self.source, self.fields = subset, source, tuple(fields)
        self.counts = ReadCounts()
        # Once, not for each document: many are short.
        self.text_name, self.id_name = named(subset.text_key), repr(subset.id_key)
        self.contents = Contents(
            source, topic_page(source.name) if subset.kind == "stdlib_topics" else None
        )

    def __iter__(self) -> Iterator[ReadItem]:
        """Yield documents and rejections in the order of the file.

        Documents without text are only counted. Raises DataError for a broken file.
        """
        counts = self.counts
        for item in _READERS[self.subset.kind](self):
            reason = item.reason if isinstance(item, _Broken) else self._problem(item)
            if isinstance(item, _Broken) or reason:
                counts.rejected += 1
                counts.rejected_bytes += item.size
                yield Rejection(item.line, reason)
            elif not item.text or item.text.isspace():
                counts.empty += 1
            else:
                # Rejections are not numbered: an ordinal counts documents only.
                yield Document(str(item.name), item.text, counts.documents, item.fields)
                counts.documents += 1
                counts.document_bytes += item.size

        if self.subset.kind in ("jsonl", "parquet"):
            nothing = counts.documents + counts.rejected + counts.empty == 0
            counts.bare = int(nothing and self.facts["bytes"] > 0)

    def _problem(self, item: _RawDocument) -> str:
        """Why a document cannot be used; "" when it can."""
        if problem := text_problem(self.text_name, item.text):
            return problem
        numbered = isinstance(item.name, int) and not isinstance(item.name, bool)
        # A document without text is left out, whatever its name is.
        if numbered or not item.text.strip():
            return ""
        problem = text_problem(self.id_name, item.name)
        return problem or ("" if item.name.strip() else f"{self.id_name} is empty")

    @property
    def facts(self) -> dict[str, Any]:
        """Key, size, hash and modification time of the source that was read."""
        return self.contents.facts

    def json_lines(self) -> Iterator[_RawDocument | _Broken]:
        """Read JSON lines, one document per line."""
        for number, line in enumerate(self.contents.lines(), 1):
            if (item := self._json_line(number, line)) is not None:
                yield item

    def _json_line(self, number: int, line: bytes) -> _RawDocument | _Broken | None:
        """Parse one JSON line; None when it is blank."""
        size = len(line)
        try:
            # A byte order mark in front of the file is not part of its first line.
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            return _Broken(number, _not_utf8(error), size)
        except (ValueError, RecursionError) as error:
            # Blank lines are rare, so they are checked only after an error.
            return (
                _Broken(number, f"not JSON ({error})", size)
                if line.removeprefix(codecs.BOM_UTF8).strip()
                else None
            )

        if not isinstance(record, dict):
            return _Broken(number, f"not an object, but {type(record).__name__}", size)
        subset = self.subset
        name = number if subset.id_key is None else field_value(record, subset.id_key)
        text = text_value([field_value(record, key) for key in subset.text_key])
        fields = tuple([field_value(record, key) for key in self.fields]) if self.fields else ()
        return _RawDocument(number, name, text, size, fields)

    def parquet_rows(self) -> Iterator[_RawDocument | _Broken]:
        """Read Parquet, one document per row."""
        self.contents.hash_only()
        subset = self.subset
        rows = parquet_rows(self.source.path, subset.text_key, subset.id_key, self.fields)
        for number, row in enumerate(rows, 1):
            if isinstance(row, UnicodeDecodeError):
                yield _Broken(number, _not_utf8(row), len(row.object))
                continue
            text, name, fields = row
            size = len(text.encode("utf-8", "surrogatepass")) if isinstance(text, str) else 0
            yield _RawDocument(
                number, number if subset.id_key is None else name, text, size, fields
            )

    def whole_text(self) -> Iterator[_RawDocument | _Broken]:
        """Read the file as one document."""
        content = b"".join(self.contents.unpacked())
        try:
            yield _RawDocument(None, self.source.name, content.decode(), len(content))
        except UnicodeDecodeError as error:
            yield _Broken(None, _not_utf8(error), len(content))

    def code_text(self) -> Iterator[_RawDocument | _Broken]:
        """Read a Python file as one document, in its declared encoding."""
        code = self._code()
        # An empty file of the library only marks a package.
        if isinstance(code, _Broken) or code.text.strip():
            yield code

    def docstring_texts(self) -> Iterator[_RawDocument | _Broken]:
        """Read the docstrings of a Python file, one document each."""
        code = self._code()
        if isinstance(code, _Broken):
            yield code
            return
        try:
            for line, title, docstring in docstrings(self.source.name, code.text):
                yield _RawDocument(line, title, docstring, len(docstring))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            place = getattr(error, "lineno", None)
            yield _Broken(place, f"does not parse ({error})", code.size)

    def _code(self) -> _RawDocument | _Broken:
        content = self.contents.read_all()
        try:
            return _RawDocument(None, self.source.name, decode(content), len(content))
        except (SyntaxError, UnicodeDecodeError, LookupError) as error:
            return _Broken(None, f"not in the encoding that it declares ({error})", len(content))


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 ({error.reason} at byte {error.start})"


_READERS = {
    "jsonl": DocumentReader.json_lines,
    "parquet": DocumentReader.parquet_rows,
    "text": DocumentReader.whole_text,
    "stdlib_code": DocumentReader.code_text,
    "stdlib_docstrings": DocumentReader.docstring_texts,
    "stdlib_topics": DocumentReader.whole_text,
}


def read_documents(
    subset: SubsetRecipe, source: Source, fields: Sequence[str] = ()
) -> DocumentReader:
    """Read the documents and rejections of a source, each document with the values of `fields`.

    Only `kind`, `text_key` and `id_key` of the subset matter.
    """
    return DocumentReader(subset, source, fields)


def text_problem(key: str, value: Any) -> str:
    """Why a value is not text; "" when it is, or when it is empty."""
    if value is None:
        return f"{key} is missing"
    if not isinstance(value, str):
        return f"{key} is no text, but {type(value).__name__}"
    return "" if is_encodable(value) else f"{key} has a lone surrogate, which is no character"
