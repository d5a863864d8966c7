"""Drill table: each item of the state left out of a copy of a checkpoint, and what finds it."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from k2train.checkpoint.manifest import read_manifest
from k2train.checkpoint.verify import verify_checkpoint
from k2train.errors import CheckpointError
from k2train.replay.compare import training_state_differences
from k2train.replay.drill import drill_from
from k2train.replay.leave_out import NOTHING, items, write_without
from k2train.replay.replay import Replay
from k2train.train.state import TrainState

__all__ = ["NOTHING", "Row", "rows", "table"]


class Row(NamedTuple):
    """An item that was left out, and what found it; "" for nothing."""

    item: str
    step: int
    """First of the steps after the checkpoint that differs, from 1; 0 for none."""
    what: str
    record: str
    """What of the training state differs from the record, where no step does."""


def rows(replaying: Replay, number: int) -> Iterator[Row]:
    """Leave out every item of checkpoint `number` and drill what is left; collective."""
    source = replaying.run.checkpoint(number)
    known = TrainState.of(read_manifest(source))
    for item in items():
        session, _ = replaying.session_after(source, known.step + 1)
        with TemporaryDirectory(prefix="k2train-drill-") as folder:
            path = write_without(session, source, Path(folder), item)
            verify_checkpoint(path)
            try:
                differs = training_state_differences(known, TrainState.of(read_manifest(path)))
                found = drill_from(replaying, path, source)
            except CheckpointError as error:
                yield Row(item.name, 0, "", f"refused: {str(error).partition(': ')[2]}")
                continue
        step = found.done if found.difference else 0
        what = found.difference.partition(": ")[2].rpartition(": ")[0]
        yield Row(item.name, step, what, ", ".join(differs))


def table(found: list[Row]) -> list[str]:
    """Return the rows as a table in Markdown."""
    lines = ["| left out | found at | what differs |", "|---|---|---|"]
    for row in found:
        where = f"step {row.step} after it" if row.step else "no step"
        what = row.what
        if not row.step:
            where = "the training state" if row.record else "nowhere"
            what = row.record or "equal"
        lines.append(f"| {row.item} | {where} | {what} |")
    return lines
