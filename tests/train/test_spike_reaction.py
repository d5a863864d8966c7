"""What a run does about alarms and verdicts: leave steps out, stop, go back, or blame a device.

Would catch data that are blamed for a bad restart or for a broken device, a run that stands still,
and one that goes on into the same spike although nobody decided.
"""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from k2train import fault_injection
from k2train.checkpoint.manifest import list_checkpoints
from k2train.checkpoint.verify import verify_checkpoint
from k2train.config.load import Config
from k2train.guard.reaction import OutlierCounter, Reaction, Return
from k2train.guard.spikes import SpikeAlert
from k2train.record.events import Resumed, Spike, StepSkipped, Stopped, of_kind
from k2train.record.ledger import Ledger, read_ledger
from k2train.record.metrics import StepRecord, latest
from k2train.record.rollback_events import RolledBack, SpikeCheckpoint, StepRechecked
from k2train.train.spike_reaction import SpikeReaction
from k2train.train.trainer import Trainer
from tests.support.command_line import load_tool
from tests.support.events import event
from tests.support.gloo_pool import GlooPool
from tests.support.spiked_runs import FIRST, ONSET, POISONED, VERDICT, spiked_corpus, spiked_tree
from tests.support.tiny_corpus import manifest_of, trainer_job

compare_runs = load_tool("compare_runs")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spike_reaction")
    spiked_corpus(folder / "data")
    return folder


def tree_of(base: Path, name: str, **changes: Any) -> dict[str, Any]:
    return spiked_tree(base / "data" / "manifest.json", base / "runs", name, **changes)


def events(base: Path, name: str, kind: type[Any]) -> list[Any]:
    return of_kind(read_ledger(base / "runs" / name / "ledger.jsonl"), kind)


def rows(base: Path, name: str) -> list[StepRecord]:
    return list(latest(base / "runs" / name / "metrics.jsonl"))


def armed(text: str, trainer: Trainer) -> None:
    fault_injection.arm(text, trainer.engine.grid.rank)


def test_a_broken_device_is_named_and_no_data(base: Path, pool: GlooPool) -> None:
    """Catches a step that is skipped or blamed on its chunk because one rank computed it wrong."""
    for name, fault in (("whole", ""), ("broken", "gradient@rank=1@step=3:nan")):
        tree = tree_of(base, name, run__stop_after_steps=5)
        assert pool.run(2, trainer_job, tree, partial(armed, fault)) == [75, 75]
    runs = [base / "runs" / name for name in ("whole", "broken")]
    assert compare_runs.differences(*runs, strict=True) == []
    (found,) = events(base, "broken", StepRechecked)
    assert (found.step, found.same, found.ranks, found.applied) == (3, False, (1,), 3)
    assert found.losses[1] == found.losses[2] and found.grad_norms[0] == "nan"
    assert events(base, "broken", StepSkipped) == events(base, "broken", Spike) == []


def test_a_step_that_cannot_be_repeated_ends_the_run(base: Path, pool: GlooPool) -> None:
    """Catches a run that goes on with one of three results, and one that names no rank."""
    faults = "gradient@rank=1@step=2:nan;gradient@rank=1@step=2:inf"
    tree = tree_of(base, "apart")
    assert pool.run(2, trainer_job, tree, partial(armed, faults)) == [1, 1]
    (stopped,) = events(base, "apart", Stopped)
    assert stopped.reason == "damaged"
    assert stopped.problem.startswith("step 2: rank 1 computed the step 3 times")
    (found,) = events(base, "apart", StepRechecked)
    assert (found.ranks, found.applied) == ((1,), None)


def test_the_next_start_follows_a_return_and_keeps_the_twin(base: Path, pool: GlooPool) -> None:
    """Catches a start that goes on from the branch after a kill, and a twin of another step."""
    assert pool.run(1, trainer_job, tree_of(base, "twin", run__stop_after_steps=2)) == [75]
    run = base / "runs" / "twin"
    back = event(
        RolledBack, attempt=1, number=4, checkpoint="ckpt_000", from_step=3, step=0, branch="spikes"
    )
    Ledger(run / "ledger.jsonl").append(back)
    assert pool.run(1, trainer_job, tree_of(base, "twin", run__stop_after_steps=4)) == [75]
    (resumed,) = events(base, "twin", Resumed)
    assert (resumed.checkpoint, resumed.set_aside) == ("ckpt_000", ("ckpt_000_step_000002",))

    (kept,) = events(base, "twin", SpikeCheckpoint)
    assert (kept.number, kept.kind, kept.step) == (4, "twin", 3)
    (twin,) = list_checkpoints(run / "spikes" / "spike_004" / "twin")
    verify_checkpoint(twin)
    assert manifest_of(twin)["step"] == 3
    # A start that passes the step again finds it.
    again = tree_of(base, "twin", run__resume=0, run__stop_after_steps=4)
    assert pool.run(1, trainer_job, again) == [75]
    assert len(events(base, "twin", SpikeCheckpoint)) == 1


def test_a_stop_needs_a_decision(base: Path, pool: GlooPool) -> None:
    """Catches a policy that goes on, and a next start that runs into the same spike unasked."""
    tree = tree_of(base, "stopped", spikes__policy="stop")
    assert pool.run(1, trainer_job, tree) == [1]
    (stopped,) = events(base, "stopped", Stopped)
    assert (stopped.reason, stopped.step) == ("spike", VERDICT)
    (refused,) = pool.run(1, trainer_job, tree)
    assert f"stopped by a spike at step {VERDICT}" in refused
    # By name: past the step of the stop, which comes again from the checkpoint before it.
    allowed = tree_of(
        base,
        "stopped",
        spikes__policy="stop",
        run__allow=[f"spike_at_{VERDICT}"],
        run__stop_after_steps=VERDICT - FIRST - POISONED + 1,
    )
    assert pool.run(1, trainer_job, allowed) == [75]
    assert rows(base, "stopped")[-1].step == VERDICT + 1


def test_steps_that_raise_an_alarm_are_left_out(base: Path, pool: GlooPool, tmp_path: Path) -> None:
    """Catches an outlier that moves weights or the detector; the run goes on behind two of them."""
    manifest = spiked_corpus(tmp_path / "data", bad_steps=2)
    tree = spiked_tree(
        manifest,
        tmp_path / "runs",
        "left_out",
        spikes__policy="skip_step",
        run__stop_after_steps=80,
    )
    assert pool.run(1, trainer_job, tree) == [75]
    skipped = events(tmp_path, "left_out", StepSkipped)
    assert [(e.step, e.reason, e.in_a_row) for e in skipped] == [
        (ONSET, "outlier", 1),
        (ONSET + 1, "outlier", 2),
    ]
    found = rows(tmp_path, "left_out")
    assert [row.step for row in found if not row.applied] == [ONSET, ONSET + 1]
    assert found[ONSET + 1].loss < found[ONSET].loss / 2
    assert events(tmp_path, "left_out", Spike) == []
    (last,) = list_checkpoints(tmp_path / "runs" / "left_out" / "checkpoints")[-1:]
    assert manifest_of(last)["adam_steps"] == 80 - 2
    assert manifest_of(last)["guard"]["reaction"]["outliers"] == {"in_a_row": 0, "total": 2}


def test_a_spike_that_leaving_out_does_not_end_stops_the_run(base: Path, pool: GlooPool) -> None:
    """Catches a run that stands still: no step is applied, and none ever will be."""
    assert pool.run(1, trainer_job, tree_of(base, "still", spikes__policy="skip_step")) == [1]
    (stopped,) = events(base, "still", Stopped)
    assert (stopped.reason, stopped.step) == ("spike", FIRST + OutlierCounter.limit)
    assert "leaving steps out does not end this spike" in stopped.problem


def swap_moments(trainer: Trainer) -> None:
    """What a checkpoint with the moments of another run would load; its weights are whole."""
    trainer.engine.optimizer.exp_avg.fill_(0.1)
    trainer.engine.optimizer.exp_avg_sq.zero_()


def test_a_bad_restart_blames_no_data(base: Path, pool: GlooPool) -> None:
    """Catches a chunk that is deferred because of what a restart lost, and a run that reloads the
    same state for ever.
    """
    changes: dict[str, Any] = {"data__order": [0, 2, 1]}
    until = tree_of(base, "restarted", **changes, run__stop_after_steps=FIRST)
    assert pool.run(1, trainer_job, until) == [75]
    assert pool.run(1, trainer_job, tree_of(base, "restarted", **changes), swap_moments) == [1]

    opened = events(base, "restarted", Spike)
    assert [(event.attempt, event.kind) for event in opened] == [(2, "restart"), (3, "restart")]
    # The first step computes with the weights of the checkpoint, which are whole.
    assert {event.onset for event in opened} == {FIRST + 2}
    (event,) = events(base, "restarted", RolledBack)
    assert (event.verdict, event.checkpoint, event.chunks) == ("restart", "ckpt_001", ())
    stopped = events(base, "restarted", Stopped)[-1]
    assert "the restart from ckpt_001 was repeated, and jumps again" in stopped.problem
    assert "no data is blamed" in stopped.problem


def reaction_at(tree: dict[str, Any], step: int, state: Reaction) -> SpikeReaction:
    config = Config.model_validate(tree)
    guard = SimpleNamespace(reaction=state, spikes=SpikeAlert())
    start = SimpleNamespace(setup=SimpleNamespace(config=config), returns=[])
    one = SimpleNamespace(world_size=1)
    parts: Any = SimpleNamespace(
        state=SimpleNamespace(step=step, guard=guard),
        writer=SimpleNamespace(keeps_all=False),
        grid=SimpleNamespace(host=None, comm=None, rank=0, layout=one),
        logger=None,
    )
    return SpikeReaction(start, parts, parts, parts)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["stop", "rollback_and_defer"])
def test_a_stop_that_a_checkpoint_brings_back_can_be_passed(base: Path, policy: str) -> None:
    """Catches a permission that is read only when a stop is decided: saved in between, it would
    come again at every start.
    """
    for allow, due in (([], True), (["spike_at_90"], False), (["spike_at_91"], True)):
        state = Reaction(to_return=Return("restart", 50, 90))
        tree = tree_of(base, "any", spikes__policy=policy, run__allow=allow)
        reaction = reaction_at(tree, 90, state)
        assert reaction.is_due == due
        reaction.observe([])
        assert (state.to_return is not None) == due


def test_leaving_out_goes_on_where_a_person_allows_it(base: Path) -> None:
    """Catches a stop at the same step for ever, although its message names the way past it."""
    for allow, stops in (([], True), (["spike_at_90"], False)):
        state = Reaction(OutlierCounter(OutlierCounter.limit - 1, 40))
        tree = tree_of(base, "any", spikes__policy="skip_step", run__allow=allow)
        reaction = reaction_at(tree, 90, state)
        reaction.count(True)
        assert bool(reaction.problem) == stops
