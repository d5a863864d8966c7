"""A run beside its plan: read from its folder, compared as far as its record allows.

- Config, world and device are the run's own: nothing is given twice.
- With recorded actions (`profile.actions`) every term is compared. Without them only the whole step
  is, and the text says what that leaves open.

Alternatives considered:
- The config as an argument: it could be another one than the run had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import median

from k2train.config.load import Config, load_config
from k2train.errors import RunError
from k2train.plan.hardware import Cluster
from k2train.planner.compare import Comparison, compare
from k2train.planner.lanes import measure
from k2train.planner.planned_step import Planned, planned_on, planned_shape
from k2train.record.action_trace import RankTrace, newest_traces, read_trace
from k2train.record.events import Resumed, Started, of_kind
from k2train.record.ledger import read_ledger
from k2train.record.metrics import StepRecord, read_metrics
from k2train.retry import is_file_retried, is_folder_retried
from k2train.train.setup import Setup


@dataclass(frozen=True)
class RecordedRun:
    """What a comparison needs of a run."""

    directory: Path
    setup: Setup
    attempt: int
    """Start that is compared: the one whose actions were recorded, or the newest."""
    newest_attempt: int
    device: str
    """`cpu`, or the name of the device; "" where no actions say it."""
    traces: tuple[RankTrace, ...]
    rows: tuple[StepRecord, ...]
    """Rows of the start, without its first step, which warms up, unless it is the only one."""

    @property
    def device_type(self) -> str:
        """Type of the device, as torch names it; an accelerator where it is not known."""
        return "cpu" if self.device == "cpu" else "cuda"

    @property
    def step_seconds(self) -> float | None:
        """Median of the recorded steps' seconds; None without any."""
        return median(row.seconds for row in self.rows) if self.rows else None


def read_run(directory: Path) -> RecordedRun:
    """Read a run. Raises RunError for a folder that is none, or a damaged file in it."""
    if not is_folder_retried(directory):
        raise RunError(
            f"{directory} is not a directory; give that of a run, such as runs/demo-stage1"
        )
    path = directory / "config.yaml"
    if not is_file_retried(path):
        raise RunError(f"{directory} has no config.yaml; is it the directory of a run?")
    config: Config = load_config(str(path), [])
    starts = _starts(directory)
    newest = max(starts)
    traces = tuple(read_trace(path) for path in newest_traces(directory))
    attempt = traces[0].facts.attempt if traces else newest
    world = traces[0].facts.world_size if traces else starts[newest]
    return RecordedRun(
        directory,
        Setup.of(config, world),
        attempt,
        newest,
        traces[0].facts.device if traces else "",
        traces,
        _rows(directory, attempt),
    )


def _starts(directory: Path) -> dict[int, int]:
    """World size of each start of a run."""
    entries = read_ledger(directory / "ledger.jsonl")
    starts: list[Started | Resumed] = [*of_kind(entries, Started), *of_kind(entries, Resumed)]
    if not starts:
        raise RunError(f"{directory / 'ledger.jsonl'}: no start is recorded; has the run begun?")
    return {start.attempt: start.world_size for start in starts}


def _rows(directory: Path, attempt: int) -> tuple[StepRecord, ...]:
    path = directory / "metrics.jsonl"
    if not is_file_retried(path):
        return ()
    found = [one for one in read_metrics(path) if one.attempt == attempt and isfinite(one.seconds)]
    return tuple(found[1:] or found)


@dataclass(frozen=True)
class Compared:
    """A run and its comparison; None where no actions were recorded."""

    run: RecordedRun
    cluster: Cluster | None
    planned: Planned | None
    """Plan on the cluster; None without one."""
    comparison: Comparison | None


def compare_run(run: RecordedRun, cluster: Cluster | None) -> Compared:
    """Compare a run with its plan on a cluster, or with the plan's shape.

    Raises RunError where the record holds nothing to compare.
    """
    planned = None if cluster is None else planned_on(run.setup, cluster, run.device_type)
    if not run.traces:
        if run.step_seconds is None:
            raise RunError(f"{run.directory}: no step is recorded yet; nothing to compare")
        return Compared(run, cluster, planned, None)
    measured = measure(run.traces, run.setup.layout, run.setup.programs)
    used = planned_shape(run.setup, measured) if planned is None else planned
    return Compared(run, cluster, planned, compare(run.setup, measured, used))


def device_note(run: RecordedRun, cluster: Cluster) -> str:
    """Say where the run's device is not the cluster's; "" where it is, or seems to be."""
    device = cluster.device
    if not run.device:
        return f"the run's device is not recorded; the plan is of {device.name}"
    is_same = (
        device.generation == "cpu"
        if run.device == "cpu"
        else device.name.split("-")[0].upper() in run.device.upper()
    )
    if is_same:
        return ""
    return (
        f"the run's device is {run.device}, the cluster's {device.name}: the ratios say how the "
        "two differ, not how good the plan is"
    )


def step_of(traces: Sequence[RankTrace], steps: Sequence[int]) -> int:
    """The compared step whose length is nearest to their median, on the first rank: a real one."""
    lengths = {one.step: one.seconds for one in traces[0].steps if one.step in steps}
    middle = median(lengths.values())
    return min(lengths, key=lambda step: abs(lengths[step] - middle))
