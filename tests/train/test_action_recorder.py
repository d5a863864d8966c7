"""Recorder of actions: the plan's order, spans that add up to the step, and a run without a change.

One set of runs serves all tests: every schedule on two pipeline ranks, with and without it.
"""

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest

from k2train.config.load import Config
from k2train.planner.compare_run import compare_run, read_run
from k2train.planner.compare_text import sentence
from k2train.record.action_trace import FOLDER, RankTrace, StepTrace, newest_traces, read_trace
from k2train.record.metrics import read_metrics, read_roots
from k2train.train.setup import Setup
from k2train.train.trainer import Trainer
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_corpus import audited_tree, make_corpus, trainer_job

TRAINED = {
    "run__stop_after_steps": 3,
    "audit__resume_drill": "off",
    "data__held_out_rows": 0,
    "batch": {"global_sequences": 12, "micro_sequences": 3},
}
STEPS = [2, 3]
SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zb-h1": 1, "zb-v": 2}
"""Schedules with their stages a rank; zb-h2 differs from zb-h1 in its list only."""
SLOW_SECONDS = 0.25
"""Far above what an action of the tiny model takes, however busy the machine is."""
ROUNDING = 2e-9
"""Spans are written in nanoseconds."""


def _tree(base: Path, name: str, schedule: str, **changes: Any) -> dict[str, Any]:
    keys = {"parallel__schedule": schedule, "parallel__stages_per_rank": SCHEDULES[schedule]}
    return audited_tree(base, name, **TRAINED, parallel__pipeline=2, **keys, **changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("actions")
    make_corpus(folder / "data", 2)
    return folder


@pytest.fixture(scope="module")
def runs(base: Path, pool: GlooPool) -> Path:
    """Runs named by their schedules, and `plain` without a recorder."""
    assert pool.run(2, trainer_job, _tree(base, "plain", "1f1b")) == [75, 75]
    for schedule in SCHEDULES:
        tree = _tree(base, schedule, schedule, profile__actions=STEPS)
        assert pool.run(2, trainer_job, tree) == [75, 75]
    return base / "runs"


def _traces(run: Path) -> list[RankTrace]:
    return [read_trace(path) for path in newest_traces(run)]


def test_the_order_is_the_plans_in_every_schedule(base: Path, runs: Path) -> None:
    """Catches an action that is lost, recorded twice or under another name, and an executor that
    reorders the list.
    """
    for schedule in SCHEDULES:
        config = Config.model_validate(_tree(base, schedule, schedule))
        programs = Setup.of(config, 2).programs
        traces = _traces(runs / schedule)
        assert [trace.facts.rank for trace in traces] == [0, 1]
        for trace, program in zip(traces, programs, strict=True):
            assert [step.step for step in trace.steps] == STEPS
            for step in trace.steps:
                actions = [span for span in step.spans if span.kind == "action"]
                assert [span.name for span in actions] == [str(action) for action in program]
                assert all(a.end <= b.begin for a, b in itertools.pairwise(actions))


def test_spans_and_gaps_are_the_step_that_was_recorded(runs: Path) -> None:
    """Catches a lane that is not whole: a span outside of its step or of the span it lies in, and a
    step that is not the one of metrics.jsonl. All is one clock, so no load can change it.
    """
    for schedule in SCHEDULES:
        seconds = {row.step: row.seconds for row in read_metrics(runs / schedule / "metrics.jsonl")}
        for trace in _traces(runs / schedule):
            for step in trace.steps:
                assert _own_seconds(step) == pytest.approx(step.seconds, abs=1e-6)
                if trace.facts.rank == 0:
                    assert step.seconds == pytest.approx(seconds[step.step], abs=ROUNDING)
                names = {span.name for span in step.spans if span.kind == "phase"}
                assert names == {"data", "forward", "reduce", "update"}


def _own_seconds(step: StepTrace) -> float:
    """Sum of what each span has without those in it, and of the step without its spans."""
    open_ = [(step.begin, step.end)]
    at, own = step.begin, 0.0
    for span in step.spans:
        while len(open_) > span.depth:
            _, end = open_.pop()
            own, at = own + end - at, end
        begin, end = open_[-1]
        assert span.depth == len(open_), "a span lies directly in the one that is open"
        assert begin - ROUNDING <= at <= span.begin + ROUNDING and span.end <= end + ROUNDING
        own, at = own + span.begin - at, span.begin
        open_.append((span.begin, span.end))
    while open_:
        _, end = open_.pop()
        own, at = own + end - at, end
    return own


def test_a_receive_ends_after_its_send_began(runs: Path) -> None:
    """Catches clocks of two ranks that are not one."""
    first, second = _traces(runs / "1f1b")
    for sender, receiver in zip(first.steps, second.steps, strict=True):
        sent = {span.name: span.begin for span in sender.spans if span.kind == "action"}
        # Those within an action only post a receive.
        waits = [span for span in receiver.spans if span.kind == "exchange" and span.depth == 2]
        ends = {span.name: span.end for span in waits}
        for microbatch in range(4):
            received = ends[f"recv forward of micro-batch {microbatch}, stage 1"]
            assert received > sent[f"0SF{microbatch}>1"]
    assert first.facts.clock == "the monotonic clock of one machine"


def test_recording_changes_no_bit(runs: Path) -> None:
    """Catches a recorder that draws random numbers, reorders sums or skips a step."""
    plain, recorded = runs / "plain", runs / "1f1b"
    losses = [
        [(row.step, row.loss) for row in read_metrics(run / "metrics.jsonl")]
        for run in (plain, recorded)
    ]
    roots = [
        [(row.step, row.root) for row in read_roots(run / "state_roots.jsonl")]
        for run in (plain, recorded)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    assert roots[0] == roots[1] and len(roots[0]) == 3
    assert not (plain / FOLDER).exists()


def test_a_file_is_a_trace_for_a_viewer(runs: Path) -> None:
    """Catches a file that Perfetto refuses: events need a phase letter, a time and a process."""
    path = newest_traces(runs / "1f1b")[1]
    assert path.name == "attempt_001_actions_000002_000003_rank_1.json"
    trace = json.loads(path.read_text(encoding="utf-8"))
    named, *events = trace["traceEvents"]
    assert named["ph"] == "M" and named["args"] == {"name": "rank 1"}
    assert {event["ph"] for event in events} == {"X"}
    assert {event["pid"] for event in events} == {1}
    assert all(event["dur"] >= 0 for event in events)


def _hooks_of_each_step(trainer: Trainer) -> None:
    """Write what the engine tells, and the exchanges, in the middle of each step."""
    engine, comm = trainer.engine, trainer.engine.grid.comm
    before = (engine.on_phase, engine.watch_actions, comm.own_time)
    reduce, found = engine.gradients.reduce, []

    def look() -> Any:
        now = (engine.on_phase, engine.watch_actions, comm.own_time)
        found.append([a == b for a, b in zip(now, before, strict=True)])
        path = trainer.start.directory / f"hooks_{engine.grid.rank}.json"
        path.write_text(json.dumps(found), encoding="utf-8")
        return reduce()

    engine.gradients.reduce = look  # type: ignore[method-assign]


def test_other_steps_have_no_hook(base: Path, pool: GlooPool) -> None:
    """Catches a recorder that costs something in steps that nobody asked for, or keeps its hooks.

    Its file cannot be written here, which ends no run.
    """
    tree = _tree(base, "hooks", "1f1b", profile__actions=[2, 2])
    blocked = base / "runs" / "hooks"
    blocked.mkdir(parents=True)
    (blocked / FOLDER).write_text("", encoding="utf-8")
    assert pool.run(2, trainer_job, tree, _hooks_of_each_step) == [75, 75]
    for rank in (0, 1):
        found = json.loads((blocked / f"hooks_{rank}.json").read_text(encoding="utf-8"))
        assert found == [[True] * 3, [False] * 3, [True] * 3]


def _slow_second_stage(trainer: Trainer) -> None:
    """Make the forwards of stage 1 slow, on the rank that holds it."""
    stage = trainer.engine.stages.get(1)
    if stage is not None:
        stage.register_forward_pre_hook(lambda *_: time.sleep(SLOW_SECONDS))


def test_a_slow_stage_of_a_real_run_is_named(base: Path, pool: GlooPool) -> None:
    """Catches a comparison that blames the waiting of other ranks, or the backward."""
    tree = _tree(base, "slow", "1f1b", profile__actions=[2, 2])
    tree["run"]["stop_after_steps"] = 2
    assert pool.run(2, trainer_job, tree, _slow_second_stage) == [75, 75]
    found = compare_run(read_run(base / "runs" / "slow"), None)
    one = found.comparison
    assert one is not None and one.rows[0].kind is not None
    assert sentence(one).startswith("stage 1's forward (layers 2 to 3, head and loss) took ")
    metrics = {r.step: r.seconds for r in read_metrics(base / "runs" / "slow" / "metrics.jsonl")}
    assert sum(one.measured.lanes[0].values()) == pytest.approx(metrics[2], abs=1e-6)
