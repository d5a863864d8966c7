"""What a start means for the schedule: the next step, of how many, at which rate instead of which.

- A config key says what differs, not what follows from it. A longer order moves the rate of every
  step, so the rate is computed from both configs and told.
- Also whether the stage of a checkpoint was finished with it.

Alternatives considered:
- Comparing keys alone: a finished cosine that is extended jumps up fourfold without a word.
"""

from dataclasses import dataclass

from pydantic import ValidationError

from k2train.checkpoint.manifest import CheckpointManifest
from k2train.config.load import LrConfig
from k2train.data.manifest import Manifest
from k2train.data.order import ChunkOrder
from k2train.errors import ConfigError
from k2train.optim.lr_schedule import check_schedule, rate
from k2train.text import counted
from k2train.train.setup import Setup


@dataclass(frozen=True)
class ScheduleChange:
    """The schedule around the next step of a run that continues."""

    step: int
    """The next step."""
    total_steps: int
    rate_last: float | None
    """Rate of the last step; None if there was none."""
    rate_next: float | None
    """Rate of the next step; None if none is left."""
    total_steps_before: int | None = None
    """Steps of the stage as the checkpoint's config had it; None if not known."""
    rate_before: float | None = None
    """Rate that the next step had by the checkpoint's config; None if it had none."""

    def lines(self) -> list[str]:
        """Describe it for the console."""
        if self.rate_next is None:
            return []
        last = "" if self.rate_last is None else f" (the last was {self.rate_last:.4g})"
        found = [
            f"next is step {self.step} of {self.total_steps}, at rate {self.rate_next:.4g}{last}"
        ]
        if self.total_steps_before is None:
            return found

        if self.rate_before is None:
            found.append(
                f"the schedule changes: it ended with step {self.total_steps_before}, and goes on "
                f"at rate {self.rate_next:.4g}"
            )
        elif self.rate_before != self.rate_next:
            found.append(
                f"the schedule changes: step {self.step} was to have rate {self.rate_before:.4g} "
                f"of a stage of {self.total_steps_before} steps, and has {self.rate_next:.4g}"
            )
        return found


def schedule_change(
    before: CheckpointManifest, setup: Setup, manifest: Manifest, order: ChunkOrder
) -> ScheduleChange:
    """Compare the schedule of a run with that of the checkpoint `before`, which it continues."""
    step, old = before.step + 1, past_order(before, manifest)
    return ScheduleChange(
        step,
        order.total_steps,
        before.lr,
        setup.learning_rate(step, order.total_steps) if step <= order.total_steps else None,
        None if old is None else old.total_steps,
        None if old is None else _past_rate(before, old, step),
    )


def past_order(before: CheckpointManifest, manifest: Manifest | None) -> ChunkOrder | None:
    """Return the order of a checkpoint's stage; None if `manifest` does not have its chunks."""
    rows = {info.sha256: info.rows for info in manifest.chunks} if manifest else {}
    chunks = before.chunks.order
    if before.identity is None or not chunks or any(c.sha256 not in rows for c in chunks):
        return None
    return ChunkOrder(
        tuple(chunk.name for chunk in chunks),
        tuple(rows[chunk.sha256] for chunk in chunks),
        before.identity.batch.global_sequences,
    )


def _past_rate(before: CheckpointManifest, order: ChunkOrder, step: int) -> float | None:
    """Rate of a step by the checkpoint's config; None if it had none, or says nothing of it."""
    if step > order.total_steps:
        return None
    try:
        lr = LrConfig.model_validate(before.config.get("lr"))
        check_schedule(lr.kind, lr.warmup_steps, order.total_steps, lr.decay_steps)
    except (ValidationError, ConfigError):
        return None
    return rate(
        step, lr.kind, lr.peak, lr.final, lr.warmup_steps, order.total_steps, lr.decay_steps
    )


def is_finished(before: CheckpointManifest) -> bool:
    """Whether a checkpoint is the end of its stage: all chunks of its order are consumed."""
    return before.chunks.consumed >= len(before.chunks.order)


def progress_text(before: CheckpointManifest, order: ChunkOrder | None) -> str:
    """How far a stage had come: `step 6 of 16, 1 of 3 chunks consumed`."""
    of = "" if order is None else f" of {order.total_steps}"
    chunks = counted(len(before.chunks.order), "chunk")
    return f"step {before.step}{of}, {before.chunks.consumed} of {chunks} consumed"
