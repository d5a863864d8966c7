"""Run ledger: append-only events, one fsynced JSON line each, chained by hash.

- A line carries `seq` (from 0), `time` (UTC), `event`, the event's facts, and `previous`: the
  sha256 of the previous line, as bytes without the newline.
- A changed, removed or reordered line breaks the chain and is named. The `check` in each line (see
  `line_check`) also finds damage in the last one.
- Neither detects that the end was cut off. For that, `ledger.head` and each checkpoint keep the
  `head` of the ledger (see `ledger_head`).
- The only repair concerns a last line without a newline, which a killed process leaves behind. It
  is moved to `ledger.torn`, never deleted, and reported in `repaired`. Any other break refuses the
  start, until a person restores the file or mends it (see `ledger_repair`).

Alternatives considered:
- A database: a text file can be read in twenty years, published with a release and diffed, and one
  write of one line is as atomic as a run needs.
"""

import hashlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from k2train.errors import RunError
from k2train.fault_injection import point
from k2train.record.event import Event
from k2train.record.events import E, Entry, Faults, Resumed, Started, of_kind, parse_entry
from k2train.record.jsonl import append_bytes, encode_line, parse_line, read_lines, truncate
from k2train.record.ledger_head import LedgerHead, remedy, write_head
from k2train.record.line_check import CHECK_KEY, checked_rows, with_check
from k2train.retry import exists_retried

REQUIRED = ("seq", "time", "event", "previous")


def fault_notes(entries: Iterable[Entry]) -> list[str]:
    """One line for every start of a run that had faults made on purpose; empty without any."""
    armed: dict[int, list[str]] = {}
    changed: dict[int, list[str]] = {}
    for event in of_kind(entries, Faults):
        if event.step is None:
            armed.setdefault(event.attempt, []).extend(event.faults)
        else:
            what = f"{', '.join(event.faults)} in step {event.step}"
            changed.setdefault(event.attempt, []).append(what)

    return [
        f"attempt {attempt} had faults on purpose: {'; '.join(armed.get(attempt, ['unknown']))}"
        + (f"; changed: {'; '.join(changed[attempt])}" if attempt in changed else "")
        for attempt in sorted({*armed, *changed})
    ]


def run_notes(entries: Iterable[Entry]) -> list[str]:
    """Say what a reader of a run must know: faults made on purpose, and bits that do not repeat."""
    read = list(entries)
    starts: list[Started | Resumed] = [*of_kind(read, Started), *of_kind(read, Resumed)]
    loose = [start.attempt for start in starts if start.deterministic is False]
    return fault_notes(read) + [
        f"attempt {attempt} computed with kernels.deterministic false: sums had no fixed order, so "
        "another run of the same record may differ by rounding, from the first step on"
        for attempt in sorted(loose)
    ]


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
        self._entries: list[Entry] = []

        if exists_retried(self.path):
            lines, rest = read_lines(self.path)
            self._entries = _verified(self.path, lines, rest)
            self._head = _sha256(lines[-1]) if lines else ""
            # Another process that writes here is found by this size.
            self._size_bytes = sum(len(line) + 1 for line in lines)
            if rest:
                self._move_aside(rest)

    @property
    def head(self) -> LedgerHead:
        """Number of events, and sha256 of the last line.

        Stored elsewhere, it proves that no line was cut off.
        """
        with self._lock:
            return LedgerHead(len(self._entries), self._head)

    @property
    def entries(self) -> list[Entry]:
        """All entries so far, oldest first."""
        with self._lock:
            return list(self._entries)

    def append(self, event: Event) -> Entry:
        """Write one event durably and return its entry as it can be read back.

        Raises RunError when another process has changed the file, and OSError on a disk error. The
        file is unchanged in both cases.
        """
        with self._lock:
            self._check_unchanged()
            number = len(self._entries)
            line = encode_entry(number, _now(), event, self._head)

            # Keep the event as a reader would get it, not the Python objects it was made from.
            # Read back before the write: what could not be read must not enter the chain.
            stored = parse_line(self.path, number + 1, line)
            del stored[CHECK_KEY]
            entry = _entry(self.path, number + 1, stored)

            point("ledger.append")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_bytes(self.path, line, sync=True)
            self._size_bytes += len(line)
            self._head = _sha256(line[:-1])
            self._entries.append(entry)
            # The event is durable. A head that is one event behind is no contradiction.
            with suppress(OSError):
                write_head(self.path, LedgerHead(len(self._entries), self._head))
            return entry

    def last(self, kind: type[E]) -> E | None:
        """Newest event of that class, or None."""
        found = of_kind(self.entries, kind)
        return found[-1] if found else None

    def _check_unchanged(self) -> None:
        try:
            size_bytes = self.path.stat().st_size
        except FileNotFoundError:
            size_bytes = 0
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
            f"killed); moved to {torn.name}, {len(self._entries)} events are intact"
        )


def read_ledger(path: str | Path) -> list[Entry]:
    """Read all entries, oldest first, and verify the chain.

    A torn last line is left out and the file is not changed. Raises RunError naming the first line
    that does not fit.
    """
    return read_chain(path)[0]


def read_chain(path: str | Path) -> tuple[list[Entry], list[str]]:
    """Read the same entries, and the sha256 of each line."""
    path = Path(path)
    lines, rest = read_lines(path)
    return _verified(path, lines, rest), [_sha256(line) for line in lines]


def encode_entry(seq: int, time: str, event: Event, previous: str) -> bytes:
    """Encode the line of an event, with its newline."""
    row = {"seq": seq, "time": time, **event.row(), "previous": previous}
    return with_check(encode_line(row))


def checked_entries(
    path: Path, lines: list[bytes], rest: bytes
) -> Iterator[tuple[int, Entry | RunError]]:
    """Yield (line number from 1, entry) for every line, the chain not verified.

    A damaged line yields a RunError naming file and line instead of an entry.
    """
    for number, row in checked_rows(path, lines, rest):
        try:
            yield number, row if isinstance(row, RunError) else _entry(path, number, row)
        except RunError as error:
            yield number, error


def _entry(path: Path, number: int, row: dict[str, Any]) -> Entry:
    """Parse a line's keys. Raises RunError naming file and line."""
    if missing := [name for name in REQUIRED if name not in row]:
        raise RunError(
            f"{path}: line {number} has no {', '.join(missing)}; it is not a line of a ledger"
        )
    try:
        return parse_entry(row)
    except ValueError as error:
        raise RunError(
            f"{path}: line {number} {error}: it was changed or damaged after it was written"
        ) from None


def _verified(path: Path, lines: list[bytes], rest: bytes) -> list[Entry]:
    entries: list[Entry] = []
    hashes: list[str] = []
    try:
        for _, entry in checked_entries(path, lines, rest):
            if isinstance(entry, RunError):
                raise entry
            entries.append(entry)

        for entry, line in zip(entries, lines, strict=True):
            if problem := chain_problem(path, entry, hashes):
                raise RunError(problem)
            hashes.append(_sha256(line))
    except RunError as error:
        raise RunError(f"{error}; {remedy(path)}") from None
    return entries


def chain_problem(path: Path, entry: Entry, hashes: Sequence[str]) -> str:
    """Describe why an entry does not continue the lines with these sha256; "" when it does."""
    index, previous = len(hashes), hashes[-1] if hashes else ""
    if entry.previous != previous:
        return (
            f"{path}: line {index + 1} does not continue line {index}: it expects the hash "
            f"{entry.previous[:12] or 'of an empty ledger'}, found {previous[:12] or 'none'}; line "
            f"{index} was changed, or lines between them were removed"
        )
    if entry.seq != index:
        return f"{path}: line {index + 1} says seq {entry.seq}, expected {index}"
    return ""


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
