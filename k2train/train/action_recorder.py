"""Recorder of a rank's actions: when each began and ended in some steps, on one clock for all.

- `profile.actions` says which steps. Every rank writes a file (`record.action_trace`), because a
  wait on one rank is explained by work on another.
- In these steps the engine's hooks point here: phases of the step, actions of the schedule, and
  what blocks in between. In all other steps they are what they were without it.
- A mark is a reading of a clock, or a CUDA event: no bit of the step depends on it.
- Files that cannot be written are one line, and the run goes on.

Alternatives considered:
- Ranges of torch's profiler: it slows every operation down, and knows no schedule.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from k2train.files import write_synced
from k2train.parallel.agreement import Agreement
from k2train.parallel.comm_tracker import CommTracker, ExchangeListener
from k2train.parallel.common_clock import Clock, CommonTime, agree_on_time, clock_of
from k2train.parallel.messages import TEXTS
from k2train.plan.action import Action
from k2train.processes import boot_id
from k2train.record.action_trace import (
    FOLDER,
    Kind,
    RankTrace,
    StepTrace,
    TraceFacts,
    TraceSpan,
    file_name,
    trace_text,
)
from k2train.train.engine import Engine
from k2train.train.preflight import Start
from k2train.train.shutdown import OpenRun


@dataclass
class _Step:
    """Marks of one step, in their order; an entry without a kind ends the span begun last."""

    step: int
    began: float
    marks: list[Any]
    entries: list[tuple[Kind | None, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def spans(self, clock: Clock, zero: float) -> Iterator[TraceSpan]:
        """Spans in the order in which they begin; on a device they end with the step at last."""
        times = [at - zero for at in clock.seconds(self.marks)[1:]]
        first, last = self.began - zero, self.began + self.seconds - zero
        open_: list[int] = []
        found: list[list[Any]] = []
        for at, (kind, name) in zip(times, self.entries, strict=True):
            at = min(max(at, first), last)
            if kind is None:
                found[open_.pop()][3] = at
            else:
                open_.append(len(found))
                found.append([kind, str(name), at, last, len(open_)])
        return (TraceSpan(*one) for one in found)


class ActionRecorder:
    """Recorder of one rank; without `profile.actions` it does nothing."""

    def __init__(self, start: Start, engine: Engine, run: OpenRun):
        self._start, self._engine, self._run = start, engine, run
        self._first, self._last = start.setup.config.profile.actions or (0, 0)
        self._comm: CommTracker = engine.grid.comm
        self._clock: Clock = clock_of(engine.grid.device)
        self._time: CommonTime | None = None
        self._steps: list[_Step] = []
        self._now: _Step | None = None
        self._in_phase = False
        self._first_step = 0
        """First step of this start, which also warms up."""
        self._hooks: tuple[Any, Any, ExchangeListener | None] = (None, None, None)
        """What the engine's phases and actions and the exchanges told before."""

    def before_step(self, step: int) -> None:
        """Agree on a clock before the first step that is recorded; collective."""
        self._first_step = self._first_step or step
        if self._time is None and self._first <= step <= self._last:
            self._time = agree_on_time(self._run.grid, boot_id())
            self._clock.anchor()

    def step_began(self, step: int, began: float) -> None:
        """Record the step that began at that reading of the monotonic clock."""
        if self._time is None or step > self._last:
            return
        engine, comm = self._engine, self._comm
        self._now = _Step(step, began, [self._clock.mark()])
        self._in_phase = False
        self._hooks = (engine.on_phase, engine.watch_actions, comm.own_time)
        engine.on_phase = self._on_phase
        engine.watch_actions = (self._after_action, self._before_action)
        comm.own_time = self

    def step_computed(self) -> None:
        """Note that the engine has computed the step."""
        if self._now is not None and self._in_phase:
            self._leave()
            self._in_phase = False

    def step_ended(self, seconds: float) -> None:
        """End the step, which took so many seconds by the same clock."""
        if (now := self._now) is None:
            return
        now.seconds = seconds
        self._steps.append(now)
        self._now = None
        self._engine.on_phase, self._engine.watch_actions, self._comm.own_time = self._hooks

    def after_step(self, step: int) -> None:
        """Write what was recorded after the last step that is wanted; collective."""
        if self._time is not None and step >= self._last:
            self.close()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Mark a phase of the step outside of the engine, such as its data."""
        if self._now is None:
            yield
            return
        self._enter("phase", name)
        try:
            yield
        finally:
            self._leave()

    def block(self) -> None:
        """An exchange begins, which may wait for others."""
        if (inner := self._hooks[2]) is not None:
            inner.block()
        self._enter("exchange", self._comm.current)

    def resume(self) -> None:
        """The exchange is over."""
        self._leave()
        if (inner := self._hooks[2]) is not None:
            inner.resume()

    def _on_phase(self, phase: str) -> None:
        if self._in_phase:
            self._leave()
        self._in_phase = True
        self._enter("phase", phase)
        self._hooks[0](phase)

    def _before_action(self, action: Action) -> None:
        self._enter("action", action)

    def _after_action(self, action: Action) -> None:
        self._leave()

    def _enter(self, kind: Kind, name: object) -> None:
        assert self._now is not None, "a span begins within a step"
        self._now.entries.append((kind, name))
        self._now.marks.append(self._clock.mark())

    def _leave(self) -> None:
        assert self._now is not None, "a span ends within a step"
        self._now.marks.append(self._clock.mark())
        self._now.entries.append((None, None))

    def close(self) -> None:
        """Write the steps so far; nothing without any. Collective."""
        if self._time is None or not self._steps:
            return
        run, steps = self._run, range(self._steps[0].step, self._steps[-1].step + 1)
        self._last = 0
        run.monitor.phase("evaluate", steps[-1])
        problem = self._write(steps, self._time)
        self._time = None
        told = Agreement(run.grid).all([problem], TEXTS, "write the actions")
        problems = [text for (text,) in told if text]
        folder = self._start.directory / FOLDER
        named = f"actions of steps {steps[0]} to {steps[-1]}"
        run.logger.info(f"no {named}: {problems[0]}" if problems else f"{named} in {folder}")

    def _write(self, steps: range, shared: CommonTime) -> str:
        """Write this rank's file; returns why it could not be written."""
        grid, attempt = self._engine.grid, self._run.logger.attempt
        facts = TraceFacts(
            attempt=attempt,
            rank=grid.rank,
            world_size=grid.layout.world_size,
            device=device_name(grid.device),
            first_step=self._first_step,
            clock=shared.how,
            clock_error_seconds=shared.error_seconds,
        )
        zero = shared.zero
        found = [
            StepTrace(
                one.step,
                one.began - zero,
                one.began + one.seconds - zero,
                tuple(one.spans(self._clock, zero)),
            )
            for one in self._steps
        ]
        self._steps = []
        path = self._start.directory / FOLDER / file_name(attempt, steps, grid.rank)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_synced(path, trace_text([RankTrace(facts, tuple(found))]))
        except OSError as error:
            return f"{path}: {error.strerror or error}"
        return ""


def device_name(device: torch.device) -> str:
    """Name of a device by its driver, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
