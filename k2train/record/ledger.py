"""Run ledger: append-only events, one fsynced JSON line each, chained by hash.

- A line carries `seq` (from 0), `time` (UTC), `event`, the event's facts, and `previous`: the
  sha256 of the previous line, as bytes without the newline.
- A changed, removed or reordered line breaks the chain and is named. The `check` in each line (see
  `line_check`) also finds damage in the last one.
- Neither detects that the end was cut off. For that, a checkpoint keeps the ledger's `head`.
- The only repair concerns a last line without a newline, which a killed process leaves behind. It
  is moved to `ledger.torn`, never deleted, and reported in `repaired`. Any other break stops the
  run.

Alternatives considered:
- A database: a text file can be read in twenty years, published with a release and diffed, and one
  write of one line is as atomic as a run needs.
"""

import hashlib
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from k2train.errors import RunError
from k2train.fault_injection import point
from k2train.record.jsonl import append_bytes, encode_line, parse_line, read_lines, truncate
from k2train.record.line_check import CHECK_KEY, all_rows, with_check

REQUIRED = ("seq", "time", "event", "previous")
RESERVED = (*REQUIRED, CHECK_KEY)


class Ledger:
    """The ledger at `path`, opened for appending.

    - Nothing is written before the first append, except for a repair.
    - `repaired` describes a torn line that was moved aside, or is None.

    Raises RunError when the chain is broken.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.repaired: str | None = None
        self._lock = threading.Lock()
        self._size_bytes = 0
        self._head = ""
        self._events: list[dict[str, Any]] = []

        if self.path.exists():
            lines, rest = read_lines(self.path)
            self._events = _verified(self.path, lines, rest)
            self._head = _sha256(lines[-1]) if lines else ""
            # Another process that writes here is found by this size.
            self._size_bytes = sum(len(line) + 1 for line in lines)
            if rest:
                self._move_aside(rest)

    @property
    def head(self) -> str:
        """sha256 of the last line, "" when empty.

        Stored elsewhere, it proves that no line was cut off.
        """
        return self._head

    @property
    def events(self) -> list[dict[str, Any]]:
        """All events so far, oldest first."""
        with self._lock:
            return list(self._events)

    def append(self, event: str, **facts: Any) -> dict[str, Any]:
        """Write one event durably and return it as it can be read back.

        Raises RunError when another process has changed the file, and OSError on a disk error. The
        file is unchanged in both cases.
        """
        wrong = [name for name in RESERVED if name in facts]
        assert not wrong, f"the ledger writes {wrong} itself"
        with self._lock:
            self._check_unchanged()
            entry = {
                "seq": len(self._events),
                "time": _now(),
                "event": event,
                **facts,
                "previous": self._head,
            }
            line = with_check(encode_line(entry))
            point("ledger.append")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_bytes(self.path, line, sync=True)
            self._size_bytes += len(line)
            self._head = _sha256(line[:-1])

            # Keep the event as a reader would get it, not the Python objects it was made from.
            stored = parse_line(self.path, len(self._events) + 1, line)
            del stored[CHECK_KEY]
            self._events.append(stored)

            return dict(stored)

    def last(self, event: str) -> dict[str, Any] | None:
        """Newest event of that name, or None."""
        with self._lock:
            return next(
                (dict(entry) for entry in reversed(self._events) if entry["event"] == event), None
            )

    def _check_unchanged(self) -> None:
        size_bytes = self.path.stat().st_size if self.path.exists() else 0
        if size_bytes != self._size_bytes:
            raise RunError(
                f"{self.path} has {size_bytes} bytes where this process left {self._size_bytes}: "
                "something else writes to this run's directory; stop it, then start again"
            )

    def _move_aside(self, rest: bytes) -> None:
        torn = self.path.with_suffix(".torn")
        # Saved before the cut: after a kill in between, the next start repeats both steps. The line
        # is then kept twice, not lost.
        append_bytes(torn, rest + b"\n", sync=True)
        truncate(self.path, self._size_bytes)
        self.repaired = (
            f"{self.path.name}: the last line was cut off after {len(rest)} bytes (the writer was "
            f"killed); moved to {torn.name}, {len(self._events)} events are intact"
        )


def read_ledger(path: str | Path) -> list[dict[str, Any]]:
    """Read all events, oldest first, and verify the chain.

    A torn last line is left out and the file is not changed. Raises RunError naming the first line
    that does not fit.
    """
    path = Path(path)
    return _verified(path, *read_lines(path))


def _verified(path: Path, lines: list[bytes], rest: bytes) -> list[dict[str, Any]]:
    events = all_rows(path, lines, rest)
    previous = ""
    for index, (entry, line) in enumerate(zip(events, lines, strict=True)):
        missing = [name for name in REQUIRED if name not in entry]
        if missing:
            raise RunError(
                f"{path}: line {index + 1} has no {', '.join(missing)}; it is not a line of a "
                "ledger"
            )

        if entry["previous"] != previous:
            raise RunError(
                f"{path}: line {index + 1} does not continue line {index}: it expects the hash "
                f"{str(entry['previous'])[:12] or 'of an empty ledger'}, found "
                f"{previous[:12] or 'none'}; line {index} was changed, or lines between them were "
                "removed"
            )

        if entry["seq"] != index:
            raise RunError(f"{path}: line {index + 1} says seq {entry['seq']}, expected {index}")

        previous = _sha256(line)

    return events


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
