"""Rows of a Parquet file: the columns of a recipe's keys, nested ones too, batch by batch.

- Memory holds a few megabytes of a column, whatever the size of a row group.
- The checksum of a page is verified where the file has one.
- Text is decoded here, since Parquet does not guarantee UTF-8: one bad cell costs one row.

Alternatives considered:
- `pyarrow.dataset`: it reads whole row groups ahead, gigabytes of a crawl.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from k2train.data.prepare.field_keys import text_value
from k2train.errors import DataError, UserError
from k2train.retry import open_retried

BATCH_BYTES = 2**22
MAX_BATCH_ROWS = 1024

Row = tuple[Any, Any, tuple[Any, ...]]
"""Text, name and fields of a row."""


def parquet_rows(
    path: str, text_keys: Sequence[str], id_key: str | None, fields: Sequence[str] = ()
) -> Iterator[Row | UnicodeDecodeError]:
    """Yield the text, name and fields of each row, or the error of a row that is not UTF-8.

    Raises DataError for a file that is damaged, or lacks every text key, the id key or a field,
    UnavailableError for one that cannot be read for now.
    """
    try:
        import pyarrow as arrow
    except ImportError:
        raise UserError("reading Parquet needs pyarrow: pip install 'k2train[data]'") from None

    with whole_parquet(path) as file:
        schema = file.schema_arrow
        texts = [key for key in text_keys if has_column(schema, key)]
        others = [*([id_key] if id_key else []), *fields]
        _check_columns(path, schema, texts, text_keys, others)
        rows = _batch_rows(file.metadata)
        keys = list(dict.fromkeys([*texts, *others]))
        for batch in file.iter_batches(batch_size=rows, columns=keys, use_threads=False):
            values = {key: _cells(arrow, _column(batch, key)) for key in keys}
            for index in range(batch.num_rows):
                cells = {key: column[index] for key, column in values.items()}
                yield _row(cells, texts, id_key, fields)


@contextmanager
def whole_parquet(path: str) -> Iterator[Any]:
    """Open a Parquet file as `open_parquet`; raises DataError where it turns out damaged."""
    import pyarrow as arrow

    try:
        with open_parquet(path) as file:
            yield file
    except (arrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: not a complete Parquet file ({reason}); fetch it again") from None


@contextmanager
def open_parquet(path: str) -> Iterator[Any]:
    """Open a Parquet file for reading in small pieces; its reads are retried.

    Raises OSError, UnavailableError, pyarrow's errors.
    """
    from pyarrow import parquet

    # A small buffer streams the pages of a column instead of holding a complete row group.
    with (
        open_retried(Path(path)) as stream,
        parquet.ParquetFile(
            stream, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True
        ) as file,
    ):
        yield file


def has_column(schema: Any, key: str) -> bool:
    """Whether a schema has a column, or a field nested in structs; a list or a map has none."""
    return _place(list(schema), key) is not None


def _place(fields: Sequence[Any], key: str) -> list[int] | None:
    """Index of a column, then of the fields nested in it that `key` names; None without one.

    The longest outer name comes first, as in JSON lines.
    """
    from pyarrow import types

    names = [field.name for field in fields]
    outer = key
    while outer:
        if outer in names:
            index = names.index(outer)
            if outer == key:
                return [index]
            kind = fields[index].type
            # Values inside of a list or a map are many to a row, so no key can name one.
            inside = (
                [kind.field(i) for i in range(kind.num_fields)] if types.is_struct(kind) else []
            )
            if (inner := _place(inside, key[len(outer) + 1 :])) is not None:
                return [index, *inner]
        outer, _, _ = outer.rpartition(".")
    return None


def _check_columns(
    path: str,
    schema: Any,
    texts: Sequence[str],
    text_keys: Sequence[str],
    others: Sequence[str],
) -> None:
    """Raises DataError when a column of the recipe is absent."""
    missing = [] if texts else [text_keys[0]]
    missing += [key for key in others if not has_column(schema, key)]
    for column in missing:
        raise DataError(
            f"{path}: has no column {column!r} "
            f"(text_key, id_key or where); it has {', '.join(schema.names)}"
        )


def _row(
    cells: dict[str, Any], texts: Sequence[str], id_key: str | None, fields: Sequence[str]
) -> Row | UnicodeDecodeError:
    """Decode the cells of a row."""
    try:
        decoded = {
            key: cell.decode() if isinstance(cell, bytes) else cell for key, cell in cells.items()
        }
    except UnicodeDecodeError as error:
        return error
    return (
        text_value([decoded[key] for key in texts]),
        decoded[id_key] if id_key else None,
        tuple(decoded[key] for key in fields),
    )


def _column(batch: Any, key: str) -> Any:
    """A column of a batch, or the field nested in it; null where a struct around it is."""
    from pyarrow import compute

    place = _place(list(batch.schema), key)
    assert place is not None, f"{key}: the schema of the file has it, a batch has not"
    column = batch.column(place[0])
    for index in place[1:]:
        column = compute.struct_field(column, [index])
    return column


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
