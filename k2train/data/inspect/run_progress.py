"""Progress of a run, from its ledger, metrics and checkpoints: order, steps done, steps skipped."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from k2train.data.manifest import Manifest
from k2train.data.order import ChunkOrder
from k2train.errors import DataError, RunError
from k2train.record.events import (
    CheckpointSaved,
    ChunkDeferred,
    ChunkStarted,
    Entry,
    Finished,
    Resumed,
    Started,
    StepSkipped,
    Stopped,
    deferrals_of,
)
from k2train.record.metrics import StepRecord
from k2train.record.rollback_events import RolledBack

TRAINED, SKIPPED, TO_COME = "trained", "skipped", "to come"
NEVER, HELD_OUT, LEFT_OUT = "never read", "held out", "not in the order"


@dataclass(frozen=True)
class History:
    """Progress of a run: its order, its last completed step, and the steps without an update."""

    order: ChunkOrder
    done_step: int
    skipped: frozenset[int] = frozenset()

    def state(self, step: int) -> str:
        """State of a step: `trained`, `skipped` (read, update not applied) or `to come`."""
        return TO_COME if step > self.done_step else SKIPPED if step in self.skipped else TRAINED

    def use(self, chunk: str, row: int, held_out: bool = False) -> tuple[int | None, str]:
        """Step that reads a row, and its state; no step for a row never trained on."""
        if held_out:
            return None, HELD_OUT
        if chunk not in self.order.names:
            return None, LEFT_OUT

        index = self.order.names.index(chunk)
        step_in_chunk = row // self.order.global_sequences
        if step_in_chunk >= self.order.steps_in(index):
            return None, NEVER

        step = self.order.first_step(index) + step_in_chunk
        return step, self.state(step)


@dataclass(frozen=True)
class RecordedCheckpoint:
    """What a checkpoint's manifest says of the data; `order` has (name, sha256) of its chunks."""

    name: str
    step: int
    consumed_tokens: int
    config: Mapping[str, Any]
    manifest_sha256: str | None
    order: Sequence[tuple[str, str]]
    content_sha256: str | None = None


def order_of_checkpoint(
    manifest: Manifest, order: Sequence[tuple[str, str]], global_sequences: int
) -> ChunkOrder:
    """Rebuild the order kept in a checkpoint over these chunks.

    Raises DataError when a chunk is not the one that the checkpoint names.
    """
    names, rows = [], []
    for name, sha256 in order:
        info = manifest.chunk(name)
        if info.sha256 != sha256:
            raise DataError(
                f"{manifest.path}: {info.name} is not the chunk of that run: its sha256 is "
                f"{info.sha256[:12]}, the checkpoint names {sha256[:12]}; give the "
                "data folder of the run"
            )
        names.append(info.name)
        rows.append(info.rows)
    return ChunkOrder(tuple(names), tuple(rows), global_sequences)


def check_started(order: ChunkOrder, entries: Sequence[Entry], where: str) -> None:
    """Compare the order with the chunks that the ledger says were started.

    Raises RunError at the first difference.
    """
    # Chunks started before a deferral may have had another position.
    deferrals = [i for i, entry in enumerate(entries) if deferrals_of(entry.event)]

    for entry in entries[deferrals[-1] + 1 if deferrals else 0 :]:
        event = entry.event
        if not isinstance(event, ChunkStarted):
            continue
        index, recorded = event.order_index, f"{event.chunk} from step {event.step}"
        known = index < len(order.names)
        expected = (
            f"{order.names[index]} from step {order.first_step(index)}" if known else "nothing"
        )
        if recorded != expected:
            raise RunError(
                f"{where}: line {entry.seq + 1} says that position {index} of the order was "
                f"{recorded}, config and data say {expected}: one of them no longer belongs to "
                "this run"
            )


def steps_done(entries: Iterable[Entry], newest: StepRecord | None) -> int:
    """Last completed step of the newest attempt: its start undid everything after it."""
    done = attempt = 0
    for event in (entry.event for entry in entries):
        if isinstance(event, Started | Resumed):
            attempt = event.attempt
            done = event.step if isinstance(event, Resumed) else 0
        elif isinstance(event, ChunkDeferred | RolledBack):
            # Later steps, and the metrics of the attempt that did them, belong to the order before.
            done, attempt = min(done, event.step), event.attempt + 1
        elif isinstance(event, ChunkStarted):
            # The steps before the first one of a chunk are done.
            done = max(done, event.step - 1)
        elif isinstance(event, StepSkipped | Stopped | Finished) or (
            isinstance(event, CheckpointSaved) and not event.recovered
        ):
            done = max(done, event.step)

    # Metrics are newer than the last event of the ledger.
    if newest is not None and newest.attempt >= attempt:
        done = max(done, newest.step)

    return done


def steps_skipped(entries: Iterable[Entry]) -> frozenset[int]:
    """Steps that were read but not applied, without those undone by going back."""
    skipped: set[int] = set()
    for event in (entry.event for entry in entries):
        if isinstance(event, StepSkipped):
            skipped.add(event.step)
        elif isinstance(event, Started | Resumed | ChunkDeferred | RolledBack):
            back_to = 0 if isinstance(event, Started) else event.step
            skipped = {step for step in skipped if step <= back_to}
    return frozenset(skipped)
