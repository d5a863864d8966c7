"""Hand-made records of runs: a ledger with chosen times, metrics and scores, without training."""

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

from k2train.record.event import Event
from k2train.record.held_out import HeldOutRecord
from k2train.record.jsonl import encode_line
from k2train.record.ledger import encode_entry
from k2train.record.line_check import with_check
from k2train.record.metrics import Record, StepRecord

BEGAN = datetime(2026, 3, 1, 12, tzinfo=UTC)


def write_ledger(directory: Path, events: Iterable[tuple[float, Event]]) -> Path:
    """Write a ledger of events, each so many seconds after `BEGAN`."""
    directory.mkdir(parents=True, exist_ok=True)
    previous, lines = "", []
    for seq, (seconds, event) in enumerate(events):
        time = (BEGAN + timedelta(seconds=seconds)).isoformat(timespec="milliseconds")
        line = encode_entry(seq, time.replace("+00:00", "Z"), event, previous)
        previous = sha256(line.rstrip(b"\n")).hexdigest()
        lines.append(line)
    (directory / "ledger.jsonl").write_bytes(b"".join(lines))
    return directory


def write_records(
    directory: Path, records: Sequence[StepRecord], scores: Sequence[HeldOutRecord] = ()
) -> None:
    """Write the metrics and the held-out scores of a run."""
    for name, rows in (("metrics.jsonl", records), ("held_out.jsonl", scores)):
        (directory / name).write_bytes(b"".join(map(_line, rows)))


def step_rows(path: Path) -> list[dict[str, Any]]:
    """Lines of the steps in a `metrics.jsonl`, as JSON has them."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [row for row in rows if "held_out" not in row]


def _line(record: Record) -> bytes:
    return with_check(encode_line(record.row()))


def step(number: int, attempt: int = 1, loss: float = 2.0, seconds: float = 1.0) -> StepRecord:
    """A step of 100 tokens."""
    return StepRecord(
        number,
        attempt,
        chunk="chunk_000",
        consumed_tokens=100 * number,
        loss=loss,
        grad_norm=0.5,
        lr=1e-3,
        rows=[number, number + 1],
        tokens_per_second=100 / seconds,
        seconds=seconds,
        peak_memory_bytes=2**30,
    )
