"""Start point: the checkpoints that a run may continue from, best first.

- Decided by `run.resume` from the run directory alone, before torch is imported.
- A checkpoint that cannot be read, or contradicts itself, is passed over, with the reason why.
- Manifests are read up to the first good one. The ranks read the older ones only when the files of
  the newer ones are damaged: a manifest of a large run takes seconds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2train.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    checkpoint_name,
    checkpoint_order,
    is_thinned,
    list_checkpoints,
    read_manifest,
)
from k2train.checkpoint.moments import why_without_moments
from k2train.checkpoint.verify import has_bad_block
from k2train.config.load import Config
from k2train.data.order import ChunkOrder
from k2train.errors import CheckpointError, RunError, UnavailableError
from k2train.record.changes import unfinished_deferral
from k2train.record.events import Entry, Resumed, Started
from k2train.retry import exists_retried
from k2train.train.resume_check import same_position
from k2train.train.spike_history import unfinished_return
from k2train.train.state import TrainState


def is_unscored_end(manifest: CheckpointManifest) -> bool:
    """Whether a checkpoint is the end of a chunk whose held-out loss is still to be computed.

    It is named like one inside that chunk. The start that scores it saves it under its number.
    """
    return checkpoint_order(manifest.name)[0] < manifest.chunks.consumed


@dataclass(frozen=True)
class ResumeCheck:
    """Whether this run can continue from a checkpoint, given its manifest alone.

    `identity` is that of this run, `order` its data, `step_tokens` the tokens of a step.
    """

    identity: Mapping[str, Any]
    order: ChunkOrder
    step_tokens: int

    def __call__(self, path: Path, manifest: CheckpointManifest) -> None:
        """Raise CheckpointError when the run cannot continue from there."""
        if manifest.merged is not None:
            raise CheckpointError(
                f"{path} {why_without_moments(path, manifest)}, without moments: it can start "
                "another run (run.init_from), not continue one"
            )
        if manifest.identity is None:
            raise CheckpointError(
                f"{path / MANIFEST}: identity is missing, the run cannot continue from there"
            )
        try:
            TrainState.of(manifest)
        except CheckpointError as error:
            raise CheckpointError(f"{path / MANIFEST}: {error}") from None

        # Of another run every number may differ: `check_same_run` says in what.
        if same_position(manifest, self.identity) and (problem := self._position(manifest)):
            raise CheckpointError(
                f"{path / MANIFEST}: {problem}; it was changed, although its hash is right"
            )

    def _position(self, manifest: CheckpointManifest) -> str:
        """Say which number does not follow from the step; "" if all do."""
        step, order, chunks = manifest.step, self.order, manifest.chunks
        if step > order.total_steps:
            return f"step ({step}) is beyond the last one of the stage ({order.total_steps})"

        consumed = order.consumed_chunks(step)
        within = 0
        if consumed < len(order.names):
            within = step - (order.first_step(consumed) - 1)
        if (chunks.consumed, chunks.step_in_chunk) != (consumed, within):
            return (
                f"chunks.consumed and step_in_chunk are {chunks.consumed} and "
                f"{chunks.step_in_chunk}, step {step} is at {consumed} and {within}"
            )

        if manifest.consumed_tokens != step * self.step_tokens:
            return (
                f"consumed_tokens ({manifest.consumed_tokens}) is not step ({step}) times the "
                f"{self.step_tokens} tokens of a step"
            )
        names = [checkpoint_name(consumed), checkpoint_name(consumed, step)]
        if not within and consumed:
            names.append(checkpoint_name(consumed - 1, step))
        if manifest.name not in names:
            return f"name ({manifest.name}) is not that of step {step}"
        return ""


def wanted_checkpoints(
    config: Config, directory: Path, entries: Sequence[Entry], check: ResumeCheck
) -> tuple[list[Path], list[str]]:
    """Return the checkpoints to try, best first, and why newer ones were refused.

    The manifest of the first one passed `check`; those of the others were not read. Returns none
    for a fresh start.
    """
    folder, resume = directory / "checkpoints", config.run.resume
    found = list_checkpoints(folder)
    if (back := unfinished_return(entries)) is not None:
        # Later ones are of the branch that the run has left.
        newest = checkpoint_order(back.checkpoint)
        found = [path for path in found if checkpoint_order(path.name) <= newest]
    if (step := unfinished_deferral(entries)) is not None:
        # Later ones may have begun the chunk that a person has deferred.
        order = check.order
        consumed = order.consumed_chunks(step)
        inside = step > 0 and not order.is_chunk_end(step)
        newest = (consumed, step if inside else 0)
        found = [path for path in found if checkpoint_order(path.name) <= newest]
    if resume == "never":
        if found or exists_retried(directory / "ledger.jsonl"):
            raise RunError(
                f"run.resume is never, but {directory} holds a run; "
                "choose another run.name or run.resume=auto"
            )
        return [], []

    if isinstance(resume, int) and not _already_resumed_from(entries, resume):
        named = [path for path in found if path.name == f"ckpt_{resume:03d}"]
        usable, refused = _from_first_good(named, check)
        if not usable:
            others = ", ".join(path.name for path in found if path not in named) or "none"
            why = f"; refused: {refused[0]}" if refused else ""
            raise CheckpointError(
                f"run.resume asks for ckpt_{resume:03d}, {folder} has: {others}{why}"
            )
        return usable, refused

    # A thinned checkpoint holds weights only and cannot be resumed.
    whole = [path for path in reversed(found) if not is_thinned(path)]
    usable, refused = _from_first_good(whole, check)
    if (not found and resume == "must") or (refused and not usable):
        why = f"; refused: {'; '.join(refused)}" if refused else ""
        raise CheckpointError(
            f"run.resume is {resume}, but there is no checkpoint to continue from in "
            f"{folder}{why}; choose another run.name to start anew"
        )

    if found and not usable:
        last = found[-1]
        raise CheckpointError(
            f"{last} {why_without_moments(last, read_manifest(last))}, and none before it has "
            "moments: they can start another run (run.init_from), not continue this one"
        )
    return usable, refused


def _from_first_good(paths: Sequence[Path], check: ResumeCheck) -> tuple[list[Path], list[str]]:
    """Return the paths from the first with a good manifest on, and the problems of those before."""
    refused: list[str] = []
    for number, path in enumerate(paths):
        try:
            check(path, read_manifest(path))
        except CheckpointError as error:
            refused.append(str(error))
        except UnavailableError as error:
            if not has_bad_block(error, path):
                raise
            refused.append(str(error))
        else:
            return list(paths[number:]), refused
    return [], refused


def _already_resumed_from(entries: Sequence[Entry], number: int) -> bool:
    """Return whether the last start already resumed from this checkpoint number.

    The same command started again then continues the run, instead of going back once more.
    """
    events = [entry.event for entry in entries]
    starts = [event for event in events if isinstance(event, Started | Resumed)]
    return bool(starts) and isinstance(starts[-1], Resumed) and starts[-1].requested == number
