"""Ledger events of alarms: a step done again, a return to an earlier checkpoint, kept branches.

- A return is one line. Replaying it gives the order of the chunks, so a kill after it changes
  nothing: the next start follows it.
- `deferrals_of` is the order's view of a line: what moves, for `chunk_deferred` and `rolled_back`.

Alternatives considered:
- A `chunk_deferred` line behind `rolled_back`: a kill between the two would leave half a decision.
"""

from dataclasses import dataclass

from k2train.record.event import Event


class StepRechecked(Event, name="step_rechecked"):
    """A step that raised an alarm was computed again from the same state and batch.

    - `same`: both gave the same bits, so data or state are the cause.
    - `ranks` found another result of their own. `losses` and `grad_norms` are those of each pass;
      `applied` is the number of the pass that counts, from 1; None where no two were equal.
    """

    attempt: int
    step: int
    chunk: str
    same: bool
    ranks: tuple[int, ...]
    losses: tuple[str, ...]
    grad_norms: tuple[str, ...]
    tensors: tuple[str, ...]
    applied: int | None = None


class RolledBack(Event, name="rolled_back"):
    """The run returns to `checkpoint`, of `step`, because of the spike that began at `onset`.

    - `number` names the folder `spikes/spike_NUMBER`, with the branch up to `from_step`.
    - `chunks` move one after another to position `order_index`, the end of the order as it is now:
      none after a bad restart.
    - `hit` counts the returns in this region of the run. The hashes are of the names in order.
    """

    attempt: int
    number: int
    verdict: str
    onset: int
    from_step: int
    checkpoint: str
    step: int
    chunks: tuple[str, ...]
    order_index: int
    hit: int
    order_before: str
    order_after: str
    branch: str | None = None


class SpikeCheckpoint(Event, name="spike_checkpoint"):
    """A checkpoint was kept beside a spike: its `branch`, or the `twin` of the good run."""

    attempt: int
    number: int
    kind: str
    checkpoint: str
    step: int
    manifest_sha256: str


@dataclass(frozen=True)
class Deferral:
    """A chunk not begun after `step` moves to the later position `order_index`."""

    chunk: str
    step: int
    order_index: int
