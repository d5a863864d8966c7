"""Text formatting for console and tools: bytes, durations, counts, safe names and tables.

- Bytes are binary everywhere (KiB, MiB, GiB, TiB), as memory is sold and as tools print it.
- Names come from untrusted documents: characters that move a terminal's cursor or change its
  colours are shown as escapes.
- Standard library only.

Alternatives considered:
- Printing names unchanged: a file name could then rewrite the table around it.
"""

import math
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

LEFT = {"subset", "source", "document", "chunk", "state", "sha256", "fim", "what"}
"""Headings of columns with words, which are aligned to the left."""
UNKNOWN = "-"
BAR = r"\|"
"""A bar inside a cell of a Markdown table."""
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def bytes_text(count: float) -> str:
    """Format a number of bytes: `20.16 GiB`, `5.82 MiB`, `900 B`; binary units, two decimals."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Format seconds as `45s`, `1m20s`, `2h05m` or `3d04h`, rounded up."""
    whole = math.ceil(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: Collection[str] = LEFT,
    drop_unknown: bool = True,
) -> list[str]:
    """Align columns under their headings, numbers to the right.

    Columns named in `left` are aligned to the left. With `drop_unknown`, a column in which every
    cell is empty or unknown is left out.
    """
    kept = [
        i
        for i in range(len(headings))
        if not rows or not drop_unknown or any(cells[i] not in ("", UNKNOWN) for cells in rows)
    ]
    widths = {i: max(len(cells[i]) for cells in (headings, *rows)) for i in kept}

    return [
        "  ".join(
            cells[i].ljust(w) if headings[i] in left else cells[i].rjust(w)
            for i, w in widths.items()
        ).rstrip()
        for cells in (headings, *rows)
    ]


def markdown_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False
) -> list[str]:
    """Markdown table; with `numbers`, all columns but the first are aligned to the right."""
    rule = ["---", *["---:" if numbers else "---"] * (len(headings) - 1)]
    return [markdown_row(headings), f"|{'|'.join(rule)}|", *map(markdown_row, rows)]


def markdown_row(cells: Iterable[str]) -> str:
    """One row of a Markdown table, on one line whatever is in its cells."""
    return f"| {' | '.join(cell.replace('|', BAR).replace(chr(10), ' ') for cell in cells)} |"


def number(value: Any, digits: int | None = None) -> str:
    """Format a number as `1,204`, or with `digits` decimals; None as `-`."""
    form = "," if digits is None else f",.{digits}f"
    return UNKNOWN if value is None else f"{value:{form}}"


def tokens_text(count: float) -> str:
    """Format a number of tokens: `812`, `40.3M`, `1,295.7B`."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if round(count) >= size:
            return f"{count / size:,.1f}{unit}"
    return f"{count:.0f}"


def percent(part: int, whole: int) -> str:
    """Format `part` of `whole` as `54.54%`."""
    return f"{100 * part / max(1, whole):.2f}%"


def counted(count: int, what: str) -> str:
    """Format a count with its noun: `1 chunk`, `1,204 chunks`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def span_text(first: int, last: int) -> str:
    """Format a range of numbers: `3` or `3 to 7`."""
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def clean(text: Any) -> str:
    """Make a name safe to print on one line; None as `-`."""
    return UNKNOWN if text is None else safe(str(text)).replace("\n", "\\n").replace("\t", "\\t")


def safe(text: str) -> str:
    """Replace every control character except newline and tab by an escape."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def brief(digest: str) -> str:
    """Shorten a SHA-256 to 12 digits.

    Any other text, such as a name used as a hash, stays whole.
    """
    return digest[:12] if re.fullmatch(r"[0-9a-f]{64}", digest) else clean(digest)


def cells(record: dict[str, Any], *keys: str) -> list[str]:
    """Format values of a record for a table: numbers as `1,204`, names made safe, None as `-`."""
    values = (record[key] for key in keys)
    return [number(value) if isinstance(value, int | float) else clean(value) for value in values]
