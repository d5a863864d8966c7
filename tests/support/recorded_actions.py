"""Traces of steps that take exactly the seconds a test wants, as a run would record them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from k2train.config.load import load_config
from k2train.plan.action import Action
from k2train.plan.simulate import simulate
from k2train.record.action_trace import (
    FOLDER,
    RankTrace,
    StepTrace,
    TraceFacts,
    TraceSpan,
    file_name,
    trace_text,
)
from k2train.record.events import Started
from k2train.record.ledger import Ledger
from k2train.record.metrics import MetricsWriter, StepRecord
from k2train.train.setup import Setup
from tests.support.events import event

DEMO = "configs/demo/stage1.yaml"
LOADER, REDUCE, UPDATE, REST = 0.01, 0.03, 0.05, 0.002
"""Seconds of the phases around the pipeline, and of the host behind them."""


def setup_of(world_size: int, *overrides: str) -> Setup:
    """The demo's config on so many processes."""
    return Setup.of(load_config(DEMO, list(overrides)), world_size)


def recorded(
    setup: Setup,
    seconds: Callable[[Action], float],
    steps: Sequence[int] = (2, 3),
    exchanges: Callable[[Action], Sequence[tuple[str, float]]] = lambda action: (),
    device: str = "cpu",
) -> list[RankTrace]:
    """Traces of all ranks whose actions take `seconds`; a transfer's, of its sending end.

    `exchanges` are those inside of an action, at its begin: (name, seconds).
    """
    spans = simulate(setup.programs, seconds)
    end = LOADER + max(span.end_seconds for span in spans if span.action.op.is_compute)
    length = end + REDUCE + UPDATE + REST
    found = []
    for rank in range(setup.layout.world_size):
        pp = setup.layout.coordinate(rank).pp
        own = [span for span in spans if span.rank == pp]
        traced = []
        for number in steps:
            zero = 100.0 + number * (length + 0.5)
            inside = [TraceSpan("phase", "data", zero, zero + LOADER, 1)]
            inside.append(TraceSpan("phase", "forward", zero + LOADER, zero + end, 1))
            at = zero + LOADER
            for span in own:
                action = span.action
                begin = zero + LOADER + span.start_seconds if action.op.is_compute else at
                until = begin + (seconds(action) if action.op.is_compute else 0.0)
                if begin > at:
                    inside.append(TraceSpan("exchange", "recv forward, stage 1", at, begin, 2))
                inside.append(TraceSpan("action", str(action), begin, until, 2))
                for name, length_of in exchanges(action):
                    inside.append(TraceSpan("exchange", name, begin, begin + length_of, 3))
                    begin += length_of
                at = until
            reduced = zero + end + REDUCE
            inside.append(TraceSpan("phase", "reduce", zero + end, reduced, 1))
            if setup.layout.data > 1:
                name = "reduce-scatter dp"
                inside.append(TraceSpan("exchange", name, zero + end, zero + end + REDUCE / 2, 2))
            inside.append(TraceSpan("phase", "update", reduced, reduced + UPDATE, 1))
            traced.append(StepTrace(number, zero, zero + length, tuple(inside)))
        facts = TraceFacts(
            attempt=1, rank=rank, world_size=setup.layout.world_size, device=device, first_step=1
        )
        found.append(RankTrace(facts, tuple(traced)))
    return found


def write_run(directory: Path, setup: Setup, step_seconds: Sequence[float]) -> Path:
    """A run's folder with config, ledger and metrics, as one start leaves them."""
    directory.mkdir(parents=True)
    tree = setup.config.model_dump(mode="json")
    (directory / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    world = setup.layout.world_size
    Ledger(directory / "ledger.jsonl").append(event(Started, attempt=1, world_size=world))
    metrics = MetricsWriter(directory / "metrics.jsonl")
    for step, seconds in enumerate(step_seconds, 1):
        metrics.write(StepRecord(step, 1, seconds=seconds))
    return directory


def write_traces(directory: Path, traces: Sequence[RankTrace]) -> None:
    """The files that the ranks of a run leave."""
    (directory / FOLDER).mkdir()
    for trace in traces:
        facts, steps = trace.facts, range(trace.steps[0].step, trace.steps[-1].step + 1)
        name = file_name(facts.attempt, steps, facts.rank)
        (directory / FOLDER / name).write_text(trace_text([trace]), encoding="utf-8")
