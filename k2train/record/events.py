"""Typed events of the run ledger: one frozen dataclass for each event, written and read here alone.

- The fields of a class are the keys of its line, in their order on disk.
- An event or a key that this code does not know is kept: the ledger may be newer.
- A value of another type than its field is refused, so readers need no checks of their own.

Alternatives considered:
- Dictionaries: writer and readers then agree by the spelling of keys alone.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from k2train.record.change_events import Change as Change
from k2train.record.change_events import Outcome as Outcome
from k2train.record.event import EVENTS, WRITE_NULL, Event, UnknownEvent
from k2train.record.followed_events import CheckpointFollowed as CheckpointFollowed
from k2train.record.followed_events import ResumeDrilled as ResumeDrilled
from k2train.record.held_out import SetScore
from k2train.record.json_fields import field_value, field_values
from k2train.record.merge_events import CheckpointsMerged as CheckpointsMerged
from k2train.record.product_events import ProductsMeasured as ProductsMeasured
from k2train.record.rollback_events import Deferral, RolledBack
from k2train.record.spike_events import Spike as Spike


@dataclass(frozen=True, kw_only=True)
class Takeover:
    """Earlier holder of the run directory that did not release it."""

    token: int
    reason: str


class Starting(Event, name="starting"):
    """A start begins, before anything that can fail; 0, or the step it resumes from.

    `settings`: on an accelerator the environment variables of device and allocator.
    """

    attempt: int
    step: int
    settings: dict[str, Any] | None = None


class Started(Event, name="started"):
    """A run or stage begins at step 0.

    `deterministic`: whether its kernels give the same bits every time, as in `resumed`.
    """

    attempt: int
    run: str
    run_id: str
    world_size: int
    layout: str
    total_steps: int
    chunks: int
    parameters: int
    kernels: str
    deterministic: bool | None = None
    memory: str | None = None
    data_manifest_sha256: str
    data_content_sha256: str | None = None
    environment: dict[str, Any]
    config_sha256: str | None = None
    precision: str | None = None
    fencing_token: int | None = None
    taken_over_from: Takeover | None = field(default=None, metadata=WRITE_NULL)


class Resumed(Event, name="resumed"):
    """A run continues from a checkpoint of its own; everything after `step` is undone.

    Of the step after it, `rate_next` is the rate, and `rate_before` what the rate was to be by the
    config of the checkpoint, whose stage had `total_steps_before`.
    """

    attempt: int
    checkpoint: str
    requested: str | int | None = None
    step: int
    refused: tuple[str, ...]
    set_aside: tuple[str, ...]
    layout: str
    world_size: int
    kernels: str | None = None
    deterministic: bool | None = None
    memory: str | None = None
    config_changes: tuple[str, ...]
    allowed: tuple[str, ...] | None = None
    total_steps: int | None = None
    rate_last: float | None = None
    rate_next: float | None = None
    total_steps_before: int | None = None
    rate_before: float | None = None
    config_sha256: str | None = None
    fencing_token: int | None = None
    taken_over_from: Takeover | None = field(default=None, metadata=WRITE_NULL)


class Faults(Event, name="faults"):
    """Faults made on purpose: those armed for this start; with `step`, the values changed in it."""

    attempt: int
    step: int | None = None
    faults: tuple[str, ...]


class StageTransition(Event, name="seam"):
    """A stage starts from a checkpoint of another run.

    `rate_before` is the last rate there, `rate_after` that of the first step of `total_steps` here.
    `allowed` are changes of the model that were asked for by name. `added_specials` are special
    tokens of this stage behind those of the parent's tokenizer, which is the same but for them.
    """

    attempt: int
    parent: str
    parent_manifest_sha256: str | None = None
    parent_step: int
    parent_adam_steps: int
    parent_consumed_tokens: int
    tokenizer_sha256: str
    same_model: bool
    same_tokenizer: bool
    data_in_common: tuple[str, ...]
    sources_compared: bool
    data_compared: str | None = None
    rate_before: float | None
    rate_after: float
    moments_kept: bool
    total_steps: int | None = None
    parent_finished: bool | None = None
    parent_total_steps: int | None = None
    allowed: tuple[str, ...] | None = None
    added_specials: tuple[str, ...] | None = None


class ChunkStarted(Event, name="chunk_started"):
    """`step` is the first one that reads the chunk."""

    attempt: int
    chunk: str
    order_index: int
    step: int
    dropped_rows: int


class ChunkDeferred(Event, name="chunk_deferred"):
    """The order changes after `step`: a chunk not begun by then moves to a later `order_index`.

    Written before the first step that reads the new order. `data.order.apply_events` checks it.
    By hand with `why`, and what was expected of it.
    """

    attempt: int
    chunk: str
    step: int
    order_index: int
    why: str | None = None
    expect: str | None = None


class StepSkipped(Event, name="step_skipped"):
    """Loss or gradient were not finite, or too large: the update was not applied.

    `reason` is `outlier` where the spike policy left the step out.
    """

    attempt: int
    step: int
    chunk: str
    rows: tuple[int, int]
    loss: str
    grad_norm: str
    tensors: tuple[str, ...]
    in_a_row: int
    reason: str | None = None


class Straggler(Event, name="straggler"):
    """A rank became slow or recovered, as `told` on the console."""

    attempt: int
    step: int
    told: str


class CheckpointSaved(Event, name="checkpoint_saved"):
    """A checkpoint is whole; `recovered` if a later start recorded it for a killed one.

    `asked`: who asked for it, so that it is kept.
    """

    checkpoint: str
    attempt: int
    step: int
    chunks_consumed: int
    consumed_tokens: int
    loss: float | None
    held_out_loss: float | None
    held_out: tuple[SetScore, ...] | None = None
    bytes: int
    manifest_sha256: str
    seconds: float | None = None
    stalled_seconds: float | None = None
    recovered: bool | None = None
    asked: str | None = None


class SaveIntervalChosen(Event, name="save_interval"):
    """How often the run saves inside chunks, and why; without `seconds` at their ends only."""

    attempt: int
    step: int
    seconds: float | None = None
    first_seconds: float | None = None
    failures: int
    trained_seconds: float
    mtbf_seconds: float
    stall_seconds: float
    save_seconds: float


class CheckpointVerified(Event, name="checkpoint_verified"):
    """A checkpoint was read back intact."""

    attempt: int
    checkpoint: str


class CheckpointDamaged(Event, name="checkpoint_damaged"):
    """A checkpoint is no longer what was written."""

    attempt: int
    checkpoint: str
    problem: str


class CheckpointRemoved(Event, name="checkpoint_removed"):
    """A checkpoint inside a chunk was removed, since newer ones replace it."""

    attempt: int
    checkpoint: str
    reason: str


class Stopped(Event, name="stopped"):
    """The run ended before its last step, on request or with a problem."""

    attempt: int
    reason: str
    step: int
    problem: str | None = None


class Failed(Event, name="failed"):
    """A rank died or hung; without `step` if recorded by the next start."""

    attempt: int
    step: int | None = None
    problem: str


class Finished(Event, name="finished"):
    """All steps are done and recorded."""

    attempt: int
    step: int


class LedgerMended(Event, name="ledger_mended"):
    """The ledger was damaged here, and was mended by hand; what was there is in the file `kept`.

    `carried` events follow from behind the damage, with their times; `lost` lines could not be
    read. `accepted` has the heads (sha256) that checkpoints hold of lines which are no longer
    there.
    """

    problem: str
    reason: str
    kept: str | None
    kept_sha256: str | None
    carried: int
    lost: int
    accepted: tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """Line of the ledger: its event and its link in the chain."""

    seq: int
    time: str
    previous: str
    event: Event


def deferrals_of(event: Event) -> tuple[Deferral, ...]:
    """Return the chunks that an event moves in the order: none for most."""
    if isinstance(event, ChunkDeferred):
        return (Deferral(event.chunk, event.step, event.order_index),)
    if isinstance(event, RolledBack):
        return tuple(Deferral(c, event.step, event.order_index) for c in event.chunks)
    return ()


E = TypeVar("E", bound=Event)


def of_kind(entries: Iterable[Entry], kind: type[E]) -> list[E]:
    """Events of one class, oldest first."""
    return [entry.event for entry in entries if isinstance(entry.event, kind)]


def parse_entry(row: Mapping[str, Any]) -> Entry:
    """Return the entry of a line's keys, its check left out.

    Raises ValueError that says what is wrong with the line.
    """
    facts = dict(row)
    seq, time, previous, name = (
        field_value(kind, facts.pop(key), key)
        for key, kind in (("seq", int), ("time", str), ("previous", str), ("event", str))
    )
    kind = EVENTS.get(name)
    if kind is None:
        return Entry(seq, time, previous, UnknownEvent(unknown=name, extra=facts))

    known = {key.name for key in fields(kind)} - {"extra"}
    extra = {key: facts.pop(key) for key in [*facts] if key not in known}
    return Entry(seq, time, previous, kind(**field_values(kind, facts), extra=extra))
