"""Run metrics: one JSON line per step, kept for every attempt, never overwritten.

- A step repeated after a restart is a second row with a higher `attempt`. Both stay, so the steps
  before a crash remain visible. `latest` gives the curve without repeats.
- Each row is one write to the kernel, so kill -9 costs at most a part of the last line. Only `sync`
  reaches the disk. A power cut may cost rows; the ledger and the checkpoints are fsynced and do not
  depend on them.
- Each row carries a check (see `line_check`). A damaged row is reported and ends no run, because no
  part of a run depends on its metrics.
- A line with the key `held_out` is no step: see `held_out`. What reads steps passes it over.
- `state_roots.jsonl` has the same format, with other keys. A key is a field of the record, in the
  order of the file. Keys that a file lacks have defaults, and unknown ones are kept.

Alternatives considered:
- Overwriting the old rows, as dashboards do: it hides exactly the steps of interest.
"""

import math
import mmap
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from k2train.errors import RunError
from k2train.record.jsonl import NON_FINITE, append_bytes, encode_line, read_lines
from k2train.record.line_check import Row, checked_rows, repair_torn_tail, with_check
from k2train.retry import exists, exists_retried, retried, stat_retried

TAIL_BYTES = 65536
"""Longer than any line."""
POSITION = re.compile(rb'\{"step": (\d+), "attempt": (\d+)[,}]')
"""Beginning of a line."""
SCORES_KEY = "held_out"
"""Key of the lines that are no step."""
_SCORES = re.compile(rb'\{"step": \d+, "attempt": \d+, "held_out": ')


@dataclass(frozen=True)
class Record:
    """A line of a file with one line per step and attempt."""

    step: int
    attempt: int = 0
    other: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    """Keys that this version does not know."""

    def row(self) -> Row:
        """Return the keys and values of the line."""
        known = {key: getattr(self, key) for key in self.__dataclass_fields__ if key != "other"}
        return known | dict(self.other)

    @classmethod
    def of(cls, row: Row) -> Self:
        """Parse the keys and values of a line. Raises ValueError when they are not of a step."""
        if not isinstance(row.get("step"), int) or not isinstance(row.get("attempt", 0), int):
            raise ValueError("is not the record of a step")

        values: Row = {
            key: NON_FINITE.get(value, value) if isinstance(value, str) else value
            for key, value in row.items()
        }
        keys = cls.__dataclass_fields__
        other = {key: values.pop(key) for key in row if key not in keys or key == "other"}
        return cls(**values, other=other)

    @classmethod
    def is_of(cls, row: Row) -> bool:
        """Whether a line of the file is such a record."""
        return True


@dataclass(frozen=True)
class StepRecord(Record):
    """A line of `metrics.jsonl`: one step of one attempt."""

    chunk: str = ""
    consumed_tokens: int = 0
    """Tokens of this stage up to the end of the step."""
    loss: float = math.nan
    grad_norm: float = math.nan
    lr: float = math.nan
    rows: Sequence[int] = ()
    """First row of the chunk that the step read, and the one after the last."""
    ids: str | None = None
    """Hash of the ids that the model was fed (`data.fed_ids`); None in older files."""
    applied: bool = True
    tokens_per_second: float = math.nan
    mfu: float | None = None
    """Model FLOPs utilization: of the dense peak at the precision `mfu_peak`; None if unknown."""
    seconds: float = math.nan
    peak_memory_bytes: int = 0
    state_root: str | None = None
    """Root of the state after the step, in the steps that record one."""
    mfu_peak: str | None = None
    """Precision of the peak that `mfu` is of: bf16, fp8 or fp32. Older files: bf16."""
    update_norm: float | None = None
    """Norm of the applied update; None where `spikes.update_norm` is off."""
    subsets: Mapping[str, Sequence[float]] | None = None
    """Tokens and mean loss of the rows of each subset, with `audit.subset_losses`."""
    targets: int | None = None
    """Tokens of the step that were learned, which `loss` is the mean of; None: all that can be."""
    device: Mapping[str, float] | None = None
    """Use of rank 0's process and device: `cpu_cores` of the step, and of a GPU `utilization` (0 to
    1), `memory_bytes`, `power_watts` and `celsius` about once a second; None in older files."""

    def row(self) -> Row:
        found = super().row()
        for key in ("ids", "state_root", "mfu_peak", "update_norm", "subsets", "targets", "device"):
            if found[key] is None:
                del found[key]
        return found

    @classmethod
    def is_of(cls, row: Row) -> bool:
        return SCORES_KEY not in row


@dataclass(frozen=True)
class RootRecord(Record):
    """A line of `state_roots.jsonl`: root of the state after a step, digests of its tensors."""

    root: str = ""
    tensors: Mapping[str, str] = field(default_factory=dict)


R = TypeVar("R", bound=Record)


class MetricsWriter:
    """Appends metrics rows to the file at `path`.

    A torn last line of a killed process is cut off and reported in `repaired`. No file is created
    before the first row. Raises RunError when the file cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.repaired: str | None = None
        self._lock = threading.Lock()
        if exists_retried(self.path):
            self.repaired = retried(lambda: repair_torn_tail(self.path), self.path)

    def write(self, record: Record) -> None:
        """Append the row of one step. Raises OSError.

        Non-finite floats become "nan", "inf" and "-inf" in the file.
        """
        line = with_check(encode_line(record.row()))
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_bytes(self.path, line, sync=False)

    def sync(self) -> None:
        """Sync all rows written so far to the disk; called when a checkpoint is committed."""
        with self._lock:
            if exists(self.path):
                append_bytes(self.path, b"", sync=True)


def read_metrics(path: str | Path) -> list[StepRecord]:
    """Read all rows in the order written; a torn last line is left out.

    "nan", "inf" and "-inf" become floats again. Raises RunError when the file is missing or a line
    is damaged, naming it.
    """
    return list(_whole(checked_records(path, StepRecord)))


def read_roots(path: str | Path) -> list[RootRecord]:
    """Read `state_roots.jsonl`, as `read_metrics` does."""
    return list(_whole(checked_records(path, RootRecord)))


def checked_records(path: str | Path, kind: type[R]) -> Iterator[tuple[int, R | RunError]]:
    """Yield (line number from 1, record), or an error naming the line if it is damaged.

    Lines of another kind are left out. Raises RunError when the file is unreadable.
    """
    path = Path(path)
    for number, row in checked_rows(path, *read_lines(path)):
        if not isinstance(row, RunError) and not kind.is_of(row):
            continue
        try:
            yield number, row if isinstance(row, RunError) else kind.of(row)
        except ValueError as error:
            yield number, RunError(f"{path}: line {number} {error}")


def _whole(records: Iterable[tuple[int, R | RunError]]) -> Iterator[R]:
    for _, record in records:
        if isinstance(record, RunError):
            raise record
        yield record


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
    if not exists_retried(path):
        return 0
    rows = [
        row for _, row in checked_rows(path, *read_lines(path)) if not isinstance(row, RunError)
    ]
    return max(
        (attempt for row in rows if isinstance(attempt := row.get("attempt"), int)), default=0
    )


def latest(path: str | Path) -> list[StepRecord]:
    """Record of the highest attempt for each step, ordered by step: the curve without repeats.

    It also holds steps that only an earlier attempt has reached, with their `attempt`.
    """
    return _latest(read_metrics(path))


def latest_roots(path: str | Path) -> list[RootRecord]:
    """The same of `state_roots.jsonl`."""
    return _latest(read_roots(path))


def _latest(records: Iterable[R]) -> list[R]:
    best: dict[int, R] = {}
    for record in records:
        known = best.get(record.step)
        # A later attempt replaces the record of an earlier one.
        if known is None or record.attempt >= known.attempt:
            best[record.step] = record
    return [best[step] for step in sorted(best)]


def last_record(path: Path) -> StepRecord | None:
    """Read the last complete step, from the end of a possibly huge file; None without one.

    Raises RunError when its line is damaged.
    """
    line = next(step_lines_backwards(path), None)
    return None if line is None else _record(path, line)


def last_steps(path: Path, first_attempt: int) -> dict[int, int]:
    """Return attempt -> last step in the file, of `first_attempt` and later ones.

    Reads from the end, as far as these attempts reach. Damaged lines are left out.
    """
    found: dict[int, int] = {}
    for line in lines_backwards(path):
        match = POSITION.match(line)
        if match is None:
            continue
        step, attempt = int(match[1]), int(match[2])
        if attempt < first_attempt:
            break
        found.setdefault(attempt, step)
    return found


def last_step(path: Path) -> int:
    """Return the step of the last whole line, from the end of the file; 0 without one."""
    for line in lines_backwards(path):
        if (match := POSITION.match(line)) is not None:
            return int(match[1])
    return 0


def is_scores_line(line: bytes) -> bool:
    """Whether a line has the held-out losses after a step."""
    return _SCORES.match(line) is not None


def step_lines_backwards(path: Path) -> Iterator[bytes]:
    """Yield the whole lines of steps, the last one first; none without a file."""
    return (line for line in lines_backwards(path) if not is_scores_line(line))


def lines_backwards(path: Path, block_bytes: int = TAIL_BYTES) -> Iterator[bytes]:
    """Yield whole lines, the last one first; none without a file."""
    facts = stat_retried(path)
    at = 0 if facts is None else facts.st_size
    rest, torn = b"", True
    while at > 0:
        start = max(0, at - block_bytes)
        block = retried(partial(_read_at, path, start, at - start), path)
        first, *lines = (block + rest).split(b"\n")
        if torn and lines:
            # What follows the last newline was cut off by a kill.
            lines.pop()
            torn = False
        yield from reversed(lines)
        rest, at = first, start
    if not torn:
        yield rest


def _read_at(path: Path, start: int, length: int) -> bytes:
    with path.open("rb") as stream:
        stream.seek(start)
        return stream.read(length)


def records_of_step(path: Path, step: int) -> list[StepRecord]:
    """Read the lines of every attempt at a step, oldest first.

    Raises RunError when one is damaged.
    """
    facts = stat_retried(path)
    if facts is None or facts.st_size == 0:
        return []

    # Searched as bytes: parsing a hundred megabytes of lines takes seconds.
    found, start = [], b'{"step": %d,' % step
    with (
        path.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        at = content.find(start)
        while at >= 0:
            end = content.find(b"\n", at)
            if end < 0:
                break
            if not is_scores_line(line := content[at:end]):
                found.append(_record(path, line))
            at = content.find(start, end)
    return found


def _record(path: Path, line: bytes) -> StepRecord:
    """Parse one line whose number is not known."""
    ((_, row),) = checked_rows(path, [line])
    try:
        if isinstance(row, RunError):
            raise ValueError(str(row))
        return StepRecord.of(row)
    except ValueError:
        raise RunError(f"{path}: a line is damaged ({line[:60]!r}); restore the file") from None
