"""Document readers: stream the documents of a source.

- A source is read once from front to back. Its bytes are hashed while documents are read. Memory
  holds one document and one block of the file, whatever the file's size.
- Parquet cannot be read from front to back, so it is hashed by a separate read.
- A broken item inside a file becomes a `Rejection`, and reading continues. A file that is broken
  itself, truncated, or not of its named type raises DataError: nobody knows what it should contain.
- An id that occurs twice in a file is kept; the ordinal breaks the tie. Finding all of them would
  take a table of ids (`sorted_runs` counts those that meet).
- A blank line is neither a document nor a rejection, since files end in them.
"""

import codecs
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from k2train.data.prepare.recipe import SubsetRecipe
from k2train.data.prepare.source import Contents, Source
from k2train.data.prepare.sources.stdlib import decode, docstrings, topic_page
from k2train.data.tokenizer import is_encodable
from k2train.errors import DataError, UserError

BATCH_BYTES = 2**22
MAX_BATCH_ROWS = 1024


class Document(NamedTuple):
    """A text to train on.

    `name` identifies it within its source; `ordinal` is its number there, from 0.
    """

    name: str
    text: str
    ordinal: int


class Rejection(NamedTuple):
    """An item that should be a document but cannot be used.

    `line` is the line of the file, or the row, from 1.
    """

    line: int | None
    reason: str


ReadItem = Document | Rejection


class _RawDocument(NamedTuple):
    """An item as read from a file: text and name not yet validated."""

    line: int | None
    name: Any
    text: Any


class DocumentReader:
    """One reading of a source: iterate to the end, then `facts` describes what was read."""

    def __init__(self, subset: SubsetRecipe, source: Source) -> None:
        self.subset, self.source = subset, source
        self.contents = Contents(
            source, topic_page(source.name) if subset.kind == "stdlib_topics" else None
        )

    def __iter__(self) -> Iterator[ReadItem]:
        """Yield documents and rejections in the order of the file.

        Raises DataError for a broken file.
        """
        # Rejections are not numbered: an ordinal counts documents only.
        ordinal = 0
        for item in _READERS[self.subset.kind](self):
            if isinstance(item, Rejection):
                yield item
            elif reason := _rejection_reason(item, self.subset):
                yield Rejection(item.line, reason)
            else:
                yield Document(str(item.name), item.text, ordinal)
                ordinal += 1

    @property
    def facts(self) -> dict[str, Any]:
        """Key, size, hash and modification time of the source that was read."""
        return self.contents.facts

    def json_lines(self) -> Iterator[_RawDocument | Rejection]:
        """Read JSON lines, one document per line."""
        for number, line in enumerate(self.contents.lines(), 1):
            if (item := self._json_line(number, line)) is not None:
                yield item

    def _json_line(self, number: int, line: bytes) -> _RawDocument | Rejection | None:
        """Parse one JSON line; None when it is blank."""
        try:
            # A byte order mark in front of the file is not part of its first line.
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            return Rejection(number, f"not UTF-8 ({error.reason} at byte {error.start})")
        except (ValueError, RecursionError) as error:
            # Blank lines are rare, so they are checked only after an error.
            return (
                Rejection(number, f"not JSON ({error})")
                if line.removeprefix(codecs.BOM_UTF8).strip()
                else None
            )

        if not isinstance(record, dict):
            return Rejection(number, f"not an object, but {type(record).__name__}")
        key = self.subset.id_key
        return _RawDocument(
            number, number if key is None else record.get(key), record.get(self.subset.text_key)
        )

    def parquet_rows(self) -> Iterator[_RawDocument | Rejection]:
        """Read Parquet, one document per row."""
        try:
            import pyarrow as arrow
            from pyarrow import parquet
        except ImportError:
            raise UserError("reading Parquet needs pyarrow: pip install 'k2train[data]'") from None

        self.contents.hash_only()

        columns = [self.subset.text_key, *([self.subset.id_key] if self.subset.id_key else [])]
        number = 0
        try:
            # A small buffer streams the pages of a column instead of holding a complete row group.
            with parquet.ParquetFile(self.source.path, buffer_size=2**20, pre_buffer=False) as file:
                self._check_columns(file.schema_arrow.names, columns)
                rows = _batch_rows(file.metadata)
                for batch in file.iter_batches(batch_size=rows, columns=columns, use_threads=False):
                    values = [_cells(arrow, batch.column(name)) for name in columns]
                    for text, *ids in zip(*values, strict=True):
                        number += 1
                        try:
                            cells = [
                                cell.decode() if isinstance(cell, bytes) else cell
                                for cell in (text, *ids)
                            ]
                        except UnicodeDecodeError as error:
                            yield Rejection(
                                number, f"not UTF-8 ({error.reason} at byte {error.start})"
                            )
                        else:
                            yield _RawDocument(number, cells[1] if ids else number, cells[0])
        except (arrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(
                f"{self.source.path}: not a complete Parquet file ({reason}); fetch it again"
            ) from None

    def _check_columns(self, present: Sequence[str], wanted: Sequence[str]) -> None:
        """Raises DataError when a column of the recipe is absent."""
        for column in wanted:
            if column not in present:
                raise DataError(
                    f"{self.source.path}: has no column {column!r} "
                    f"(text_key or id_key); it has {', '.join(present)}"
                )

    def whole_text(self) -> Iterator[_RawDocument | Rejection]:
        """Read the file as one document."""
        content = self.contents.read_all()
        try:
            yield _RawDocument(None, self.source.name, content.decode())
        except UnicodeDecodeError as error:
            yield Rejection(None, f"not UTF-8 ({error.reason} at byte {error.start})")

    def code_text(self) -> Iterator[_RawDocument | Rejection]:
        """Read a Python file as one document, in its declared encoding."""
        text = self._code()
        if isinstance(text, Rejection):
            yield text
        elif text.strip():
            # An empty file of the library only marks a package.
            yield _RawDocument(None, self.source.name, text)

    def docstring_texts(self) -> Iterator[_RawDocument | Rejection]:
        """Read the docstrings of a Python file, one document each."""
        text = self._code()
        if isinstance(text, Rejection):
            yield text
            return
        try:
            for line, title, docstring in docstrings(self.source.name, text):
                yield _RawDocument(line, title, docstring)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            yield Rejection(getattr(error, "lineno", None), f"does not parse ({error})")

    def _code(self) -> str | Rejection:
        content = self.contents.read_all()
        try:
            return decode(content)
        except (SyntaxError, UnicodeDecodeError, LookupError) as error:
            return Rejection(None, f"not in the encoding that it declares ({error})")


_READERS = {
    "jsonl": DocumentReader.json_lines,
    "parquet": DocumentReader.parquet_rows,
    "text": DocumentReader.whole_text,
    "stdlib_code": DocumentReader.code_text,
    "stdlib_docstrings": DocumentReader.docstring_texts,
    "stdlib_topics": DocumentReader.whole_text,
}


def read_documents(subset: SubsetRecipe, source: Source) -> DocumentReader:
    """Read the documents and rejections of a source.

    Only `kind`, `text_key` and `id_key` of the subset matter.
    """
    return DocumentReader(subset, source)


def read_texts(subset: SubsetRecipe, source: Source) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of each document of a source."""
    for item in DocumentReader(subset, source):
        if isinstance(item, Document):
            yield item.name, item.text


def _rejection_reason(item: _RawDocument, subset: SubsetRecipe) -> str:
    """Why a document cannot be used; "" when it can."""
    if isinstance(item.text, str):
        numbered = isinstance(item.name, int) and not isinstance(item.name, bool)
        return _text_problem(subset.text_key, item.text) or (
            "" if numbered else _text_problem(str(subset.id_key), item.name)
        )
    return _text_problem(subset.text_key, item.text)


def _text_problem(key: str, value: Any) -> str:
    """Why a value is not usable text; "" when it is."""
    if value is None:
        return f"{key!r} is missing"
    if not isinstance(value, str):
        return f"{key!r} is no text, but {type(value).__name__}"
    if not value or value.isspace():
        return f"{key!r} is empty"
    return "" if is_encodable(value) else f"{key!r} has a lone surrogate, which is no character"


def _batch_rows(metadata: Any) -> int:
    """Number of rows that hold about `BATCH_BYTES`, by the sizes in the file's metadata."""
    size_bytes = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    return max(
        1, min(MAX_BATCH_ROWS, BATCH_BYTES * max(1, metadata.num_rows) // max(1, size_bytes))
    )


def _cells(arrow: Any, column: Any) -> list[Any]:
    """Values of a column; text as bytes, since Parquet does not guarantee UTF-8."""
    if isinstance(column, arrow.DictionaryArray):
        column = column.dictionary_decode()
    if arrow.types.is_string(column.type) or arrow.types.is_large_string(column.type):
        column = column.cast(arrow.large_binary())
    values: list[Any] = column.to_pylist()
    return values
