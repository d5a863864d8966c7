"""What looks at a run while it trains: the watch, stragglers, copies of weights, the root of the state, request files.

The training loop says where it is and hands over what a step measured; here it is decided who is told what. One object, so
that the loop does not know which of these are on. What all ranks must decide alike (copies that differ, a straggler)
comes from exchanged numbers; what only the host knows (a file in the run directory) is read by rank 0 and travels in the
step's exchange.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from k2train import fault_injection
from k2train.config.load import Config
from k2train.guard.control_files import ControlFiles
from k2train.guard.stragglers import Stragglers
from k2train.launch.environment import write_status
from k2train.parallel.device_digest import RootAllReduce, StateAudit, StateDigest, StateRoot
from k2train.parallel.grid import ProcessGrid
from k2train.parallel.replica_check import ReplicaCheck
from k2train.plan.balance import rank_flops
from k2train.train.engine import Engine, architecture_of
from k2train.watchdog.failure_report import read_report
from k2train.watchdog.timeouts import Timeouts
from k2train.watchdog.watchdog import Watchdog

PHASES = {"forward": "step", "reduce": "reduce", "update": "update"}
"""What the engine calls its phases -> what the watch calls them."""


class PreviousEnd(NamedTuple):
    """How a start before this one ended."""

    attempt: int
    """Its number, 0 when it had none yet."""
    line: str


class DamageError(RuntimeError):
    """Copies that must be equal are not; raised on every rank alike."""


class RunMonitor:
    """One rank's; `begin` when the run directory is ours, `attach` when the engine is built, `close` at the end."""

    def __init__(
        self, config: Config, grid: ProcessGrid, directory: Path, facts: Mapping[str, str]
    ):
        w, a = config.watch, config.audit
        self.grid, self.replicas_every_steps, self.root_every_steps = (
            grid,
            a.replicas_every_steps,
            a.root_every_steps,
        )
        # A save that waits for room is not stuck.
        save_seconds = w.save_seconds + config.checkpoint.retry_seconds
        limits = Timeouts(
            w.heartbeat_seconds, w.start_seconds, w.step_seconds, save_seconds, w.evaluate_seconds
        )
        world_size = grid.layout.world_size
        self.watchdog = Watchdog(
            directory / "watch",
            grid.rank,
            world_size,
            limits,
            _write_stderr,
            grid.comm.position,
            facts=facts,
        )
        self.control_files = ControlFiles(directory)
        self.stragglers = Stragglers(grid.layout, _relative_work(config, grid))
        self.step = 0
        self._begun = False
        self._saving = False
        self._save_requested = False
        self._own_seconds = self._blocked_before = 0.0

    def begin(self) -> PreviousEnd | None:
        """Start the watch; what the verdict of an earlier start says, on rank 0, the first time."""
        if self._begun:
            return None
        self._begun = True
        earlier = read_report(self.watchdog.directory) if self.grid.rank == 0 else None
        self.watchdog.start()
        self.grid.comm.cells = self.watchdog.cells
        if earlier is None:
            return None
        return PreviousEnd(int(earlier.get("attempt", 0)), str(earlier.get("line", "")))

    def attach(self, engine: Engine) -> None:
        """Look at this engine from now on."""
        self.engine = engine
        engine.on_phase = self._on_phase
        self._replicas = ReplicaCheck(engine.gradients.shard_layout, self.grid)
        states = list(engine.optimizer.flat_shards)
        digest = StateDigest(engine.gradients.shard_layout, engine.names, states, self.grid.tp)
        comm = self.grid.comm
        self._root, self._guard = RootAllReduce(digest, comm=comm), StateAudit(digest, comm=comm)

    def phase(self, name: str, step: int) -> None:
        """The run goes on to a phase of the watch."""
        self.step = step
        self.watchdog.phase(name, step)

    def begin_step(self, step: int, saving: bool) -> list[float]:
        """A step begins, while a save is under way or not; what it exchanges: each rank's own seconds of the last one."""
        self.saving(saving)
        self.phase("read", step)
        self._blocked_before = self.grid.comm.blocked_seconds
        contribution = [0.0] * self.grid.layout.world_size
        contribution[self.grid.rank] = self._own_seconds
        return contribution

    def end_step(self, seconds: float, own_seconds: Sequence[float]) -> str | None:
        """A step took so long; a line when a rank has become slow, or is no longer."""
        self._own_seconds = max(
            0.0, seconds - (self.grid.comm.blocked_seconds - self._blocked_before)
        )
        self.watchdog.step_done(seconds)
        return self.stragglers.observe(self.step, own_seconds) if any(own_seconds) else None

    def root(self) -> StateRoot | None:
        """The root of the state, where this step is one that records it; collective."""
        if self.root_every_steps == 0 or self.step % self.root_every_steps:
            return None
        optimizer = self.engine.optimizer
        optimizer.finish()
        found = self._root(optimizer.flat_shards, self.step, optimizer.adam_steps)
        self._guard.keep(found.local_sums)
        return found

    def poll_request(self) -> str | None:
        """`STOP` or `SAVE` where a file asks for it; only rank 0 looks, and a save that is being made is not asked again."""
        request = self.control_files.poll() if self.grid.rank == 0 else None
        if request != "SAVE":
            return request
        request = None if self._save_requested else request
        self._save_requested = True
        return request

    def saved(self) -> None:
        """A checkpoint is whole, on rank 0; may be called from the thread that saves."""
        if self._save_requested:
            self.control_files.done("SAVE")
            self._save_requested = False

    def stopped(self) -> None:
        """The run has saved and ends on request."""
        if self.grid.rank == 0:
            self.control_files.done("STOP")

    def saving(self, active: bool) -> None:
        """Whether a save is under way in the background: it has a limit of its own, and a launcher gives it time."""
        if active != self._saving:
            self._saving = active
            self.watchdog.saving(active)
            write_status(self.grid.rank, None, saving=active)

    def report_lost_connection(self, error: BaseException) -> str:
        """A collective raised `error`: the line that says who is gone, "" where another rank says it."""
        return self.watchdog.connection_lost(error)

    def close(self, problem: str = "") -> None:
        """End the watch; `problem`: because of this the rank leaves by itself."""
        self.watchdog.close(problem)

    def _on_phase(self, phase: str) -> None:
        self.watchdog.phase(PHASES[phase], self.step)
        fault_injection.point(f"step.{phase}")
        if phase == "reduce" and (problem := self._state_problem()) is not None:
            raise DamageError(problem)

    def _state_problem(self) -> str | None:
        """What is wrong with copies and with the state; before the update, which writes all weights anew."""
        shards = self.engine.optimizer.flat_shards
        # Only in the step after one that recorded a root: the state must still be that one.
        problem = self._guard.problem(shards)
        if (
            problem is None
            and self.replicas_every_steps
            and self.step % self.replicas_every_steps == 0
        ):
            self.engine.optimizer.finish()
            problem = self._replicas.problem(shards)
        return problem


def _relative_work(config: Config, grid: ProcessGrid) -> list[float]:
    """The work of each rank in a step, by the plan; only their ratios count."""
    weights = rank_flops(architecture_of(config), grid.layout, config.data.sequence_length)
    return [
        float(weights[grid.layout.coordinate(rank).pp]) for rank in range(grid.layout.world_size)
    ]


def _write_stderr(text: str) -> None:
    """Past all buffers and locks: the main thread may hang in any of them."""
    os.write(2, f"k2train: {text}\n".encode())
