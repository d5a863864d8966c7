"""Profile of some steps of a run: a Chrome trace and a table of where the time went.

- `profile.steps` says which steps, `profile.ranks` which ranks write; all ranks pause together
  while files are written, under the limit of an evaluation.
- torch's profiler watches and changes no bit. It costs time: the table says how much, beside the
  steps before. Other steps have no hook at all.
- Files that cannot be written are one line, and the run goes on.
- It also hands the same moments on to the recorder of actions (`train.action_recorder`).

Alternatives considered:
- A schedule of wait, warm-up and active steps: the run is warm by the step that is asked for.
"""

import gzip
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from k2train.parallel.agreement import Agreement
from k2train.parallel.messages import TEXT
from k2train.plan.action import Action, Op
from k2train.record import action_trace
from k2train.train.action_recorder import ActionRecorder
from k2train.train.engine import Engine
from k2train.train.preflight import Start
from k2train.train.profile_table import PREFIX, lines, profile_of
from k2train.train.shutdown import OpenRun

FOLDER = action_trace.FOLDER
"""Folder of the profiles in a run directory."""
RECENT_STEPS = 10


HEAD_BYTES = 65536
"""Begin of a trace, with the facts of the process before the first event."""


class RunProfile:
    """Profile of one rank; without `profile.steps` it does nothing."""

    def __init__(self, start: Start, engine: Engine, run: OpenRun):
        config = start.setup.config.profile
        self._folder, self._engine, self._run = start.directory / FOLDER, engine, run
        self._first, self._last = config.steps or (0, 0)
        self._writes = config.ranks in ("all", engine.grid.rank)
        self._profiler: profile | None = None
        self._open: Any = None
        """The range of a phase of the step that is under way."""
        self._on_phase: Callable[[str], None] = engine.on_phase
        self._began, self._from, self._steps = 0.0, 0, 0
        self._before: deque[float] = deque(maxlen=RECENT_STEPS)
        self._under: list[float] = []
        """Seconds of a step without what follows it: of the last ones before, and of those under
        the profiler."""
        self._step_began, self._in_step, self._is_warm = 0.0, False, False
        self._actions = ActionRecorder(start, engine, run)

    def before_step(self, step: int) -> None:
        """Begin a step, and the profile if it is the first one in it; collective."""
        self._actions.before_step(step)
        if self._from == 0 and self._first <= step <= self._last:
            self._begin(step)
        self._step_began = time.monotonic()

    def step_began(self, step: int, began: float) -> None:
        """Note the moment of the monotonic clock from which a step's seconds count."""
        self._actions.step_began(step, began)

    def after_step(self, step: int) -> None:
        """End a step, and the profile if it is the last one in it; collective."""
        self._actions.after_step(step)
        if self._from == 0:
            return
        self._steps = step - self._from + 1
        if step >= self._last:
            self.close()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Mark a phase of the step: data, evaluate or save."""
        marked: AbstractContextManager[Any] = nullcontext()
        if self._profiler is not None:
            marked = record_function(PREFIX + name)
        with marked, self._actions.phase(name):
            yield

    def step_computed(self) -> None:
        """Note that the engine has computed the step: what follows is no part of its time."""
        self._actions.step_computed()
        self._enter(None)
        self._in_step = False
        seconds = time.monotonic() - self._step_began
        if self._from:
            self._under.append(seconds)
        elif self._is_warm:
            self._before.append(seconds)
        # The first step of a start also warms caches up.
        self._is_warm = True

    def step_ended(self, began: float) -> float:
        """Return the seconds of the step that began then, after noting that they are its length."""
        seconds = time.monotonic() - began
        self._actions.step_ended(seconds)
        return seconds

    def close(self) -> None:
        """Write the profile of the steps so far; nothing without one. Collective."""
        self._actions.close()
        if self._from == 0 or self._steps == 0:
            return
        run, first = self._run, self._from
        last, self._from, self._last = first + self._steps - 1, 0, 0
        wall = time.monotonic() - self._began
        run.monitor.phase("evaluate", last)
        run.logger.progress(f"writing the profile of steps {first} to {last}")
        problem = self._write(first, last, wall) if self._writes else ""
        told = Agreement(run.grid).lowest(problem or None, TEXT, "write the profile")
        run.logger.progress("")
        if told is not None:
            run.logger.info(f"no profile: {told[1]}")
        else:
            run.logger.info(f"profile of steps {first} to {last} in {self._folder}{self._cost()}")

    def _begin(self, step: int) -> None:
        self._from, self._began, self._steps = step, time.monotonic(), 0
        if not self._writes:
            return
        kinds = [ProfilerActivity.CPU]
        if self._engine.grid.device.type == "cuda":
            kinds.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=kinds)
        self._profiler.start()
        self._on_phase = self._engine.on_phase
        self._engine.on_phase = self._phase_of_engine
        self._engine.watch_actions = (self._after_action, self._before_action)
        self._began = time.monotonic()

    def _phase_of_engine(self, phase: str) -> None:
        # Forward and backward have ranges of their own, by action.
        self._in_step = True
        self._enter(None if phase == "forward" else phase)
        self._on_phase(phase)

    def _before_action(self, action: Action) -> None:
        # An evaluation has forwards, too.
        if self._in_step:
            name = "transfer" if not action.op.is_compute else "backward"
            self._enter("forward" if action.op is Op.FORWARD else name)

    def _after_action(self, action: Action) -> None:
        if self._in_step:
            self._enter(None)

    def _enter(self, name: str | None) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None
        if self._profiler is not None and name is not None:
            self._open = record_function(PREFIX + name)
            self._open.__enter__()

    def _cost(self) -> str:
        """How long a step took under the profiler, and before."""
        with_it = median(self._under)
        if not self._before:
            return f"; a step took {with_it:.2f} s under the profiler"
        before = median(self._before)
        return (
            f"; a step took {with_it:.2f} s under the profiler and {before:.2f} s before it "
            f"({100 * (with_it / before - 1):+.0f}%)"
        )

    def _write(self, first: int, last: int, wall: float) -> str:
        """Write trace and table of this rank; returns why they could not be written."""
        profiler, self._profiler = self._profiler, None
        assert profiler is not None, "a profile is under way on a rank that writes one"
        self._enter(None)
        self._engine.on_phase = self._on_phase
        self._engine.watch_actions = (None, None)
        if self._engine.grid.device.type == "cuda":
            torch.cuda.synchronize(self._engine.grid.device)
        profiler.stop()

        rank = self._engine.grid.rank
        attempt = self._run.logger.attempt
        name = f"attempt_{attempt:03d}_steps_{first:06d}_{last:06d}_rank_{rank}"
        head = f"steps {first} to {last}, rank {rank}{self._cost()}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            trace = self._folder / f"{name}.trace.json.gz"
            unfinished = self._folder / f"unfinished_{rank}.json"
            profiler.export_chrome_trace(str(unfinished))
            compress_trace(unfinished, trace)
            found = profile_of(profiler.events() or (), self._steps, wall)
            text = "\n".join([head, "", *lines(found), ""])
            (self._folder / f"{name}.txt").write_text(text, encoding="utf-8")
        except (OSError, RuntimeError) as error:
            return f"{self._folder} on rank {rank}: {(str(error).splitlines() or [''])[0]}"
        return ""


def compress_trace(plain: Path, trace: Path) -> None:
    """Replace the trace `plain` by a compressed one that does not name the host."""
    unfinished = plain.with_suffix(".gz")
    with plain.open("rb") as source, gzip.open(unfinished, "wb", compresslevel=5) as target:
        head = source.read(HEAD_BYTES)
        target.write(re.sub(rb'"host_name": "[^"]*"', b'"host_name": ""', head))
        shutil.copyfileobj(source, target)
    os.replace(unfinished, trace)
    plain.unlink()
