"""Reaction to spikes by `spikes.policy`: judging steps before their update, acting on verdicts.

- Verdicts are equal on every rank, so the ranks react at the same step without an exchange.
- What was decided is part of the training state. A kill on a spiked branch changes nothing.
- While a spike is open, no checkpoint is thinned: those before its onset may be needed.

Alternatives considered:
- Reacting when the alarm opens: most spikes are benign, and the run would go back for nothing.
"""

from collections.abc import Iterable

from k2train.guard.reaction import Return
from k2train.guard.spike_verdict import SpikeVerdict
from k2train.train.checkpointing import CheckpointManager
from k2train.train.engine import Engine
from k2train.train.preflight import Start
from k2train.train.recheck import StepJudge
from k2train.train.rollback import GivenUpError, Rollback
from k2train.train.shutdown import OpenRun
from k2train.train.spike_checkpoints import TWIN, keep_checkpoint
from k2train.train.spike_history import permission_of_step

ACTING = ("rollback_and_defer", "stop")
"""Policies that answer a verdict."""
PATIENCE_STEPS = {"malignant": 0, "restart": 40}
"""Verdicts that a policy answers, and the steps until it does.

A restart is told at once, but a blip that happens to fall into its first steps is over by then.
"""


class SpikeReaction:
    """What one rank does about spikes; equal on all ranks."""

    def __init__(self, start: Start, engine: Engine, run: OpenRun, checkpoints: CheckpointManager):
        self.start, self.opened, self.checkpoints = start, run, checkpoints
        self.rollback = Rollback(start, run, checkpoints)
        spikes = start.setup.config.spikes
        self.policy, self.keep_steps = spikes.policy, spikes.keep_steps
        self.allow = start.setup.config.run.allow
        self.problem = ""
        """Why the run must stop; "" to go on."""
        self.goes_back: Start | None = None
        """How the run goes on from an earlier checkpoint; None while it does not go back."""

        recheck = self.policy != "alert" if spikes.recheck == "auto" else spikes.recheck
        skip = self.policy == "skip_step"
        if recheck or skip:
            engine.judge = StepJudge(
                self._would_open, recheck, self._is_outlier if skip else lambda loss, norm: False
            )
        self._branches = [
            (event.from_step, event.number) for event in start.returns if event.branch
        ]

    def _may_pass(self, step: int) -> bool:
        """Whether a person has looked at the stop at `step`, and lets the run go on."""
        return permission_of_step(step) in self.allow

    def _would_open(self, loss: float, grad_norm: float) -> bool:
        return self.opened.state.guard.spikes.would_open(loss, grad_norm)

    def _is_outlier(self, loss: float, grad_norm: float) -> bool:
        return self.opened.state.guard.spikes.is_outlier(loss, grad_norm)

    def count(self, outlier: bool) -> None:
        """Count a step, and whether it was left out as an outlier."""
        outliers = self.opened.state.guard.reaction.outliers
        if outliers.observe(outlier) and not self._may_pass(self.opened.state.step):
            self.problem = (
                f"{outliers.limit} steps in a row were left out as outliers up to step "
                f"{self.opened.state.step}: leaving steps out does not end this spike; the weights "
                "are those before it"
            )

    def observe(self, verdicts: Iterable[SpikeVerdict]) -> None:
        """Take the verdicts of a step."""
        state = self.opened.state
        reaction, spikes = state.guard.reaction, state.guard.spikes
        decided = reaction.to_return
        if decided is not None and (self.policy not in ACTING or self._may_pass(decided.until)):
            # Another policy had decided it, before this start, or a person has looked since.
            reaction.to_return = None
        for verdict in verdicts:
            back = reaction.to_return
            if verdict.kind == "benign" and back is not None and back.onset == verdict.onset:
                # What a restart raised was over before its patience was.
                reaction.to_return = None
            if verdict.kind not in PATIENCE_STEPS or reaction.to_return is not None:
                continue
            if self.policy in ACTING:
                patience = PATIENCE_STEPS[verdict.kind]
                if verdict.kind == "malignant" and self.policy == "rollback_and_defer":
                    patience += self.keep_steps
                until = min(state.step + patience, self.start.order.total_steps)
                if not self._may_pass(until):
                    reaction.to_return = Return(verdict.kind, verdict.onset, until)

        open_now = spikes.open_since is not None or reaction.to_return is not None
        self.checkpoints.writer.keeps_all = open_now

    @property
    def is_due(self) -> bool:
        """Whether the run goes back now."""
        back = self.opened.state.guard.reaction.to_return
        if back is None or self.policy not in ACTING or self._may_pass(back.until):
            return False
        return self.opened.state.step >= back.until

    def go_back(self, first_step: int) -> None:
        """Go back as decided, or say in `problem` why that is impossible; collective."""
        back = self.opened.state.guard.reaction.to_return
        assert back is not None, "a return was decided"
        if self.policy == "stop":
            self.problem = (
                f"spike {back.verdict} since step {back.onset}, and spikes.policy is stop"
            )
            return
        try:
            self.goes_back = self.rollback.go_back(back, first_step)
        except GivenUpError as error:
            self.problem = str(error)

    def keep_twin(self) -> None:
        """Save the good run's state at the step of an earlier branch; collective."""
        state = self.opened.state
        if state.guard.spikes.open_since is not None or state.guard.reaction.to_return is not None:
            return
        for step, number in self._branches:
            if step == state.step:
                keep_checkpoint(self.checkpoints, state, number, TWIN)

    def how_to_decide(self) -> str:
        """Say how a run that stopped here goes on."""
        return (
            "decide how to go on: from an earlier checkpoint (run.resume=NUMBER), or as it is "
            f"(run.allow=[{permission_of_step(self.opened.state.step)}])"
        )
