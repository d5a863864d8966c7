"""Action trace: what one rank did in some steps of a run, as a Chrome trace that is read back.

- One file a rank, `profile/attempt_AAA_actions_FFFFFF_LLLLLL_rank_R.json`. Perfetto and
  chrome://tracing open it as it is.
- A span is a step, a phase of it, an action of the schedule, or an exchange with other ranks.
  Spans of a step lie in each other, and their depth says in which one.
- Times count from one moment that all ranks share, in microseconds with three decimals.

Alternatives considered:
- A format of its own and a converter: two files of one fact, and one of them would be stale.
- One file of all ranks: ranks of other machines would send megabytes through rank 0.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from k2train.errors import RunError
from k2train.json_record import Count, Number, Positive, Record, first_mistake
from k2train.retry import is_folder_retried, list_retried
from k2train.safe_json import read_json

FOLDER = "profile"
"""Folder of the profiles in a run directory."""
MICROSECONDS = 1e6
MAX_BYTES = 2**30
_NAME = re.compile(r"attempt_(\d{3,})_actions_(\d{6,})_(\d{6,})_rank_(\d+)\.json")

Kind = Literal["step", "phase", "action", "exchange"]


class TraceFacts(Record):
    """What a trace says of its rank and its run."""

    format: Annotated[int, Field(ge=1, le=1)] = 1
    attempt: Count
    rank: Count
    world_size: Positive
    device: str
    """`cpu`, or the name of the device by its driver."""
    first_step: Count = 0
    """First step of the start, which also warms up."""
    clock: str = ""
    """How the ranks' clocks were made one."""
    clock_error_seconds: Number = 0


@dataclass(frozen=True)
class TraceSpan:
    """One span of a step, seconds on the clock of all ranks; `depth` 1 lies in the step itself."""

    kind: Kind
    name: str
    begin: float
    end: float
    depth: int

    @property
    def seconds(self) -> float:
        """Length of the span."""
        return self.end - self.begin


@dataclass(frozen=True)
class StepTrace:
    """One step of one rank; its spans begin in their order."""

    step: int
    begin: float
    end: float
    spans: tuple[TraceSpan, ...]

    @property
    def seconds(self) -> float:
        """Length of the step, as `metrics.jsonl` has it on rank 0."""
        return self.end - self.begin


@dataclass(frozen=True)
class RankTrace:
    """Some steps of one rank."""

    facts: TraceFacts
    steps: tuple[StepTrace, ...]


class _Arguments(Record):
    step: Count
    depth: Count


class _Event(Record):
    """A complete event of the trace format ("X"); those of other kinds only name processes."""

    ph: Literal["X"]
    name: str
    cat: Kind
    ts: Number
    dur: Annotated[Number, Field(ge=0)]
    args: _Arguments


class _File(Record):
    otherData: TraceFacts
    traceEvents: list[dict[str, Any]]


def file_name(attempt: int, steps: range, rank: int) -> str:
    """Name of a trace of the steps of a range."""
    return f"attempt_{attempt:03d}_actions_{steps[0]:06d}_{steps[-1]:06d}_rank_{rank}.json"


def trace_text(traces: Iterable[RankTrace]) -> str:
    """The traces as one Chrome trace; the facts are those of the first one."""
    ranks = list(traces)
    events = [event for trace in ranks for event in _events(trace)]
    lines = ",\n".join(json.dumps(event, separators=(",", ":")) for event in events)
    facts = json.dumps(ranks[0].facts.model_dump())
    return f'{{"displayTimeUnit":"ms","otherData":{facts},"traceEvents":[\n{lines}\n]}}\n'


def _events(trace: RankTrace) -> Iterable[dict[str, Any]]:
    rank = trace.facts.rank
    yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}
    for one in trace.steps:
        whole = TraceSpan("step", f"step {one.step}", one.begin, one.end, 0)
        for span in (whole, *one.spans):
            yield {
                "ph": "X",
                "name": span.name,
                "cat": span.kind,
                "pid": rank,
                "tid": 0,
                "ts": round(span.begin * MICROSECONDS, 3),
                "dur": round(span.seconds * MICROSECONDS, 3),
                "args": {"step": one.step, "depth": span.depth},
            }


def read_trace(path: Path) -> RankTrace:
    """Read the trace of one rank. Raises RunError when it is none, with its first mistake."""
    try:
        file = _File.parse(read_json(path, MAX_BYTES))
        events = [_Event.model_validate(one) for one in file.traceEvents if one.get("ph") != "M"]
        return RankTrace(file.otherData, tuple(_steps(events)))
    except FileNotFoundError:
        raise RunError(f"{path} does not exist") from None
    except ValidationError as error:
        raise RunError(f"{path}: no trace of actions: {first_mistake(error)}") from None
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or error
        raise RunError(f"{path}: no trace of actions: {problem}") from None


def _steps(events: Sequence[_Event]) -> Iterable[StepTrace]:
    """Steps of the events; a step comes before its spans."""
    found: list[tuple[_Event, list[TraceSpan]]] = []
    for event in events:
        if event.cat == "step":
            found.append((event, []))
            continue
        if not found or found[-1][0].args.step != event.args.step:
            raise ValueError(f"{event.name!r} of step {event.args.step} lies in no step")
        if event.args.depth < 1:
            raise ValueError(f"{event.name!r} has depth {event.args.depth}, and lies in a step")
        begin = event.ts / MICROSECONDS
        end = begin + event.dur / MICROSECONDS
        found[-1][1].append(TraceSpan(event.cat, event.name, begin, end, event.args.depth))
    for event, spans in found:
        begin = event.ts / MICROSECONDS
        end = begin + event.dur / MICROSECONDS
        yield StepTrace(event.args.step, begin, end, tuple(spans))


def newest_traces(directory: Path) -> list[Path]:
    """Files of the newest recorded steps of a run, by rank; empty where none were recorded."""
    folder = directory / FOLDER
    if not is_folder_retried(folder):
        return []
    found: dict[tuple[int, int, int], dict[int, Path]] = {}
    for path in list_retried(folder):
        if (match := _NAME.fullmatch(path.name)) is not None:
            attempt, first, last, rank = map(int, match.groups())
            found.setdefault((attempt, first, last), {})[rank] = path
    return [path for _, path in sorted(found[max(found)].items())] if found else []
