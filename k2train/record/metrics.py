"""The metrics of a run: one JSON line a step, kept for every attempt, never overwritten.

A step done again after a restart is a second row with a higher `attempt`: both stay, so that what happened before a
crash can still be seen, and `latest` gives the curve without repeats. Overwriting the old rows, as dashboards do, is
refused: it hides exactly the steps one wants to look at.
Each row is one write to the kernel, so that kill -9 costs at most a part of the last line; only `sync` reaches the disk
(a power cut may cost rows, which the ledger and the checkpoints, both fsynced, do not depend on).
"""

import threading
from pathlib import Path
from typing import Any

from k2train.record.jsonl import NON_FINITE, append_bytes, encode_line, parse_line, read_lines, truncate


class MetricsWriter:
    """Appends rows to the file at `path`; a torn last line left by a killed process is cut off and said in `repaired`.

    Nothing is created before the first row. Raises RunError when the file cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.repaired: str | None = None
        self._lock = threading.Lock()
        if self.path.exists():
            torn_bytes, size_bytes = _torn_tail(self.path)
            if torn_bytes:
                truncate(self.path, size_bytes)
                self.repaired = f"{self.path.name}: {torn_bytes} bytes of a torn last line were cut off"

    def write(self, row: dict[str, Any]) -> None:
        """One line for one step; non-finite floats become "nan", "inf", "-inf" in the file. Raises OSError."""
        line = encode_line(row)
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_bytes(self.path, line, sync=False)

    def sync(self) -> None:
        """Return when every row written so far is on the disk: for the moment a checkpoint is committed."""
        with self._lock:
            if self.path.exists():
                append_bytes(self.path, b"", sync=True)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All rows in the order written; "nan", "inf" and "-inf" are floats again; a torn last line is left out.

    Raises RunError when the file is missing or a line is damaged, naming it.
    """
    path = Path(path)
    lines, _ = read_lines(path)
    return [_revived(parse_line(path, index + 1, line)) for index, line in enumerate(lines)]


def last_attempt(path: str | Path) -> int:
    """The highest `attempt` in the file; 0 if there is none. Raises RunError when a line is damaged."""
    if not Path(path).exists():
        return 0
    return max((int(row.get("attempt", 0)) for row in read_metrics(path)), default=0)


def latest(path: str | Path) -> list[dict[str, Any]]:
    """For each step the row of the highest attempt, ordered by step: the curve without repeats.

    Steps that an earlier attempt reached and a later one has not reached again are still in it, with their `attempt`.
    """
    best: dict[int, dict[str, Any]] = {}
    for row in read_metrics(path):
        known = best.get(row["step"])
        if known is None or row.get("attempt", 0) >= known.get("attempt", 0):
            best[row["step"]] = row
    return [best[step] for step in sorted(best)]


def _revived(row: dict[str, Any]) -> dict[str, Any]:
    return {key: NON_FINITE.get(value, value) if isinstance(value, str) else value for key, value in row.items()}


def _torn_tail(path: Path, block_bytes: int = 65536) -> tuple[int, int]:
    """(bytes after the last newline, bytes before them), read from the end: a long run's file has many megabytes."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        end = size_bytes
        while end > 0:
            start = max(0, end - block_bytes)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                complete_bytes = start + newline + 1
                return size_bytes - complete_bytes, complete_bytes
            end = start
    return size_bytes, 0
