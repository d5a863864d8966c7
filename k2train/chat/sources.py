"""Records of conversations from files: JSON lines and Parquet, compressed or not, streamed.

- The readers are those of the data preparation: compression is told by the first bytes, and a file
  that was cut off is an error.
- A record that cannot be read is yielded as the reason, with its line or row. Reading goes on.
- `stdlib` in place of a file gives conversations about the standard library (see
  `stdlib_conversations`).
"""

import codecs
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from k2train.chat.conversation import KEYS
from k2train.chat.stdlib_conversations import docstring_conversations
from k2train.data.prepare.source import Contents, Source
from k2train.data.prepare.sources.file_patterns import matching_paths
from k2train.data.prepare.sources.parquet_rows import has_column, parquet_rows, whole_parquet
from k2train.data.prepare.sources.stdlib import stdlib_sources
from k2train.errors import DataError
from k2train.retry import exists_retried, is_file_retried, stat_retried

STDLIB = "stdlib"
PARQUET_MAGIC = b"PAR1"


class Item(NamedTuple):
    """A record of a file, or why it is none; `line` is its line or row, from 1."""

    line: int
    record: Any
    problem: str = ""


def list_sources(inputs: Sequence[str]) -> list[Source]:
    """Return the files of the inputs: names, patterns, or `stdlib`. Raises DataError."""
    found: dict[str, Source] = {}
    for given in inputs:
        if given == STDLIB:
            found |= {source.path: source for source in stdlib_sources()}
            continue
        paths = [Path(given)] if exists_retried(Path(given)) else matching_paths(given)
        if not paths:
            raise DataError(f"{given}: matches no file, seen from {Path.cwd()}")
        for path in paths:
            if not is_file_retried(path):
                raise DataError(f"{path}: is no file; name its files, as {path}/*.jsonl")
            facts = stat_retried(path)
            assert facts is not None, f"{path}: was there a moment ago"
            # The name that messages and the record of origins have.
            source = Source(path.parent.name or "chat", path.name, str(path), facts.st_size)
            found.setdefault(str(path.resolve()), source)
    return list(found.values())


class SourceReader:
    """One reading of a source: iterate to the end; then `sha256` is known."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._contents = Contents(source)

    def __iter__(self) -> Iterator[Item]:
        """Yield the records in order. Raises DataError for a file that is broken itself."""
        # A folder of that name holds other files.
        if self.source.origin == STDLIB and self.source.name.endswith(".py"):
            return docstring_items(self.source, self._contents)
        if self._is_parquet():
            return self._rows()
        return self._lines()

    @property
    def sha256(self) -> str:
        """Hash of the bytes that were read."""
        return str(self._contents.facts["sha256"])

    def _is_parquet(self) -> bool:
        first = next(Contents(self.source).blocks(), b"")
        return first.startswith(PARQUET_MAGIC)

    def _lines(self) -> Iterator[Item]:
        for number, line in enumerate(self._contents.lines(), 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield Item(number, json.loads(text))
            except UnicodeDecodeError as error:
                yield Item(number, None, f"not UTF-8 ({error.reason} at byte {error.start})")
            except (ValueError, RecursionError) as error:
                # A blank line is nothing: files end in them.
                if line.removeprefix(codecs.BOM_UTF8).strip():
                    yield Item(number, None, f"not JSON ({error})")

    def _rows(self) -> Iterator[Item]:
        self._contents.hash_only()
        path = self.source.path
        with whole_parquet(path) as file:
            columns = [key for key in KEYS if has_column(file.schema_arrow, key)]
            names = ", ".join(file.schema_arrow.names)
        if not columns:
            raise DataError(f"{path}: has none of the columns {', '.join(KEYS)}; it has {names}")
        for number, row in enumerate(parquet_rows(path, columns[:1], None, columns), 1):
            if isinstance(row, UnicodeDecodeError):
                yield Item(number, None, f"not UTF-8 ({row.reason} at byte {row.start})")
            else:
                yield Item(number, dict(zip(columns, row[2], strict=True)))


def docstring_items(source: Source, contents: Contents) -> Iterator[Item]:
    """Yield the conversations about a Python file of the standard library."""
    for line, record in docstring_conversations(source.name, contents.read_all()):
        yield Item(line, record)
