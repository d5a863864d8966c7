"""Provenance of K2 samples: K2's fields as Parquet columns, and back to the original line.

- A line of K2 is one piece that fills its row. `subset_name` is the subset, `src_filename` the
  source, `line_idx_in_src` the document. `k2_source` holds `source`, which has no other column.
- Whatever these four cannot hold exactly (a number given as text, further keys, another key order)
  is kept as JSON in `k2_line`, which is null in every other row. So an export reproduces what was
  imported.
- Alternatives considered: the complete text of every line in `k2_line`; it repeats the same five
  fields 1.9 million times per chunk.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from k2train.data.chunk import Tokens
from k2train.data.prepare.k2_format.lines import KEYS, Fields
from k2train.data.provenance_digest import ProvenanceDigest
from k2train.errors import DataError
from k2train.retry import open_retried

try:
    import pyarrow as arrow
    from pyarrow import parquet
except ImportError:
    arrow = parquet = None

GROUP_ROWS = 65536
"""Rows per row group, so that a row is found without reading the whole file."""
TEXTS = ("subset", "source", "document", "k2_source", "k2_line")
DICTIONARIES = ("subset", "source", "k2_source")

Texts = npt.NDArray[np.bytes_]


class ProvenanceWriter:
    """Writes the provenance of one chunk to `stream`, one line per row.

    Closed by leaving the with statement.
    """

    def __init__(self, stream: IO[bytes], sequence_length: int) -> None:
        names = arrow.dictionary(arrow.int32(), arrow.string())
        kinds = {
            "row": arrow.int32(),
            "start": arrow.int32(),
            "length": arrow.int32(),
            "subset": names,
        }

        kinds |= {
            "source": names,
            "document": arrow.string(),
            "offset": arrow.int64(),
            "fim": names,
        }

        kinds |= {"repeat": arrow.int16(), "k2_source": names, "k2_line": arrow.string()}
        self.schema = arrow.schema(list(kinds.items()))
        self.sequence_length = sequence_length
        self.rows_per_subset: Counter[str] = Counter()
        self.digest = ProvenanceDigest()
        self._row = 0
        self._texts: dict[str, list[str | None]] = {name: [] for name in TEXTS}
        self._writer = parquet.ParquetWriter(stream, self.schema, compression="zstd")

    def __enter__(self) -> "ProvenanceWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._write_groups(1)
        self._writer.close()

    def add(self, fields: Sequence[Fields]) -> None:
        """Append the rows of these lines."""
        for values, column in zip(
            self._texts.values(), zip(*map(_texts_of, fields), strict=True), strict=True
        ):
            values.extend(column)
        self._write_groups(GROUP_ROWS)

    def _write_groups(self, least: int) -> None:
        """Write row groups while at least `least` rows are held."""
        while len(self._texts["subset"]) >= least:
            texts = {name: values[:GROUP_ROWS] for name, values in self._texts.items()}
            self._texts = {name: values[GROUP_ROWS:] for name, values in self._texts.items()}
            table = self._table(texts)
            self._writer.write_table(table)
            self.digest.add(table)
            self.rows_per_subset.update(str(name) for name in texts["subset"])

    def _table(self, texts: Mapping[str, Sequence[str | None]]) -> Any:
        """The Parquet table of the next rows."""
        count = len(texts["subset"])
        columns: dict[str, Any] = {
            "row": np.arange(self._row, self._row + count, dtype=np.int32),
            "start": np.zeros(count, dtype=np.int32),
            "length": np.full(count, self.sequence_length, dtype=np.int32),
            "offset": np.zeros(count, dtype=np.int64),
            "fim": arrow.array(["none"] * count).dictionary_encode(),
            "repeat": np.zeros(count, dtype=np.int16),
        }
        for name, values in texts.items():
            column = arrow.array(values, arrow.string())
            columns[name] = column.dictionary_encode() if name in DICTIONARIES else column

        self._row += count
        return arrow.table([columns[name] for name in self.schema.names], schema=self.schema)


def _texts_of(fields: Fields) -> tuple[str | None, ...]:
    """The columns of `TEXTS` for one line."""
    source, subset, file, number = (
        fields["source"],
        fields["subset_name"],
        fields["src_filename"],
        fields["line_idx_in_src"],
    )
    if (
        type(number) is int
        and type(source) is type(file) is str
        # A lone surrogate is valid in JSON but not in UTF-8.
        and ((text := source + subset + file).isascii() or _unicode(text) == text)
        and tuple(fields) == KEYS
    ):
        return subset, file, str(number), source, None

    name, document = (
        value if isinstance(value, str) else json.dumps(value) for value in (file, number)
    )
    return _unicode(subset), _unicode(name), _unicode(document), None, json.dumps(fields)


def _unicode(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


class ProvenanceReader:
    """Reads the first piece of each row of a chunk, in order, as the fields of a K2 line.

    For rows that were not imported from K2, `subset_name` and `source` are the subset,
    `src_filename` is the source, and `line_idx_in_src` is the document, as a number when it is one.
    Raises DataError when the file is not a provenance file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._stream = open_retried(path)
            self.file = parquet.ParquetFile(self._stream)
        except (OSError, arrow.ArrowException) as error:
            raise DataError(
                f"{path}: cannot be read as Parquet ({error}); fetch it again"
            ) from None

    def __enter__(self) -> "ProvenanceReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self._stream.close()

    def fields(self) -> Iterator[Fields]:
        """Yield the fields of each row. Raises DataError when a row is missing."""
        known = self.file.schema_arrow.names
        columns = [name for name in ("row", "start", *TEXTS) if name in known]
        expected = 0
        for batch in self.file.iter_batches(batch_size=8192, columns=columns):
            listed = {name: batch.column(name).to_pylist() for name in columns}
            missing = [None] * batch.num_rows

            texts = zip(*(listed.get(name, missing) for name in TEXTS), strict=True)
            for row, start, found in zip(listed["row"], listed["start"], texts, strict=True):
                if start == 0:
                    if row != expected:
                        raise DataError(
                            f"{self.path}: row {expected} is missing "
                            f"before row {row}; fetch it again"
                        )
                    expected += 1
                    yield _fields_of(*found)


def count_pieces(path: Path) -> int:
    """Number of pieces of a chunk, from the file's metadata.

    `ProvenanceReader` returns only one per row.
    """
    with open_retried(path) as stream:
        return int(parquet.read_metadata(stream).num_rows)


def _fields_of(
    subset: str, file: str, document: str, source: str | None, line: str | None
) -> Fields:
    """The fields of a K2 line from the columns of `TEXTS`."""
    if line is not None:
        fields: Fields = json.loads(line)
        return fields

    number = int(document) if document.isascii() and document.removeprefix("-").isdigit() else None
    exact = number is not None and str(number) == document
    values = (
        None,
        subset if source is None else source,
        subset,
        file,
        number if exact else document,
    )

    return dict(zip(KEYS, values, strict=True))


def number_texts(vocab_size: int) -> Texts:
    """Texts `0, ` ... of every id, padded with zero bytes to one width, for `format_lines`."""
    return np.array([f"{value}, ".encode() for value in range(vocab_size)])


def format_lines(ids: Tokens, fields: Sequence[Fields], texts: Texts) -> bytes:
    """Format rows `[lines, sequence_length]` of ids as K2's lines, as `json.dumps` writes them."""
    lines = []
    for row, item in zip(ids, fields, strict=True):
        if tuple(item) == KEYS:
            # Join the padded texts of the ids and remove the padding.
            numbers = texts.take(row).tobytes().translate(None, b"\0").removesuffix(b", ")
            rest = ", ".join(f'"{key}": {_value(item[key])}' for key in KEYS[1:])
            lines.append(b'{"token_ids": [%b], %b}\n' % (numbers, rest.encode()))
        else:
            lines.append(json.dumps({**item, "token_ids": row.tolist()}).encode() + b"\n")
    return b"".join(lines)


def _value(value: Any) -> str:
    return _text(value) if type(value) is str else json.dumps(value)


@lru_cache(maxsize=4096)
def _text(value: str) -> str:
    return json.dumps(value)
