"""Run metrics: one JSON line per step, kept for every attempt, never overwritten.

- A step repeated after a restart is a second row with a higher `attempt`. Both stay, so the steps
  before a crash remain visible. `latest` gives the curve without repeats.
- Each row is one write to the kernel, so kill -9 costs at most a part of the last line. Only `sync`
  reaches the disk. A power cut may cost rows; the ledger and the checkpoints are fsynced and do not
  depend on them.
- Each row carries a check (see `line_check`). A damaged row is reported and ends no run, because no
  part of a run depends on its metrics.
- The same format serves any file of one row per step, such as `state_roots.jsonl`.

Alternatives considered:
- Overwriting the old rows, as dashboards do: it hides exactly the steps of interest.
"""

import threading
from pathlib import Path
from typing import Any

from k2train.errors import RunError
from k2train.record.jsonl import NON_FINITE, append_bytes, encode_line, read_lines, truncate
from k2train.record.line_check import all_rows, checked_rows, ends_damaged, with_check


class MetricsWriter:
    """Appends metrics rows to the file at `path`.

    A torn last line of a killed process is cut off and reported in `repaired`. No file is created
    before the first row. Raises RunError when the file cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.repaired: str | None = None
        self._lock = threading.Lock()
        if self.path.exists():
            self.repaired = _repair(self.path)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row for one step. Raises OSError.

        Non-finite floats become "nan", "inf" and "-inf" in the file.
        """
        line = with_check(encode_line(row))
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_bytes(self.path, line, sync=False)

    def sync(self) -> None:
        """Sync all rows written so far to the disk; called when a checkpoint is committed."""
        with self._lock:
            if self.path.exists():
                append_bytes(self.path, b"", sync=True)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read all rows in the order written; a torn last line is left out.

    "nan", "inf" and "-inf" become floats again. Raises RunError when the file is missing or a line
    is damaged, naming it.
    """
    path = Path(path)
    return [_restore_floats(row) for row in all_rows(path, *read_lines(path))]


def damaged_rows(path: str | Path) -> list[str]:
    """Describe every damaged line, naming file and line.

    Raises RunError when the file is unreadable.
    """
    path = Path(path)
    return [
        str(row) for _, row in checked_rows(path, *read_lines(path)) if isinstance(row, RunError)
    ]


def last_attempt(path: str | Path) -> int:
    """Highest `attempt` in the file, without damaged lines; 0 if there is none."""
    path = Path(path)
    if not path.exists():
        return 0
    rows = [
        row for _, row in checked_rows(path, *read_lines(path)) if not isinstance(row, RunError)
    ]
    return max(
        (attempt for row in rows if isinstance(attempt := row.get("attempt"), int)), default=0
    )


def latest(path: str | Path) -> list[dict[str, Any]]:
    """Row of the highest attempt for each step, ordered by step: the curve without repeats.

    It also holds steps that only an earlier attempt has reached, with their `attempt`.
    """
    best: dict[int, dict[str, Any]] = {}
    for row in read_metrics(path):
        known = best.get(row["step"])
        # A later attempt replaces the row of an earlier one.
        if known is None or row.get("attempt", 0) >= known.get("attempt", 0):
            best[row["step"]] = row
    return [best[step] for step in sorted(best)]


def _restore_floats(row: dict[str, Any]) -> dict[str, Any]:
    return {
        key: NON_FINITE.get(value, value) if isinstance(value, str) else value
        for key, value in row.items()
    }


def _repair(path: Path) -> str | None:
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
