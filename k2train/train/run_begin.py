"""Begin of a run: from a checkpoint of its own, from another run's, or from initial weights.

- `resume` loads the chosen checkpoint, or the newest whole one before it, and moves later ones
  aside: they belong to a continuation that is given up.
- `begin` starts a stage at step 0, and saves that state as `ckpt_000`.

Alternatives considered:
- Methods of the trainer: the loop would be hard to find among them.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from k2train.checkpoint.manifest import checkpoint_name, list_checkpoints
from k2train.checkpoint.moments import why_without_moments
from k2train.checkpoint.writer import set_aside_later
from k2train.guard.spikes import RESTART_STEPS
from k2train.parallel.agreement import Agreement
from k2train.parallel.messages import FLAG
from k2train.train.checkpointing import CheckpointManager
from k2train.train.choose import Chosen
from k2train.train.engine import Engine
from k2train.train.evaluation import Evaluation
from k2train.train.preflight import Start
from k2train.train.shutdown import OpenRun
from k2train.train.start_point import is_unscored_end
from k2train.train.start_record import (
    log_resumed,
    log_stage_transition,
    log_started,
    log_transition,
)
from k2train.train.state import TrainState


class Resumed(NamedTuple):
    """Where a run goes on."""

    first_step: int
    owes_score: bool
    """Whether the checkpoint is the end of a chunk, without the score it is to have."""


def resume(
    run: OpenRun,
    start: Start,
    engine: Engine,
    checkpoints: CheckpointManager,
    chosen: Chosen,
    path: Path,
) -> Resumed:
    """Load the checkpoint at `path`, or the newest before it that is whole; collective."""
    chosen, path, manifest = checkpoints.load_newest(chosen, path)
    checkpoints.writer.mark_loaded(path)
    run.state = TrainState.of(manifest)
    first_step = run.state.step + 1
    if not _explained(run, start):
        run.state.guard.spikes.attempt_began(first_step)

    # Later checkpoints belong to a continuation that is given up.
    logger = run.logger
    set_aside = set_aside_later(path, logger.attempt) if engine.grid.rank == 0 else []
    logger.recover(list_checkpoints(start.checkpoints))
    log_resumed(logger, start, engine, chosen, set_aside)
    return Resumed(first_step, is_unscored_end(manifest))


def _explained(run: OpenRun, start: Start) -> bool:
    """Whether a spike in the first steps would be no fault of this restart; collective.

    The run went back here because of data, and the ladder of returns counts on. Or an earlier start
    met the spike too, further from its own begin.
    """
    returns, step = start.returns, run.state.step
    returned = bool(returns and returns[-1].chunks and returns[-1].step == step)
    seen = run.logger.was_seen_before(step + 1, RESTART_STEPS)
    return Agreement(run.grid).from_first(returned or seen, FLAG, "agree on a restart")


def begin(
    run: OpenRun,
    start: Start,
    engine: Engine,
    checkpoints: CheckpointManager,
    evaluation: Evaluation,
) -> None:
    """Begin the stage at step 0, from initial weights or those of the stage before; collective."""
    log_started(run.logger, start, engine)
    if start.parent is not None:
        _load_stage_before(run, start, checkpoints, start.parent)

    run.monitor.stop.end_start()
    held_out = evaluation.run(run.state.step)
    # Asked to stop: nothing was trained, so the next start begins like this one.
    if evaluation.asked is None:
        # ckpt_000 is the state before the first step.
        checkpoints.save(checkpoint_name(0), run.state, held_out)


def _load_stage_before(
    run: OpenRun, start: Start, checkpoints: CheckpointManager, parent: Path
) -> None:
    manifest, kept = checkpoints.load_parent(parent)
    assert start.transition is not None, "a stage that starts from a parent"
    logger = run.logger
    event = replace(start.transition, attempt=logger.attempt, moments_kept=kept)
    run.state.parent = {k: v for k, v in event.row().items() if k not in ("event", "attempt")}
    log_transition(logger, event, scored=bool(start.held_out))
    why = why_without_moments(parent, manifest)
    loaded = "weights and moments" if kept else f"weights alone (it {why}; moments start from zero)"
    logger.info(f"{loaded} from {parent}, step {manifest.step}")
    log_stage_transition(logger, event)
