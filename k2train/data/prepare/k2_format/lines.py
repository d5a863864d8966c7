"""Fast parser for K2's jsonl chunks: lines to arrays of ids, several times as fast as `json.loads`.

A line is `{"token_ids": [2048 numbers], "source": ..., "subset_name": ..., "src_filename": ...,
"line_idx_in_src": ...}`.

- The numbers are nearly all of its bytes. NumPy reads them for a block of lines at once, and only
  the rest of a line goes through `json.loads`.
- A block with anything not written exactly as `json.dumps` writes goes through `json.loads` line by
  line. That decides what is valid and names the line that is not. The fast path may decline a
  block, but never accepts what JSON does not.
- Alternatives considered: simdjson; it makes a value of each number before it can return an array,
  and was measured at 60 % of this speed.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from k2train.data.chunk import Tokens
from k2train.errors import DataError

KEYS = ("token_ids", "source", "subset_name", "src_filename", "line_idx_in_src")
# A line of 8192 ids has about 50 KB. The limit keeps a file without line ends out of memory.
MAX_LINE_BYTES = 2**24

_HEAD = b'"token_ids": ['
_COMMA, _SPACE, _ZERO = b", 0"
_DECODER = json.JSONDecoder()
# Replaces everything that is not an id while ids are read; neither digit, comma nor space.
_FILL = b"/"
# Digits are read this far to the left of a comma; longer numbers take the slow path.
_DIGITS = 5

Fields = dict[str, Any]
"""A line as `json.loads` returns it, with None for `token_ids` and the keys in the line's order."""


class Lines(NamedTuple):
    """Consecutive lines of a file.

    `first` is the number of the first line (from 1), `ids` is `[lines, sequence_length]`, `fields`
    are the other fields.
    """

    first: int
    ids: Tokens
    fields: list[Fields]


def parse_lines(
    pieces: Iterable[bytes], where: str, sequence_length: int, vocab_size: int
) -> Iterator[Lines]:
    """Parse the lines of a file given in pieces; a piece may end inside a line.

    Raises DataError, with `where`:line, for a line that is not a sample of `sequence_length` ids
    below `vocab_size`.
    """
    _keep_freed_memory()
    left = b""
    line = 1
    for piece in pieces:
        block = bytearray(left)
        block += piece
        # Parse complete lines; the rest waits for the next piece.
        end = block.rfind(b"\n") + 1

        left = bytes(block[end:])
        if len(left) > MAX_LINE_BYTES:
            raise DataError(
                f"{where}:{line}: longer than {MAX_LINE_BYTES} bytes; not a chunk file of K2"
            )

        if end:
            del block[end:]
            yield (lines := _parse_block(block, where, line, sequence_length, vocab_size))
            line += len(lines.fields)

    if left:
        yield _parse_block(bytearray(left + b"\n"), where, line, sequence_length, vocab_size)


def _keep_freed_memory() -> None:
    # malloc returns arrays of this size to the system one by one. The next one then costs more in
    # page faults than in arithmetic. It stops doing so once a larger array was freed.
    np.empty(2**24, dtype=np.uint8)


def _parse_block(
    block: bytearray, where: str, first: int, sequence_length: int, vocab_size: int
) -> Lines:
    """Parse a block of complete lines; overwrites the block."""
    found = _parse_fast(block, sequence_length)
    if found is None:
        rows = [
            parse_line(line, f"{where}:{first + i}", sequence_length)
            for i, line in enumerate(bytes(block[:-1]).split(b"\n"))
        ]
        fields = [fields for _, fields in rows]
        ids: Tokens = np.array([ids for ids, _ in rows], dtype=np.uint32)
    else:
        ids, fields = found

    if int(ids.max()) >= vocab_size:
        row, position = (int(i) for i in np.argwhere(ids >= vocab_size)[0])
        raise DataError(
            f"{where}:{first + row}: token_ids[{position}] is "
            f"{int(ids[row, position])}, not below vocab_size {vocab_size}: "
            "the data is of another tokenizer, or vocab_size must be raised"
        )

    return Lines(first, ids, fields)


def parse_line(line: bytes, where: str, sequence_length: int | None) -> tuple[list[int], Fields]:
    """Parse one line by `json.loads`: its ids and other fields.

    Accepts any number of ids when `sequence_length` is None. Raises DataError beginning with
    `where`.
    """
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error})") from None

    if not isinstance(fields, dict):
        raise DataError(f"{where}: must be a JSON object, is {type(fields).__name__}")
    if missing := [key for key in KEYS if key not in fields]:
        raise DataError(f"{where}: key {missing[0]!r} is missing; a sample has {', '.join(KEYS)}")
    if not isinstance(fields["subset_name"], str):
        raise DataError(f"{where}: subset_name must be text, is {fields['subset_name']!r}")

    ids, fields["token_ids"] = fields["token_ids"], None
    if not isinstance(ids, list) or not ids:
        raise DataError(
            f"{where}: token_ids must be a list of ids, is {type(ids).__name__ if ids else 'empty'}"
        )
    # Not isinstance, since True is an int. The limit is that of uint32.
    if wrong := [
        i for i, token in enumerate(ids) if type(token) is not int or not 0 <= token < 2**32
    ]:
        raise DataError(
            f"{where}: token_ids[{wrong[0]}] must be a "
            f"whole number from 0, is {ids[wrong[0]]!r:.40}"
        )
    if sequence_length is not None and len(ids) != sequence_length:
        raise DataError(
            f"{where}: token_ids has {len(ids)} ids, all samples must have {sequence_length}"
        )

    return ids, fields


def _parse_fast(block: bytearray, sequence_length: int) -> tuple[Tokens, list[Fields]] | None:
    """Parse a block with NumPy.

    Returns None, with `block` unchanged, when it is not written exactly as `json.dumps` writes.
    """
    saved: list[tuple[int, bytes]] = []
    fields: list[Fields] = []

    starts: list[int] = []
    start = covered_from = 0
    try:
        while start < len(block):
            # Locate the ids of a line, parse the rest of it, and blank that out.
            line, numbers = start, block.index(_HEAD, start) + len(_HEAD)
            end = block.index(b"]", numbers)
            start = block.index(b"\n", end) + 1
            fields.append(_fields(block[line : numbers - 1] + b"null" + block[end + 1 : start - 1]))
            saved.append((covered_from, _blank_out(block, covered_from, numbers)))
            starts.append(numbers)
            covered_from = end

        saved.append((covered_from, _blank_out(block, covered_from, len(block))))
        # Each blanked range but the first begins with the comma and space of the id before it.
        filled_bytes = sum(len(content) for _, content in saved) - 2 * len(starts)
        return _numbers(block, starts, sequence_length, filled_bytes), fields
    except (ValueError, RecursionError):
        for offset, content in saved:
            block[offset : offset + len(content)] = content
        return None


def _fields(text: bytearray) -> Fields:
    """Parse a line without its ids.

    Raises ValueError when it is not a plain sample, or when `token_ids` belongs to a nested object.
    """
    line = text.decode()
    fields: Fields
    fields, end = _DECODER.raw_decode(line)
    if (
        end != len(line)
        or "\n" in line
        or not isinstance(fields, dict)
        or not (tuple(fields) == KEYS or set(KEYS) <= set(fields))
    ):
        raise ValueError("not one line with the keys of a sample")
    if fields["token_ids"] is not None or not isinstance(fields["subset_name"], str):
        raise ValueError("not the values of a sample")

    return fields


def _blank_out(block: bytearray, start: int, stop: int) -> bytes:
    """Overwrite bytes that are not ids and return what they were.

    Writes a comma and space first, so that the last id of a line ends like all others.
    """
    content = bytes(block[start:stop])
    block[start:stop] = (b", " if start else b"").ljust(stop - start, _FILL)
    return content


def _numbers(
    block: bytearray, starts: list[int], sequence_length: int, filled_bytes: int
) -> Tokens:
    """Ids `[lines, sequence_length]` of a block whose other bytes are blanked out.

    Raises ValueError unless every byte is as expected. Between the start and end of a line there
    are numbers of 1 to 5 digits without leading zeros. Each is followed by a comma and a space;
    those after the last come from `_blank_out`. The bytes that are not digits are as many as the
    commas and spaces after them, so nothing else is between two commas. One id too many or too few
    in a line puts the start of the next line inside a number's length, which is then below 1, or
    above 5 since it spans blanked bytes.
    """
    text = np.frombuffer(block, dtype=np.uint8)
    # Every byte must be a digit, a comma, the space after it, or blanked out.
    commas = np.flatnonzero(text == _COMMA)
    digit = text - _ZERO

    is_digit = digit < 10
    if (
        len(commas) != len(starts) * sequence_length
        or int(np.count_nonzero(is_digit)) + 2 * len(commas) + filled_bytes != len(text)
        or bool((text.take(commas + 1) != _SPACE).any())
    ):
        raise ValueError("not written as json.dumps writes")

    # A number begins after the previous comma and space, or at the start of its line.
    lengths = np.empty_like(commas)
    np.subtract(commas[1:], commas[:-1] + 2, out=lengths[1:])
    lengths[::sequence_length] = commas[::sequence_length] - starts

    zeros = text.take(commas - lengths) == _ZERO
    if (
        int(lengths.min()) < 1
        or int(lengths.max()) > _DIGITS
        or bool((zeros & (lengths > 1)).any())
    ):
        raise ValueError("not numbers of 1 to 5 digits")

    # Bytes that are not digits count 0.
    digit &= np.negative(is_digit.view(np.uint8))
    return _values(digit, commas, lengths).reshape(len(starts), sequence_length)


def _values(
    digit: npt.NDArray[np.uint8], commas: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> Tokens:
    """uint32 value of the number of `lengths` digits before each of `commas`.

    `digit` is 0 where a byte is not a digit. A number is the two digits before its comma, the two
    before these, and the one before them. The comma and space before a short number count 0, so
    only numbers of 1 or 2 digits are so close to their neighbour that it must be cut off.
    """
    # Value of every two adjacent digits.
    pair = digit[:-1] * np.uint8(10)
    pair += digit[1:]
    values = digit.take(commas - 5).astype(np.uint32)
    values *= lengths > 4
    values *= 100
    hundreds = pair.take(commas - 4)
    hundreds *= lengths > 2
    values += hundreds
    values *= 100
    values += pair.take(commas - 2)
    return values
