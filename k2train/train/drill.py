"""Resume drill of a run: the first steps after a load compared with the record, by the run itself.

- Each restart from a checkpoint whose next two steps are on record does the same two: comparing
  them costs nothing. A difference stops the run in one line.
- A setting (layout, kernels, versions, machine) in which that was never seen to hold is drilled
  once: after its first save and two more steps the run loads that checkpoint, does the two again,
  and goes on from there, since the state is then the same to the bit.
- A restart on a new setting, from a checkpoint without recorded steps, first does those of an older
  checkpoint that has some.

Alternatives considered:
- A second process that loads and compares: twice the memory, and other devices than the run's.
- The drill at ckpt_000: its moments are zero, so it cannot see that they are lost.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from k2train.checkpoint.manifest import (
    CheckpointManifest,
    is_thinned,
    list_checkpoints,
    manifest_sha256,
    read_manifest,
)
from k2train.errors import CheckpointError
from k2train.parallel.agreement import Agreement
from k2train.parallel.device_digest import StateRoot
from k2train.parallel.messages import FLAG
from k2train.record.followed_events import CheckpointFollowed, FollowedStep, ResumeDrilled
from k2train.retry import exists_retried
from k2train.train.batches import BatchSource
from k2train.train.checkpointing import CheckpointManager
from k2train.train.engine import Engine
from k2train.train.followed import (
    STEPS,
    Comparison,
    FollowedRecord,
    Recorded,
    changed_facts,
    comparable_steps,
    drill_is_due,
    half_recorded,
    recorded_steps,
)
from k2train.train.monitor import PHASES, DamageError
from k2train.train.repeat import engine_root, followed_step, reads_the_same, repeat_step
from k2train.train.rounding import Rounding
from k2train.train.run_logger import RunLogger
from k2train.train.setting import config_digest, setting_of
from k2train.train.shutdown import OpenRun
from k2train.train.state import TrainState
from k2train.train.step_result import StepResult

_RECORDED: TypeAdapter[Recorded | None] = TypeAdapter(Recorded | None)
AGREE = "agree on a resume drill"
"""Name of the exchange."""


class ResumeError(DamageError):
    """A restart does not do what is on record; raised on every rank alike."""

    advice = (
        "; find out why, take another checkpoint (run.resume=N), or go on unchecked "
        "(audit.resume_drill=off)"
    )


@dataclass
class _Reload:
    """A checkpoint that is loaded again once two steps after it are done."""

    name: str
    step: int
    state: dict[str, Any]
    steps: list[FollowedStep]


class ResumeDrill:
    """Resume drill of one rank; every method is collective but `end`."""

    def __init__(
        self, engine: Engine, batches: BatchSource, checkpoints: CheckpointManager, run: OpenRun
    ):
        self.engine, self.batches, self.checkpoints, self.run = engine, batches, checkpoints, run
        self.start = checkpoints.start
        self.enabled = checkpoints.config.audit.resume_drill == "auto"
        self.setting, self.identity = setting_of(engine), config_digest(self.start.identity)
        self._agreement = Agreement(engine.grid)

        self._comparison: Comparison | None = None
        self._changed: tuple[str, ...] = ()
        self._reload: _Reload | None = None
        self._due = self._agreed_due()

        logger = run.logger
        self._record = FollowedRecord(logger.attempt, self.setting, self.identity, self._write)
        checkpoints.on_load, checkpoints.on_save = self._loaded, self._saving
        checkpoints.on_end = self.end
        checkpoints.on_committed = lambda path: self._record.saved(path.name, manifest_sha256(path))

    @property
    def logger(self) -> RunLogger:
        """The run's logger."""
        return self.run.logger

    def step_done(self, result: StepResult, lr: float, ids: str) -> None:
        """Record the step of the state's number, and compare it if it is on record.

        Raises ResumeError on every rank when it is not what it was.
        """
        step = followed_step(self.batches.order, self.run.state.step, result, lr, ids)
        self._record.step_done(step, trusted=not result.faults)
        if (
            self._reload is not None
            and step.step == self._reload.step + len(self._reload.steps) + 1
        ):
            self._reload.steps.append(step)
            # Values that were changed on purpose do not come again, and what a policy left out is
            # judged by a state that is another one by then.
            kept = result.applied and not result.faults
            self._reload = self._reload if kept else None

        if (comparison := self._comparison) is None:
            return
        if result.faults:
            self._comparison = None
            return
        comparison.compare(step)
        if comparison.complete:
            self._comparison = None
            self._judge(comparison, self._changed, reloaded=False)

    def before_step(self) -> None:
        """Load a checkpoint again if that is due now, and do its two steps once more.

        Raises ResumeError on every rank when state or steps are not those of before.
        """
        if self._reload is None or len(self._reload.steps) < STEPS:
            return
        reload, self._reload = self._reload, None
        step, path = self.run.state.step, self.start.checkpoints / reload.name
        self.checkpoints.wait(step)
        if step != reload.step + STEPS or not self._is_there(path):
            return

        self.logger.progress(f"loading {reload.name} again, to compare its next steps")
        sha256, before = self._agreed_sha256(path), engine_root(self.engine, step)
        recorded = Recorded(reload.name, sha256, self.setting, self.identity, tuple(reload.steps))
        exact = self.engine.kernels.deterministic
        comparison = Comparison(recorded, None if exact else Rounding(self.engine.precision))
        manifest = self._repeat(path, comparison)
        self.run.monitor.phase("load", step)
        after = engine_root(self.engine, step)
        if exact and not comparison.difference:
            comparison.difference = _state_difference(reload, manifest, before, after)
        self.logger.progress("")
        self._judge(comparison, (), reloaded=True)
        self._due = False

    def end(self) -> None:
        """Record the only step after a checkpoint, if the run ends with it."""
        self._record.end()

    # The hooks of loading and saving.

    def _saving(self, name: str, state: TrainState) -> None:
        self._record.saving(name, state.step)
        if self._due and self.enabled and state.step > 0 and self._reload is None:
            self._reload = _Reload(name, state.step, state.to_json(), [])

    def _loaded(self, path: Path, manifest: CheckpointManifest) -> None:
        """A checkpoint was loaded: its next steps are compared, or recorded for the first time."""
        self._record.went_back()
        self._reload = self._comparison = None
        sha256 = self._agreed_sha256(path)
        recorded = self._agreed_record(path.name, sha256)
        known = recorded is not None and reads_the_same(self.batches.order, recorded.steps)
        if recorded is None or not known or len(recorded.steps) < STEPS:
            # A chunk may have been deferred since: these are other steps than those on record.
            self._record.loaded(path.name, manifest.step, sha256)
        self._record.go_on(half_recorded(self.logger.entries, manifest.step))
        if not self.enabled:
            return
        if recorded is None:
            if self._due and manifest.step > 0:
                self._drill_older(path, manifest.step)
            return
        comparison = self._comparison_with(recorded)
        self._comparison = None if comparison.complete else comparison

    def _drill_older(self, loaded: Path, step: int) -> None:
        """Do the recorded steps of the newest checkpoint before `loaded` that has some."""
        found = self._agreement.from_first(self._older_record(step), _RECORDED, AGREE)
        if found is None:
            return
        comparison = self._comparison_with(found)
        if comparison.complete:
            return
        self.logger.info(
            f"a setting that is new to this run: the steps after {found.checkpoint} are done "
            f"again before it goes on from {loaded.name}"
        )
        changed = self._changed
        self._repeat(self.start.checkpoints / found.checkpoint, comparison)
        self._judge(comparison, changed, reloaded=False)
        self.run.monitor.phase("load", step)
        self.checkpoints.read_state(loaded)
        self.run.monitor.state_replaced()

    def _older_record(self, step: int) -> Recorded | None:
        """The newest record of steps from a whole checkpoint before `step`; on rank 0."""
        for path in reversed(list_checkpoints(self.start.checkpoints)):
            if is_thinned(path):
                continue
            try:
                manifest = read_manifest(path)
            except CheckpointError:
                continue
            if 0 < manifest.step < step:
                found = recorded_steps(self.logger.entries, path.name, manifest_sha256(path))
                if found is not None and len(found.steps) == STEPS:
                    return found if all(part.applied for part in found.steps) else None
        return None

    # What both have in common.

    def _comparison_with(self, recorded: Recorded) -> Comparison:
        self._changed = changed_facts(recorded.setting, self.setting)
        precise = not self._changed and self.engine.kernels.deterministic
        rounding = None if precise else Rounding(self.engine.precision)
        steps = comparable_steps(recorded, self.setting, self.identity)
        return Comparison(recorded, rounding, steps, recorded.config == self.identity)

    def _repeat(self, path: Path, comparison: Comparison) -> CheckpointManifest:
        """Load `path` and compare its next steps; the state is that after them."""
        monitor, engine = self.run.monitor, self.engine
        monitor.state_replaced()
        # Reading takes as long as at a start: no timeout of a step.
        monitor.phase("load", monitor.step)
        manifest, _ = self.checkpoints.read_state(path)
        # No fault point, no audit of a replaced state, no judge: only the watchdog's phases.
        on_phase, judge, engine.judge = engine.on_phase, engine.judge, None
        engine.on_phase = lambda phase: monitor.watchdog.phase(PHASES[phase], monitor.step)
        try:
            for recorded in comparison.recorded.steps:
                if not comparison.complete:
                    done, _ = repeat_step(
                        engine, self.batches, recorded.step, engine.grid.layout.world_size
                    )
                    comparison.compare(done)
        finally:
            engine.on_phase, engine.judge = on_phase, judge
        return manifest

    def _judge(self, comparison: Comparison, changed: tuple[str, ...], reloaded: bool) -> None:
        """Record a drill, and stop the run if it failed."""
        recorded, problem = comparison.recorded, comparison.difference
        if not comparison.done:
            return
        self.logger.event(
            ResumeDrilled(
                attempt=self.logger.attempt,
                checkpoint=recorded.checkpoint,
                manifest_sha256=recorded.manifest_sha256,
                setting=self.setting,
                reloaded=reloaded,
                steps=comparison.done,
                bits=comparison.rounding is None,
                changed=changed,
                same=not problem,
                difference=problem or None,
            )
        )
        if problem:
            raise ResumeError(f"resume drill of {problem}")
        self._due = self._due and comparison.rounding is not None
        why = "; ".join(changed) or "kernels that are not deterministic"
        how = "to the bit" if comparison.rounding is None else f"within rounding ({why})"
        after = f"{recorded.checkpoint}, loaded again" if reloaded else recorded.checkpoint
        steps = "step" if comparison.done == 1 else f"{comparison.done} steps"
        self.logger.info(f"resume drill: the first {steps} after {after}: as recorded, {how}")

    def _agreed_due(self) -> bool:
        return self._agreement.from_first(
            drill_is_due(self.logger.entries, self.setting), FLAG, AGREE
        )

    def _agreed_record(self, name: str, sha256: str) -> Recorded | None:
        return self._agreement.from_first(
            recorded_steps(self.logger.entries, name, sha256), _RECORDED, AGREE
        )

    def _agreed_sha256(self, path: Path) -> str:
        return self._agreement.from_first(manifest_sha256(path), _TEXT, AGREE)

    def _is_there(self, path: Path) -> bool:
        # A file system shared by machines may show a new name to some of them later.
        lacking = torch.tensor([int(not exists_retried(path))])
        return not int(self._agreement.sum(lacking, AGREE))

    def _write(self, event: CheckpointFollowed) -> None:
        self.logger.event(event)


_TEXT = TypeAdapter(str)


def _state_difference(
    reload: _Reload, manifest: CheckpointManifest, before: StateRoot, after: StateRoot
) -> str:
    """Say what of the state is another one after the load, "" for nothing."""
    loaded = TrainState.of(manifest).to_json()
    for name, value in reload.state.items():
        if loaded[name] != value:
            return f"{reload.name}: {name} of the training state was loaded as another value"
    if before.root == after.root:
        return ""
    apart = [name for name in before.digests if before.digests[name] != after.digests[name]]
    what = f"{apart[0]} and {len(apart) - 1} more tensors" if apart else "the count of updates"
    return f"{reload.name}: {STEPS} steps equal their record, the state after them does not: {what}"
