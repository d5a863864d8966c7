"""Return of a run to the newest verified checkpoint before a spike, with the chunk deferred.

- The intention is one line of the ledger, `rolled_back`, and is on disk before anything changes.
  The run then starts anew from that checkpoint, in the same process, as a later start would: it
  loads, moves later checkpoints aside, and reads the new order. A kill anywhere leads there, too.
- The checkpoint is the newest one that all ranks find whole, content included, and at which the
  chunk of the onset had not begun. That chunk moves to the end of the order.
- A second hit in the region goes one checkpoint further back, and defers the chunks from there on.
  A third one stops the run. A chunk is deferred once.
- After a bad restart no chunk moves: the checkpoint is read anew, and if the spike comes again,
  the run stops.

Alternatives considered:
- Restoring weights, moments, guards and data position in the running objects: each new item of the
  state would need a second way back, and one that is forgotten shows only later.
- The newest checkpoint before the onset, inside the chunk: the chunk could not be deferred.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from pydantic import TypeAdapter

from k2train import fault_injection
from k2train.checkpoint.load import agree_on_checkpoint
from k2train.checkpoint.manifest import (
    CheckpointManifest,
    checkpoint_order,
    is_thinned,
    list_checkpoints,
    read_manifest,
)
from k2train.checkpoint.writer import SaveError
from k2train.data.order import ChunkOrder
from k2train.guard.reaction import Return
from k2train.guard.spikes import RESTART_STEPS
from k2train.parallel.agreement import Agreement
from k2train.parallel.messages import FLAG, TEXTS
from k2train.record.events import Entry, deferrals_of
from k2train.record.rollback_events import RolledBack
from k2train.text import counted
from k2train.train.checkpointing import CheckpointManager
from k2train.train.preflight import Start
from k2train.train.resume_check import identity_of
from k2train.train.run_end import RECORD_REFUSED
from k2train.train.shutdown import OpenRun
from k2train.train.spike_checkpoints import BRANCH, copy_rows, keep_checkpoint
from k2train.train.spike_history import last_hit
from k2train.train.spike_names import spike_folder

MOST_HITS = 2
"""Returns in one region; the next spike there stops the run."""
_NUMBER = TypeAdapter(int)
AGREE = "agree on a return"


@dataclass(frozen=True)
class Target:
    """How far a return goes, and what it defers."""

    hit: int
    newest: tuple[int, int]
    """Chunks consumed and step inside the next one, as in the names of checkpoints: at most."""
    chunks: tuple[str, ...]
    """Chunks to defer, which none of these checkpoints has begun."""
    between_chunks: bool
    """Whether only checkpoints at the end of a chunk count."""


class GivenUpError(Exception):
    """The run cannot go back; the text says why. Raised on every rank alike."""


def target_of(start: Start, to_return: Return, first_step: int) -> Target:
    """Decide how far to go back. `first_step` is the first one of this attempt.

    Raises GivenUpError when the bounds of the policy are reached.
    """
    order, returns, onset = start.order, start.returns, to_return.onset
    if to_return.verdict == "restart":
        # The run may have been stopped and started since: what is behind the onset is bad, too.
        began, last = min(first_step, onset) - 1, returns[-1] if returns else None
        near = last is not None and last.step <= began <= last.step + RESTART_STEPS
        if last is not None and near and last.verdict == "restart":
            raise GivenUpError(
                f"the restart from {last.checkpoint} was repeated, and jumps again at step "
                f"{onset}: that checkpoint does not hold the state the run had (moments, step "
                "count or master weights); no data is blamed; go back to an earlier one"
            )
        return Target(1, _name_order(order, began), (), between_chunks=False)

    index = order.position(onset).order_index
    before = last_hit(returns, onset)
    hit = 1 if before is None else before.hit + 1
    if hit > MOST_HITS:
        raise GivenUpError(
            f"the spike at step {onset} is the {hit}rd in this region: deferring "
            f"{counted(sum(len(event.chunks) for event in returns), 'chunk')} did not help, so "
            "data alone is not the cause; go back further, or change the rate"
        )
    if index - (hit - 1) < 0:
        raise GivenUpError(f"the spike at step {onset} leaves no checkpoint further back")

    deferred = {move.chunk for entry in start.moves for move in deferrals_of(entry.event)}
    if (name := order.names[index]) in deferred:
        raise GivenUpError(
            f"{name} was deferred before, and the run spikes at its step {onset} again: the chunk "
            "is bad for this state, too; look at its rows"
        )
    if index == len(order.names) - 1:
        raise GivenUpError(
            f"the spike at step {onset} is in {name}, the last chunk of the order, which cannot be "
            "deferred: everything before it is trained"
        )
    # Inside the chunk before, a save is newer than the chunk's begin, and may serve a first hit.
    first = index - (hit - 1)
    newest = _name_order(order, order.first_step(first) - 1)
    return Target(hit, newest, order.names[first : index + 1], between_chunks=hit > 1)


def _name_order(order: ChunkOrder, step: int) -> tuple[int, int]:
    """What sorts a checkpoint of `step` by its name."""
    consumed = order.consumed_chunks(step)
    ends = step == 0 or order.is_chunk_end(step)
    return consumed, 0 if ends else step


class Rollback:
    """Takes one rank of a run back; every method is collective."""

    def __init__(self, start: Start, run: OpenRun, checkpoints: CheckpointManager):
        self.start, self.opened, self.checkpoints = start, run, checkpoints
        self.logger, self.agreement = run.logger, Agreement(run.grid)

    def go_back(self, to_return: Return, first_step: int) -> Start:
        """Keep the branch, record the return, and say how the run goes on.

        Raises GivenUpError when it cannot go back, SaveError when the disk refuses the record.
        """
        state, start = self.opened.state, self.start
        number = self.agreement.from_first(
            self.logger.spike_number(to_return.onset), _NUMBER, AGREE
        )
        branch = None
        if to_return.verdict == "malignant":
            branch = keep_checkpoint(self.checkpoints, state, number, BRANCH)
        fault_injection.point("rollback.kept")

        target = target_of(start, to_return, first_step)
        path, manifest, older = self._verified(target)
        if branch is not None and self.opened.grid.rank == 0:
            folder = spike_folder(start.directory, number) / BRANCH
            copy_rows(start.directory / "metrics.jsonl", folder, manifest.step, state.step)

        order, last = start.order, len(start.order.names) - 1
        for name in target.chunks:
            order = order.deferred(order.names.index(name), last)
        event = RolledBack(
            attempt=self.logger.attempt,
            number=number,
            verdict=to_return.verdict,
            onset=to_return.onset,
            from_step=state.step,
            checkpoint=path.name,
            step=manifest.step,
            chunks=target.chunks,
            order_index=last,
            hit=target.hit,
            order_before=order_sha256(start.order),
            order_after=order_sha256(order),
            branch=branch,
        )
        return self._recorded(event, order, [path, *older])

    def _verified(self, target: Target) -> tuple[Path, CheckpointManifest, list[Path]]:
        """Return the newest checkpoint of a target that is whole, and the older ones."""
        monitor, start = self.opened.monitor, self.start
        monitor.phase("choose", self.opened.state.step)
        # A save that a step waits for is over by now.
        found = [
            path
            for path in reversed(list_checkpoints(start.checkpoints))
            if checkpoint_order(path.name) <= target.newest
            and not is_thinned(path)
            and not (target.between_chunks and checkpoint_order(path.name)[1])
        ]
        names = self.agreement.from_first([str(path) for path in found], TEXTS, AGREE)
        paths = [Path(name) for name in names]
        chosen, problems = agree_on_checkpoint(
            paths, self.opened.grid, start.resume_check, monitor.watchdog.progress
        )
        for problem in problems:
            self.logger.info(f"refused: {problem}")
        if chosen is None:
            raise GivenUpError(
                f"no checkpoint before the spike is whole ({'; '.join(problems[:2]) or 'none'})"
            )
        return chosen, read_manifest(chosen), paths[paths.index(chosen) + 1 :]

    def _recorded(self, event: RolledBack, order: ChunkOrder, candidates: Sequence[Path]) -> Start:
        """Write the return, and build the start that follows it."""
        start, logger = self.start, self.logger
        logger.event(event)
        if not self.agreement.from_first(logger.all_written(), FLAG, AGREE):
            raise SaveError(logger.problem or RECORD_REFUSED)
        fault_injection.point("rollback.written")

        head = logger.ledger_head
        line = self.agreement.from_first(0 if head is None else head.events - 1, _NUMBER, AGREE)
        moved = f"; {', '.join(event.chunks)} moved to the end of the order" if event.chunks else ""
        logger.info(
            f"spike {event.number}, {event.verdict} since step {event.onset}: back from step "
            f"{event.from_step} to {event.checkpoint}, step {event.step}{moved}"
        )
        return replace(
            start,
            order=order,
            identity=identity_of(start.setup.config, start.manifest, order),
            candidates=tuple(candidates),
            refused=(),
            allowed=(),
            parent=None,
            transition=None,
            warning="",
            moves=(*start.moves, Entry(line, "", "", event)),
        )


def order_sha256(order: ChunkOrder) -> str:
    """Hash of the names of an order."""
    return sha256(" ".join(order.names).encode()).hexdigest()
