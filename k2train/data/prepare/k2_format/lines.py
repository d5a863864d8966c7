"""K2's jsonl lines to arrays of ids, a block of lines at a time, several times as fast as `json.loads`.

A line is `{"token_ids": [2048 numbers], "source": ..., "subset_name": ..., "src_filename": ..., "line_idx_in_src": ...}`.
The numbers are nearly all of its bytes, so they are read by NumPy for all lines of a block at once, and only the rest
of a line goes through `json.loads`. Whatever is not written exactly as `json.dumps` writes it sends its whole block
through `json.loads` line by line, which decides what is valid and names the line that is not: the fast road may decline,
and never accepts what JSON does not. A faster JSON parser was refused: simdjson makes a value of each number before it
can be asked for an array, and was measured at 60 % of this speed.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from k2train.data.chunk import Tokens
from k2train.errors import DataError

KEYS = ("token_ids", "source", "subset_name", "src_filename", "line_idx_in_src")
# A line of 8192 ids has some 50 KB. Without a bound, a file without line ends would be taken into memory whole.
MAX_LINE_BYTES = 2**24

_HEAD = b'"token_ids": ['
_COMMA, _SPACE, _ZERO = b", 0"
_DECODER = json.JSONDecoder()
# Stands over everything that is not a number while the numbers are read; neither digit, comma nor space.
_FILL = b"/"
# Digits are looked for this far to the left of a comma; longer numbers take the slow road.
_DIGITS = 5

Fields = dict[str, Any]
"""A line as `json.loads` gives it, but with None for `token_ids`: the order of the keys is that of the line."""


class Lines(NamedTuple):
    """Consecutive lines of a file: the number of the first (from 1), ids `[lines, sequence_length]`, other fields."""

    first: int
    ids: Tokens
    fields: list[Fields]


def parse_lines(
    pieces: Iterable[bytes], where: str, sequence_length: int, vocab_size: int
) -> Iterator[Lines]:
    """The lines of a file that comes in pieces; a piece that ends inside a line is continued by the next.

    Raises DataError, with `where`:line, for a line that is no sample of `sequence_length` ids below `vocab_size`.
    """
    _keep_freed_memory()
    left = b""
    line = 1
    for piece in pieces:
        block = bytearray(left)
        block += piece
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
    # The C library hands arrays of this size back to the system one by one, and the next one then costs more in page
    # faults than what is computed in it. It stops doing so once it has seen a larger array come and go.
    np.empty(2**24, dtype=np.uint8)


def _parse_block(
    block: bytearray, where: str, first: int, sequence_length: int, vocab_size: int
) -> Lines:
    """`block` holds whole lines, each with its line end; it is overwritten."""
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
            f"{where}:{first + row}: token_ids[{position}] is {int(ids[row, position])}, "
            f"not below vocab_size {vocab_size}: the data is of another tokenizer, or vocab_size must be raised"
        )
    return Lines(first, ids, fields)


def parse_line(line: bytes, where: str, sequence_length: int | None) -> tuple[list[int], Fields]:
    """Ids and other fields of one line by `json.loads`; any number of ids when `sequence_length` is None.

    Raises DataError that begins with `where`.
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
    # Not isinstance: True is an int, and so would a line of truths be a sample. The bound is that of uint32.
    if wrong := [
        i for i, token in enumerate(ids) if type(token) is not int or not 0 <= token < 2**32
    ]:
        raise DataError(
            f"{where}: token_ids[{wrong[0]}] must be a whole number from 0, is {ids[wrong[0]]!r:.40}"
        )
    if sequence_length is not None and len(ids) != sequence_length:
        raise DataError(
            f"{where}: token_ids has {len(ids)} ids, all samples must have {sequence_length}"
        )
    return ids, fields


def _parse_fast(block: bytearray, sequence_length: int) -> tuple[Tokens, list[Fields]] | None:
    """What `parse_line` would say of every line, or None where that is not plain; then `block` is as it was."""
    saved: list[tuple[int, bytes]] = []
    fields: list[Fields] = []
    starts: list[int] = []
    start = covered_from = 0
    try:
        while start < len(block):
            line, numbers = start, block.index(_HEAD, start) + len(_HEAD)
            end = block.index(b"]", numbers)
            start = block.index(b"\n", end) + 1
            fields.append(_fields(block[line : numbers - 1] + b"null" + block[end + 1 : start - 1]))
            saved.append((covered_from, _blank_out(block, covered_from, numbers)))
            starts.append(numbers)
            covered_from = end
        saved.append((covered_from, _blank_out(block, covered_from, len(block))))
        # Each covered stretch but the first begins with a comma and a space, which are those of the number before it.
        filled_bytes = sum(len(content) for _, content in saved) - 2 * len(starts)
        return _numbers(block, starts, sequence_length, filled_bytes), fields
    except (ValueError, RecursionError):
        for offset, content in saved:
            block[offset : offset + len(content)] = content
        return None


def _fields(text: bytearray) -> Fields:
    """Raises ValueError when this is no plain sample; also where `token_ids` belongs to something inside it."""
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
    """Overwrite what is no number, after a comma that ends the last number as the others are ended; what was there."""
    content = bytes(block[start:stop])
    block[start:stop] = (b", " if start else b"").ljust(stop - start, _FILL)
    return content


def _numbers(
    block: bytearray, starts: list[int], sequence_length: int, filled_bytes: int
) -> Tokens:
    """Ids `[lines, sequence_length]` of a covered block. Raises ValueError unless every byte is as it must be.

    Between start and end of a line there are numbers of 1 to 5 digits, none with a leading zero, and a comma and a space
    after each but the last, whose comma is that of `_cover`. As many bytes are no digits as there are commas and spaces
    after them: so nothing else stands between two commas. An id too many or too few in a line puts the start of the next
    line inside a number's length, which is then below 1, or above 5 since it spans what was covered.
    """
    text = np.frombuffer(block, dtype=np.uint8)
    commas = np.flatnonzero(text == _COMMA)
    digit = text - _ZERO
    is_digit = digit < 10
    if (
        len(commas) != len(starts) * sequence_length
        or int(np.count_nonzero(is_digit)) + 2 * len(commas) + filled_bytes != len(text)
        or bool((text.take(commas + 1) != _SPACE).any())
    ):
        raise ValueError("not written as json.dumps writes")
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
    digit &= np.negative(is_digit.view(np.uint8))
    return _values(digit, commas, lengths).reshape(len(starts), sequence_length)


def _values(
    digit: npt.NDArray[np.uint8], commas: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> Tokens:
    """uint32 value of the number of `lengths` digits before each of `places`; what is no digit is 0 in `digit`.

    A number is the two digits before its comma, the two before these, and the one before them. The comma and space
    before a short one count 0, so only a number of 1 digit, or 2, comes so near to its neighbour that it must be cut off.
    """
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
