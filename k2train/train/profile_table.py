"""Tables of a profile: where the time of a step went, by phase and by operator.

- Phases are ranges on the host. On an accelerator the host runs ahead, so each phase also has the
  time of the kernels that it started.
- Self time of an operator is its own, without that of the operators it calls.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from k2train.text import table

PREFIX = "k2train: "
"""Begin of the names of phases in a trace."""
PHASES = ("data", "forward", "backward", "transfer", "reduce", "update", "evaluate", "save")
OTHER = "other"
MOST_OPERATORS = 40


@dataclass
class Time:
    """Seconds of a phase or operator in all profiled steps."""

    calls: int = 0
    host: float = 0.0
    device: float = 0.0


@dataclass
class Profile:
    """What a profile of `steps` steps that took `wall` seconds found."""

    steps: int
    wall: float
    phases: dict[str, Time] = field(default_factory=dict)
    operators: dict[str, Time] = field(default_factory=dict)


def profile_of(events: Iterable[Any], steps: int, wall: float) -> Profile:
    """Read the events of torch's profiler (`FunctionEvent`): times in microseconds."""
    found, events = Profile(steps, wall), list(events)
    ranges: list[tuple[float, float, str]] = []
    for event in events:
        if not event.name.startswith(PREFIX) or _is_on_device(event):
            continue
        name, span = event.name.removeprefix(PREFIX), event.time_range
        ranges.append((span.start, span.end, name))
        time = found.phases.setdefault(name, Time())
        time.calls += 1
        time.host += (span.end - span.start) / 1e6

    for event in events:
        if _is_on_device(event) or event.name.startswith((PREFIX, "ProfilerStep")):
            continue
        time = found.operators.setdefault(event.name, Time())
        time.calls += 1
        time.host += event.self_cpu_time_total / 1e6
        kernels = sum(kernel.duration for kernel in event.kernels) / 1e6
        time.device += kernels
        if kernels:
            # A backward's kernels are started by a thread of autograd, in the phase of that time.
            name = _phase_at(ranges, event.time_range.start)
            found.phases.setdefault(name, Time()).device += kernels
    return found


def _is_on_device(event: Any) -> bool:
    return str(event.device_type).endswith("CUDA")


def _phase_at(ranges: Sequence[tuple[float, float, str]], time: float) -> str:
    return next((name for start, end, name in ranges if start <= time < end), OTHER)


def lines(profile: Profile) -> list[str]:
    """Return both tables as lines of text; seconds are those of one step."""
    other = profile.wall - sum(time.host for name, time in profile.phases.items() if name != OTHER)
    known = dict(profile.phases)
    known[OTHER] = Time(0, max(0.0, other), known.get(OTHER, Time()).device)
    order = [*(name for name in PHASES if name in known), OTHER]
    by_self = sorted(profile.operators.items(), key=lambda item: -_weight(item[1]))
    shown = dict(by_self[:MOST_OPERATORS])
    return [
        "by phase, seconds of a step",
        *_rows(profile, "phase", {name: known[name] for name in order}),
        "",
        f"by operator, seconds of a step, the {len(shown)} largest of {len(by_self)}",
        *_rows(profile, "operator", shown),
    ]


def _weight(time: Time) -> float:
    return time.device or time.host


def _calls(of_a_step: float) -> str:
    """Format calls of a step; a save after some of the steps has no whole number."""
    return f"{of_a_step:,.0f}" if of_a_step >= 10 or of_a_step.is_integer() else f"{of_a_step:.1f}"


def _rows(profile: Profile, what: str, times: Mapping[str, Time]) -> list[str]:
    on_device = any(time.device for time in profile.phases.values())
    headings = [what, "calls", "host s", "share", *(["device s"] if on_device else [])]
    rows = [
        [
            name,
            "" if name == OTHER else _calls(time.calls / profile.steps),
            f"{time.host / profile.steps:.6f}",
            f"{100 * time.host / max(profile.wall, 1e-12):.1f}%",
            *([f"{time.device / profile.steps:.6f}"] if on_device else []),
        ]
        for name, time in times.items()
    ]
    return table(headings, rows, left={what})
