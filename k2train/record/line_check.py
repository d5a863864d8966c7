"""Per-line checksum of record files: finds a changed bit in any line, including the last one.

- `"check"` is the last key of a line: the first 16 hex digits of the sha256 of the line without it.
  It covers bytes, not values, so reading needs no second encoding and a changed space counts.
- Lines from before checks existed have none and are read. After the first line with a check, every
  line must have one.

Alternatives considered:
- A hash of the whole file, kept elsewhere: it names no line, and covers nothing that was written
  since it was taken.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from k2train.errors import RunError
from k2train.record.jsonl import append_bytes, parse_line, truncate

CHECK_KEY = "check"
TAIL = b', "check": "................"}'
"""End of a line with a check. A dot is any hexadecimal digit."""
_TAIL = re.compile(rb', "check": "([0-9a-f]{16})"\}')
DAMAGED_BYTES = 2
"""Largest number of bytes by which a tail may differ from TAIL and count as a damaged check.

Beyond it, the line counts as one that never had a check.
"""

Row = dict[str, Any]


def with_check(line: bytes) -> bytes:
    """Add the check to a line of one non-empty object, newline included."""
    assert line.endswith(b"}\n") and len(line) > 3, f"{line!r} is no line of a record"
    return line[:-2] + b', "check": "' + _digest(line[:-1]) + b'"}\n'


def line_problem(line: bytes, checks_before: bool) -> str:
    """Describe what is wrong with a line, given without its newline; "" when its check is right."""
    tail = _TAIL.fullmatch(line, max(0, len(line) - len(TAIL)))
    if tail is not None:
        return (
            "" if _digest(line[: -len(TAIL)] + b"}") == tail[1] else "does not match its own hash"
        )

    # Few wrong bytes in the tail: a check whose key or digits were damaged.
    end = line[-len(TAIL) :]
    if (
        len(end) == len(TAIL)
        and sum(a != b for a, b in zip(end, TAIL, strict=True) if b != ord(".")) <= DAMAGED_BYTES
    ):
        return "has a damaged check"

    return "has no check, although earlier lines do" if checks_before else ""


def has_check(line: bytes) -> bool:
    """Whether the line, given without its newline, carries a check, valid or not."""
    return _TAIL.fullmatch(line, max(0, len(line) - len(TAIL))) is not None


def ends_damaged(rest: bytes) -> bool:
    """Whether the bytes after the last newline are a whole line whose newline was damaged.

    Otherwise they are a line that was cut off.
    """
    try:
        parse_line(Path(), 0, rest[:-1])
    except RunError:
        return False
    return True


def checked_rows(
    path: Path, lines: list[bytes], rest: bytes = b""
) -> Iterator[tuple[int, Row | RunError]]:
    """Yield (line number from 1, row without its check) for every line.

    A damaged line yields a RunError naming file and line instead of a row.
    """
    seen = False
    for number, line in enumerate(lines, 1):
        problem = line_problem(line, seen)
        # From the first line with a check on, every line must have one.
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

    # A torn line is left to the caller; a damaged newline is an error.
    if ends_damaged(rest):
        number = len(lines) + 1
        yield (
            number,
            RunError(
                f"{path}: line {number} has lost its end: it was changed or damaged after it was "
                "written"
            ),
        )


def repair_torn_tail(path: Path) -> str | None:
    """Cut off a torn last line of a killed process; returns what was done, None if nothing.

    Raises OSError.
    """
    torn_bytes, size_bytes = _torn_tail(path)
    if not torn_bytes:
        return None

    with path.open("rb") as stream:
        stream.seek(size_bytes)
        rest = stream.read()

    if ends_damaged(rest):
        # Not torn: the newline itself was damaged. Keep the line; the next one begins after it.
        append_bytes(path, b"\n", sync=False)
        return (
            f"{path.name}: the newline of the last line was damaged; the line is kept and reported "
            "as damaged"
        )

    truncate(path, size_bytes)
    return f"{path.name}: {torn_bytes} bytes of a torn last line were cut off"


def _torn_tail(path: Path, block_bytes: int = 65536) -> tuple[int, int]:
    """(bytes after the last newline, bytes before them).

    Reads from the end, because the file of a long run has many megabytes.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        end = size_bytes
        while end > 0:
            start = max(0, end - block_bytes)
            file.seek(start)
            # Blocks are read backwards until one holds a newline.
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                complete_bytes = start + newline + 1
                return size_bytes - complete_bytes, complete_bytes
            end = start

    return size_bytes, 0


def _digest(line: bytes) -> bytes:
    return hashlib.sha256(line).hexdigest()[:16].encode()
