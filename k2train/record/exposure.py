"""Exposure of a run: tokens and mean loss by chunk and subset, summed up from its metrics.

- Counted are the steps of the run as it is now: of a step that was done twice the last one, and
  none that a later start undid. Skipped steps were read, but not learned from: they are left out.
- Losses by subset are there for steps with `audit.subset_losses`; the others count as a whole.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from k2train.record.jsonl import NON_FINITE
from k2train.record.metrics import StepRecord, last_record, latest
from k2train.text import number, table

ALL = "all"
"""In place of a subset's name: every token of the steps."""
HEADINGS = ("chunk", "subset", "steps", "tokens", "mean loss", "first loss", "last loss")


@dataclass(frozen=True)
class Exposure:
    """What a run read of one subset in one chunk."""

    chunk: str
    subset: str
    steps: int
    tokens: int
    loss: float
    """Mean over the tokens."""
    first_loss: float
    last_loss: float


def kept_records(path: Path) -> list[StepRecord]:
    """Records of the steps that count: applied, and not undone. Raises RunError."""
    last = last_record(path)
    if last is None:
        return []
    return [record for record in latest(path) if record.applied and record.step <= last.step]


def exposures(records: Iterable[StepRecord]) -> list[Exposure]:
    """Sum up records by chunk and subset, in the order in which they were read."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    before = 0
    for record in records:
        tokens = max(0, record.consumed_tokens - before)
        before = record.consumed_tokens
        parts = {ALL: (tokens, record.loss), **_parts(record.subsets or {})}
        for name, part in parts.items():
            found.setdefault((record.chunk, name), []).append(part)
    return [_summed(chunk, subset, parts) for (chunk, subset), parts in found.items()]


def exposure_lines(records: Sequence[StepRecord]) -> list[str]:
    """Render the exposures, and those of the whole run, as a table."""
    found = exposures(records)
    if not found:
        return ["no step yet"]
    whole = exposures([_without_chunk(record) for record in records])
    return table(HEADINGS, [_cells(one) for one in (*found, *whole)], ("chunk", "subset"))


def _parts(subsets: Mapping[str, Sequence[float | str]]) -> dict[str, tuple[float, float]]:
    # A loss that is not finite is a word in the file.
    return {
        name: (float(tokens), NON_FINITE[loss] if isinstance(loss, str) else float(loss))
        for name, (tokens, loss) in subsets.items()
    }


def _without_chunk(record: StepRecord) -> StepRecord:
    row = {**record.row(), "chunk": "all chunks"}
    return StepRecord.of(row)


def _summed(chunk: str, subset: str, parts: Sequence[tuple[float, float]]) -> Exposure:
    tokens = sum(count for count, _ in parts)
    total = sum(count * loss for count, loss in parts)
    loss = total / tokens if tokens else math.nan
    return Exposure(chunk, subset, len(parts), int(tokens), loss, parts[0][1], parts[-1][1])


def _cells(one: Exposure) -> list[str]:
    losses = [number(loss, 4) for loss in (one.loss, one.first_loss, one.last_loss)]
    return [one.chunk, one.subset, number(one.steps), number(one.tokens), *losses]
