"""Health checks during training: hangs, stragglers, replica and state audits, STOP/SAVE files.

- The trainer reports its phase and step timings. This module decides which check runs and which
  message is logged, so the training loop does not know which checks are enabled.
- What all ranks must decide alike (replicas that differ) comes from exchanged numbers. Who is slow
  only rank 0 works out, from the same exchange.
- What only the host knows (a file in the run directory) is read by rank 0 and shared in the step's
  exchange.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from k2train import fault_injection
from k2train.guard.control_files import STOP_FILE, ControlFiles, SaveRequest
from k2train.guard.stop_signals import FINISHING_STEP, PERSONS_SIGNALS, StopRequest
from k2train.guard.stragglers import Stragglers
from k2train.launch.environment import on_rank, write_status
from k2train.parallel.agreement import Agreement
from k2train.parallel.device_digest import RootAllReduce, StateAudit, StateDigest, StateRoot
from k2train.parallel.flight_recorder import flight_recording
from k2train.parallel.grid import ProcessGrid
from k2train.parallel.messages import TEXT
from k2train.parallel.own_time import OwnTime, marks_of
from k2train.parallel.replica_check import ReplicaCheck
from k2train.plan.balance import rank_flops
from k2train.record.system_info import in_batch_job, job_facts
from k2train.train.energy_meter import EnergyMeter, counter_of
from k2train.train.engine import Engine
from k2train.train.setup import Setup
from k2train.train.step_flags import FAILED, SAVE, SAVE_ASKED, SECONDS, STOP, Agreed
from k2train.watchdog.failure_report import read_report
from k2train.watchdog.own_heartbeat import Member
from k2train.watchdog.timeouts import Timeouts
from k2train.watchdog.watchdog import Watchdog

PHASES = {"forward": "step", "reduce": "reduce", "update": "update"}
"""Engine phase -> watchdog phase."""

SAVE_FILE = "SAVE file"
"""Who asked for a save if a file did."""
FINISHING = {
    "evaluate": "ending the evaluation, then saving what is not saved yet",
    "save": "finishing the save",
}
"""Phase -> what is done after a signal, unless it is a phase of a step."""


class PreviousEnd(NamedTuple):
    """Failure report of an earlier start of the run."""

    attempt: int
    """Number of that start; 0 when it had none yet."""
    line: str


class DamageError(RuntimeError):
    """Replicas that must be equal differ; raised on every rank alike."""

    advice = "; the last checkpoint was saved before that, start again from it"
    """What to do about it."""


class RunMonitor:
    """Health checks of one rank.

    Call `begin` once the run directory is locked, `attach` once the engine is built, `close` at
    the end.
    """

    def __init__(self, setup: Setup, grid: ProcessGrid, directory: Path, stop: StopRequest):
        config = setup.config
        w, a = config.watch, config.audit
        self.grid, self.replicas_every_steps = grid, a.replicas_every_steps
        self.root_every_steps = a.root_every_steps

        # A save that waits for disk space is not stuck.
        save_seconds = w.save_seconds + config.checkpoint.retry_seconds
        limits = Timeouts(
            w.heartbeat_seconds, w.start_seconds, w.step_seconds, save_seconds, w.evaluate_seconds
        )
        member = Member(grid.rank, grid.layout.world_size, job_facts())
        self.watchdog = Watchdog(
            directory / "watch", member, limits, _write_stderr, grid.comm.position
        )
        self.watchdog.recording = flight_recording

        self.energy = EnergyMeter(counter_of(grid.device), directory / "energy", grid.rank)
        self.stop = stop
        self.control_files = ControlFiles(directory)
        # What it finds is written down, by rank 0.
        first = grid.rank == 0
        self.stragglers = Stragglers(grid.layout, _relative_work(setup)) if first else None

        self.step = 0
        self.previous_end: PreviousEnd | None = None
        """How an earlier start ended, if it could not record it itself; on rank 0."""
        self._begun = False
        self._is_in_job = in_batch_job()
        self._saving = False
        self._save_request, self._stop_file = SaveRequest(), False
        self._own_time = grid.comm.own_time = OwnTime(marks_of(grid.device))
        self._shared: list[float] | None = None
        """Where a late request to stop is entered, until the step's exchange."""
        self._shared_from = 0

    def begin(self, attempt: int = 0) -> None:
        """Start the watchdog and read an earlier start's failure report, in the first call.

        `attempt` is the number of this start, once it is known.
        """
        self.watchdog.attempt = attempt
        self.energy.begin(attempt)
        if self._begun:
            return
        self._begun = True
        earlier = read_report(self.watchdog.directory) if self.grid.rank == 0 else None

        self.watchdog.start()
        self.grid.comm.cells = self.watchdog.cells
        if earlier is not None:
            self.previous_end = PreviousEnd(
                int(earlier.get("attempt", 0)), str(earlier.get("line", ""))
            )

    def attach(self, engine: Engine) -> None:
        """Check this engine from now on."""
        self.engine = engine
        engine.on_phase = self._on_phase

        self._replicas = ReplicaCheck(engine.gradients.shard_layout, self.grid)
        states = list(engine.optimizer.flat_shards)
        digest = StateDigest(engine.gradients.shard_layout, engine.names, states, self.grid.tp)
        self._root = RootAllReduce(digest, self.grid.host, self.grid.comm)
        self._guard = StateAudit(digest, self.grid.host, self.grid.comm)

    def detach(self) -> None:
        """Forget the engine, whose memory another one needs."""
        del self.engine, self._replicas, self._root, self._guard

    def phase(self, name: str, step: int, spent_on: str = "") -> None:
        """Enter a phase; the watchdog times it.

        `spent_on` names the phase that its energy is booked on, if that is another one.
        """
        self.step = step
        self.energy.phase(spent_on or name, step)
        self.stop.finishing = FINISHING.get(name, FINISHING_STEP)
        self.watchdog.phase(name, step)

    def begin_step(self, step: int, saving: bool, save_due: bool, failed: bool) -> list[float]:
        """Begin a step and return this rank's contribution to its exchange.

        - `saving`: a save is running in the background. `save_due`: it is time for one.
        - `failed`: this rank could not save or record.

        The contribution is summed over ranks. It holds the flags stop, save and failed, then one
        value per rank: the rank's own compute seconds in the last step, and 0 for the others.
        """
        self.saving(saving)
        self.phase("read", step)
        request = self._poll_request()
        if request == "STOP":
            self._see_stop_file()
        stop = self.stop.requested is not None

        # Summed over ranks, these one-entry lists become a gather. The host waited for the device
        # at the end of that step, so its events are there.
        seconds = [0.0] * self.grid.layout.world_size
        seconds[self.grid.rank] = self._own_time.read()
        self._own_time.begin()
        # Only rank 0 has anything to say of saves.
        save = SAVE_ASKED if request == "SAVE" else float(save_due)
        return [float(stop), save, float(failed), *seconds]

    def end_step(self, seconds: float, flags: Sequence[float]) -> Agreed:
        """Record the time of a step; return what the ranks agreed on by its summed flags."""
        self._own_time.end()
        self.watchdog.step_done(seconds)
        own = flags[SECONDS:]
        return Agreed(
            self._who_asked() if flags[STOP] > 0 else None,
            flags[SAVE] >= SAVE_ASKED,
            flags[SAVE] > 0,
            flags[FAILED] > 0,
            self.stragglers.observe(self.step, own) if self.stragglers and any(own) else None,
        )

    def share_late_stop(self, shared: list[float], first: int) -> None:
        """Enter a request that comes before the step's exchange into what the step shares.

        The flags of `begin_step` begin at `shared[first]`.
        """
        self._shared, self._shared_from = shared, first

    def agreed_stop(self) -> str | None:
        """Return why the run is asked to stop, None if no rank was; collective.

        For moments outside of steps, which have an exchange of their own.
        """
        if self.grid.rank == 0 and self.control_files.poll() == "STOP":
            self._see_stop_file()
        asked = torch.tensor([int(self.stop.requested is not None)])
        if not int(Agreement(self.grid).sum(asked, "agree on a stop")):
            return None
        return self._who_asked()

    def _who_asked(self) -> str:
        """Return rank 0's request to stop, or the first other, "SIGUSR1 on rank 1"; collective.

        Rank 0 confirms one that it did not get itself.
        """
        told = Agreement(self.grid).lowest(self.stop.requested, TEXT, "agree on a stop")
        assert told is not None, "a rank was asked"
        rank, name = told
        if rank > 0:
            name = on_rank(name, rank)
            if self.grid.rank == 0:
                _write_stderr(f"{name}: {self.stop.finishing}")
        return name

    @property
    def kill_may_follow(self) -> bool:
        """Whether a requested stop is a signal's: it leaves no time for more than the save."""
        return self.stop.requested != STOP_FILE

    def root(self) -> StateRoot | None:
        """Return the state root if this step records one, else None; collective."""
        if self.root_every_steps == 0 or self.step % self.root_every_steps:
            return None
        optimizer = self.engine.optimizer
        optimizer.finish()

        found = self._root(optimizer.flat_shards, self.step, optimizer.adam_steps)
        self._guard.keep(found.local_sums)
        return found

    def state_replaced(self) -> None:
        """Note that the state is another one now, on purpose; call on all ranks."""
        self._guard.forget()

    def _poll_request(self) -> str | None:
        """Return `STOP` or `SAVE` if a file requests it, else None.

        Only rank 0 looks. A requested save is reported once until it is complete.
        """
        request = self.control_files.poll() if self.grid.rank == 0 else None
        if request == "SAVE" and not self._save_request.see():
            return None
        return request

    def _see_stop_file(self) -> None:
        # Also after a signal, which leaves less time: the person's save is kept.
        self._stop_file = True
        self.stop.requested = self.stop.requested or STOP_FILE

    def asked(self, checkpoint: str) -> str | None:
        """Who asked for the save of `checkpoint`, on rank 0; None if nobody did, or a system.

        Called once, when the save begins: before it waits for the one under way. A person's save
        is kept. Batch systems, clusters and spot machines send signals at every time limit and
        preemption.
        """
        if self._save_request.begin(checkpoint):
            return SAVE_FILE
        requested = self.stop.requested
        if self._stop_file or requested == STOP_FILE:
            return STOP_FILE
        return requested if requested in PERSONS_SIGNALS and not self._is_in_job else None

    def saved(self, checkpoint: str) -> None:
        """Note on rank 0 that `checkpoint` is whole; may be called from the saving thread."""
        if self._save_request.is_met_by(checkpoint):
            # The file first: the next step must not take it for a new request.
            self.control_files.done("SAVE")
            self._save_request.end()

    def stopped(self) -> None:
        """Note that the run has saved and ends on request."""
        if self.grid.rank == 0:
            self.control_files.done("STOP", self._stop_file)

    def finished(self) -> None:
        """Note that the stage ends: its last checkpoint, which stays, meets every request."""
        if self.grid.rank == 0:
            self.control_files.done("STOP")

    def saving(self, active: bool) -> None:
        """Note whether a save runs in the background.

        A save has its own timeout, and the launcher gives a saving process time to finish.
        """
        if active != self._saving:
            self._saving = active
            self.watchdog.saving(active)
            write_status(self.grid.rank, None, saving=active)

    def report_lost_connection(self, error: BaseException) -> str:
        """Return a line that names the dead rank after a collective raised `error`.

        Returns "" where another rank reports it.
        """
        return self.watchdog.connection_lost(error)

    def reported(self) -> str:
        """Return how another rank reported the end of this start; "" if none did."""
        report = read_report(self.watchdog.directory) or {}
        of_this_start = report.get("attempt") == self.watchdog.attempt
        return str(report.get("line", "")) if of_this_start else ""

    def close(self, problem: str = "", stopped: str = "", code: int = 0) -> None:
        """Stop the watchdog; see there."""
        self.watchdog.close(problem, stopped, code)

    def _on_phase(self, phase: str) -> None:
        self.watchdog.phase(PHASES[phase], self.step)
        fault_injection.point(f"step.{phase}")
        if phase == "reduce" and self._shared is not None:
            if self.stop.requested is not None:
                self._shared[self._shared_from + STOP] = 1.0
            self._shared = None
        if phase == "reduce" and (problem := self._state_problem()) is not None:
            raise DamageError(problem)

    def _state_problem(self) -> str | None:
        """Return what is wrong with the state or its replicas, None if nothing is.

        Runs before the update, which overwrites all weights.
        """
        shards = self.engine.optimizer.flat_shards

        # Only in the step after one that recorded a root: the state must not have changed since.
        problem = self._guard.problem(shards)
        if (
            problem is None
            and self.replicas_every_steps
            and self.step % self.replicas_every_steps == 0
        ):
            self.engine.optimizer.finish()
            problem = self._replicas.problem(shards)
        return problem


def _relative_work(setup: Setup) -> list[float]:
    """Return each rank's planned FLOPs in a step; only their ratios matter."""
    layout = setup.layout
    weights = rank_flops(setup.architecture, layout, setup.config.data.sequence_length)
    return [float(weights[layout.coordinate(rank).pp]) for rank in range(layout.world_size)]


def _write_stderr(text: str) -> None:
    """Write past all buffers and locks: the main thread may hang in any of them."""
    os.write(2, f"k2train: {text}\n".encode())
