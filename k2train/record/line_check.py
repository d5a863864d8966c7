"""A check in every line of a record, so that a changed bit is found in any of them, the last one included.

`"check"` is the last key of a line: the first 16 hex digits of the sha256 of the line without it. It is taken over bytes,
not over values, so that reading needs no second encoding and a changed space counts as well. A hash of the whole file,
kept elsewhere, was refused: it names no line, and says nothing about what was written since it was taken.
Lines from before there were checks have none and are read; from the first line with a check on, every line has one.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from k2train.errors import RunError
from k2train.record.jsonl import parse_line

CHECK_KEY = "check"
TAIL = b', "check": "................"}'
"""A dot stands for a hexadecimal digit."""
_TAIL = re.compile(rb', "check": "([0-9a-f]{16})"\}')
DAMAGED_BYTES = 2
"""A tail that differs from TAIL in so many bytes is a damaged check, not a line that never had one."""

Row = dict[str, Any]


def with_check(line: bytes) -> bytes:
    """A line of one object, newline included, with its check. The object must not be empty."""
    assert line.endswith(b"}\n") and len(line) > 3, f"{line!r} is no line of a record"
    return line[:-2] + b', "check": "' + _digest(line[:-1]) + b'"}\n'


def line_problem(line: bytes, checks_before: bool) -> str:
    """Words about what is wrong with a line, without its newline, as far as its check tells; "" when nothing is."""
    tail = _TAIL.fullmatch(line, max(0, len(line) - len(TAIL)))
    if tail is not None:
        return (
            "" if _digest(line[: -len(TAIL)] + b"}") == tail[1] else "does not match its own hash"
        )
    end = line[-len(TAIL) :]
    if (
        len(end) == len(TAIL)
        and sum(a != b for a, b in zip(end, TAIL, strict=True) if b != ord(".")) <= DAMAGED_BYTES
    ):
        return "has a damaged check"
    return "has no check, although earlier lines do" if checks_before else ""


def has_check(line: bytes) -> bool:
    """Whether the line, without its newline, carries a check, right or wrong."""
    return _TAIL.fullmatch(line, max(0, len(line) - len(TAIL))) is not None


def ends_damaged(rest: bytes) -> bool:
    """Whether what follows the last newline is a whole line whose newline was changed, not one that was cut off."""
    try:
        parse_line(Path(), 0, rest[:-1])
    except RunError:
        return False
    return True


def checked_rows(
    path: Path, lines: list[bytes], rest: bytes = b""
) -> Iterator[tuple[int, Row | RunError]]:
    """(line number from 1, the row without its check) for every line, a RunError naming file and line for a bad one."""
    seen = False
    for number, line in enumerate(lines, 1):
        problem = line_problem(line, seen)
        seen = seen or has_check(line)
        try:
            row = parse_line(path, number, line)
            if problem:
                raise RunError(
                    f"{path}: line {number} {problem}: it was changed or damaged after it was "
                    "written"
                )
        except RunError as error:
            yield number, error
            continue
        if has_check(line):
            del row[CHECK_KEY]
        yield number, row
    if ends_damaged(rest):
        number = len(lines) + 1
        yield (
            number,
            RunError(
                f"{path}: line {number} has lost its end: it was changed or damaged after it was "
                "written"
            ),
        )


def all_rows(path: Path, lines: list[bytes], rest: bytes = b"") -> list[Row]:
    """Every row. Raises RunError for the first line that is damaged."""
    rows = []
    for _, row in checked_rows(path, lines, rest):
        if isinstance(row, RunError):
            raise row
        rows.append(row)
    return rows


def _digest(line: bytes) -> bytes:
    return hashlib.sha256(line).hexdigest()[:16].encode()
