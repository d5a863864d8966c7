"""Training loop: build, resume, step through the chunks, save a numbered checkpoint after each.

- The data position is computed from the step number, so a restart needs only the checkpoint's step.
- Every decision (skip, save, stop) is taken from sums that all ranks share in the step's one
  exchange. All ranks therefore decide alike at the same step.
- One code path for every layout, a single process included.
"""

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from k2train import fault_injection
from k2train.checkpoint.manifest import checkpoint_name, list_checkpoints, read_manifest
from k2train.checkpoint.writer import SaveError, remove_unfinished, set_aside_later
from k2train.config.load import Config, config_differences
from k2train.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, DataError, RunError, UserError
from k2train.guard.nonfinite import NonFiniteCounter
from k2train.guard.spikes import SpikeAlert
from k2train.guard.stop_signals import StopRequest
from k2train.launch.environment import Launch
from k2train.parallel.comm_tracker import collective_scope
from k2train.parallel.grid import (
    ProcessGrid,
    choose_device,
    start_process_group,
    stop_process_group,
)
from k2train.plan.cost import flops_per_token, parameters, peak_flops
from k2train.record.system_info import environment_facts, job_facts
from k2train.run_lock.lock import RunLock
from k2train.text import counted
from k2train.train.batches import BatchSource
from k2train.train.checkpointing import CheckpointManager
from k2train.train.engine import Engine, StepResult, architecture_of
from k2train.train.host_memory import keep_freed_memory
from k2train.train.monitor import DamageError, PreviousEnd, RunMonitor
from k2train.train.preflight import Start, learning_rate
from k2train.train.resume_check import check_same_run
from k2train.train.run_logger import RankZeroRunLogger, RunLogger, stage_facts, start_messages
from k2train.train.shutdown import is_connection_lost, shut_down_alone, shut_down_together

STOP, SAVE, FAILED, SECONDS = 0, 1, 2, 3
"""Indices of the flags in the step's exchange; from `SECONDS` on one per rank."""
RECORD_REFUSED = "rank 0 could not write the record of the run; see its message"
STOP_FILE = "STOP file"
"""Stop reason if a file requested it. Any other reason is a signal, and a kill may follow."""


def train(
    config: Config, launch: Launch, start: Start, stop: StopRequest, lock: RunLock | None
) -> int:
    """Run the stage on this rank and return the exit code; collective.

    `lock` is the lock of the run directory, which rank 0 holds.
    """
    device = choose_device(launch)
    memory = keep_freed_memory(device.type)
    start_process_group(launch, device)
    grid = ProcessGrid(start.layout, launch.rank, device)
    # The ranks have met: from here on a signal stops the run after a step, with a save.
    if launch.launched:
        stop.install()

    trainer = Trainer(
        config, grid, start, stop, verify=launch.local_rank == 0, memory=memory, lock=lock
    )

    problem = ""
    try:
        trainer.begin()
        if trainer.finished is not None:
            code = EXIT_DONE
            if launch.rank == 0:
                sys.stdout.write(
                    f"{trainer.finished} is the last checkpoint: "
                    "this stage is finished, nothing to do\n"
                )
        else:
            code = trainer.run()
            trainer.engine.optimizer.finish()
        trainer.monitor.phase("done", trainer.step)
        fault_injection.point("end")
    except (SaveError, DamageError) as error:
        # Every rank knows this error, so all of them leave together.
        code = shut_down_together(trainer, error)
    except Exception as error:
        if is_connection_lost(error, grid):
            # A peer is gone, so no further collective is possible.
            shut_down_alone(trainer, error)
        problem = str(error) or type(error).__name__
        if isinstance(error, UserError):
            trainer.logger.event(
                "stopped",
                attempt=trainer.attempt,
                reason="refused",
                step=trainer.step,
                problem=problem,
            )
        raise
    finally:
        trainer.monitor.phase("done", trainer.step)
        if problem:
            # First, so that no watchdog takes this rank's exit for its death.
            trainer.monitor.close(problem)
        trainer.close()

    stop_process_group()
    trainer.monitor.close()
    return code


class Trainer:
    """Training run of one rank: call `begin`, `run`, `close`."""

    def __init__(
        self,
        config: Config,
        grid: ProcessGrid,
        start: Start,
        stop: StopRequest,
        verify: bool,
        memory: str = "malloc: default settings",
        lock: RunLock | None = None,
    ):
        """Create checkpoint manager, monitor and batch source; start nothing.

        `memory` describes the malloc settings, for the console and the ledger.
        """
        self.config, self.grid, self.start, self.stop = config, grid, start, stop
        self.order = start.order
        self.memory = memory

        self.step, self.first_step = 0, 0
        self.last_loss: float | None = None
        self.parent: dict[str, Any] | None = None
        self.skips, self.spikes = NonFiniteCounter(), SpikeAlert()
        self.logger: RunLogger = RunLogger()
        self.finished: Path | None = None
        """Last checkpoint of the stage, found whole: nothing is left to do."""
        self.attempt = 0
        self.allowed: list[str] = []
        """Differences from the checkpoint's run that were allowed by name."""
        self.previous_end: PreviousEnd | None = None
        """How an earlier start ended, if it could not record it itself."""

        self.checkpoints = CheckpointManager(config, grid, start, lock, lambda: self.logger)
        self.writer = self.checkpoints.writer
        self.monitor = RunMonitor(config, grid, start.directory, job_facts())
        self.batches = BatchSource(config, grid, start, verify, before_raising=self._wait_for_save)

        shape = architecture_of(config)
        self.parameters = parameters(shape)
        self.flops = flops_per_token(shape, config.data.sequence_length)
        peak = (
            peak_flops(torch.cuda.get_device_name(grid.device))
            if grid.device.type == "cuda"
            else None
        )
        self.peak_flops = None if peak is None else peak * grid.layout.world_size
        self.step_tokens = config.batch.global_sequences * config.data.sequence_length

    def begin(self) -> None:
        """Choose the checkpoint, open the record, build the engine, load or draw its state.

        Collective.
        """
        # A fresh start has no run directory yet; its watchdog starts after the record is open.
        if self.start.candidates:
            self.previous_end = self.monitor.begin()
            self.monitor.phase("choose", 0)
        chosen, refused = self.checkpoints.choose()

        self.allowed = (
            []
            if chosen is None
            else check_same_run(chosen, self.start.identity, self.config.run.allow)
        )

        if chosen is not None and int(read_manifest(chosen)["step"]) >= self.order.total_steps:
            self.finished = chosen
            if self.grid.rank == 0:
                remove_unfinished(self.start.checkpoints)
            return

        self._open_record()
        self.previous_end = self.monitor.begin() or self.previous_end
        # A killed start could not record its end; its failure report does.
        if self.previous_end is not None and not self.logger.has_end_of(self.previous_end.attempt):
            self.logger.event(
                "failed", attempt=self.previous_end.attempt, problem=self.previous_end.line
            )

        begins_at = 0 if chosen is None else int(read_manifest(chosen)["step"])
        # Recorded before anything that may fail, so that a failing start counts as a start.
        self.logger.event("starting", attempt=self.attempt, step=begins_at)
        self.monitor.phase("load", begins_at)

        # Initial weights are drawn only if no checkpoint overwrites them.
        source = chosen or self.start.parent
        self.engine = Engine(self.config, self.grid, fill=source is None)
        self.monitor.attach(self.engine)

        for line in start_messages(
            self.config, self.start, self.engine, self.parameters, self.memory
        ):
            self.logger.info(line)

        if self.start.candidates or refused:
            found = len(self.start.candidates) + len(self.start.refused)
            taken = "none" if chosen is None else chosen.name
            self.logger.info(
                f"searched {self.start.checkpoints}: "
                f"found {counted(found, 'checkpoint')}, took {taken}"
            )
        for problem in refused:
            self.logger.info(f"refused: {problem}")

        if chosen is not None:
            self._resume(chosen, refused)
        else:
            self._start_anew(source)

    def run(self) -> int:
        """Train to the end of the stage or to a stop request; returns the exit code. Collective."""
        self.checkpoints.saved_at = time.monotonic()
        while self.step < self.order.total_steps:
            self.step += 1
            position = self.order.position(self.step)
            if position.step_in_chunk == 0:
                self.logger.event(
                    "chunk_started",
                    attempt=self.attempt,
                    chunk=position.name,
                    order_index=position.order_index,
                    step=self.step,
                    dropped_rows=self.order.dropped_rows(position.order_index),
                )

            result = self._one_step()
            decision = self.skips.observe(result.applied)
            if decision != "apply":
                self._log_skipped(result, decision)

            # All ranks see the same sums, so all of them stop here.
            if decision == "stop":
                self._wait_for_save()
                self.logger.event(
                    "stopped", attempt=self.attempt, reason="non-finite", step=self.step
                )
                self.logger.info(
                    f"stopped: {self.skips.limit} steps in a row were not finite; "
                    "none of them was applied"
                )
                return EXIT_FAILED

            # A rank could not save or record; the flag reaches all ranks at the same step.
            if result.flags[FAILED] > 0:
                self._wait_for_save()
                raise SaveError(self.logger.problem or RECORD_REFUSED)

            reason = self._reason_to_stop(result)

            # A chunk's numbered checkpoint also serves a request that falls on its end.
            if self.order.is_chunk_end(self.step):
                required = reason is not None or result.flags[SAVE] > 0
                self._end_chunk(required, scored=not result.flags[STOP] > 0)
            elif reason is not None or result.flags[SAVE] > 0:
                self._save(
                    checkpoint_name(self.order.consumed_chunks(self.step), self.step), held_out=None
                )

            if reason is not None and self.step < self.order.total_steps:
                self._wait_for_save(skip_verification=result.flags[STOP] > 0)
                self.monitor.stopped()
                self.logger.event("stopped", attempt=self.attempt, reason=reason, step=self.step)
                self.logger.info(
                    f"stopped on request ({reason}) at step {self.step}; "
                    "run the same command again to continue"
                )
                self._finish_record()
                return EXIT_STOPPED

        self._wait_for_save()
        self.monitor.stopped()
        # Before `finished` is recorded, so that it never follows missing rows, and after it.
        self._finish_record()
        self.logger.event("finished", attempt=self.attempt, step=self.step)
        self._finish_record()
        self.logger.info(
            f"finished at step {self.step}; see python tools/show_run.py {self.start.directory}"
        )
        return EXIT_DONE

    def close(self) -> None:
        """Stop the loader's threads and close the record.

        Does not wait for a running save. The watchdog keeps running.
        """
        self.batches.close()
        self.writer.close()
        self.logger.close()

    def _one_step(self) -> StepResult:
        began = time.monotonic()
        flags = self._flags(began)
        fault_injection.set_step(self.step)
        fault_injection.point("step.read")
        batch = self.batches.step(self.step, self.step == self.first_step, self.engine.needs_batch)

        lr = learning_rate(self.config, self.step, self.order.total_steps)
        result = self.engine.train_step(batch.tokens, lr, flags, batch.documents)

        # The host has waited for the device by now, so this is the real time of the step.
        seconds = time.monotonic() - began
        slow = self.monitor.end_step(seconds, result.flags[SECONDS:])
        if result.applied:
            self.last_loss = result.loss

        rows = self.order.rows_of(self.step)
        row = {
            "step": self.step,
            "attempt": self.attempt,
            "chunk": self.order.position(self.step).name,
            "consumed_tokens": self.step * self.step_tokens,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "rows": [rows.start, rows.stop],
            "applied": result.applied,
            "tokens_per_second": self.step_tokens / seconds,
            "mfu": None
            if self.peak_flops is None
            else self.step_tokens / seconds * self.flops / self.peak_flops,
            "seconds": seconds,
            "peak_memory_bytes": self._peak_memory_bytes(),
        }

        if (root := self.monitor.root()) is not None:
            row["state_root"] = root.root
            self.logger.root(self.step, root)
        self.logger.step(row)

        if slow is not None:
            self.logger.event("straggler", attempt=self.attempt, step=self.step, told=slow)
            self.logger.info(slow)

        fault_injection.point("step.done")
        if result.applied:
            for event in self.spikes.observe(self.step, result.loss, result.grad_norm):
                self.logger.event(
                    "spike", attempt=self.attempt, policy=self.config.spikes.policy, **event
                )
                self.logger.info(
                    f"spike {event['kind']} at step {self.step}: "
                    f"loss {result.loss:.4f}, grad_norm {result.grad_norm:.3g}"
                )
        return result

    def _finish_record(self) -> None:
        """Raise SaveError on every rank when part of the record is not on disk; collective."""
        written = [self.logger.all_written()]
        with collective_scope(self.grid.comm, "settle the record"):
            dist.broadcast_object_list(written, src=0, group=self.grid.host)
        if not written[0]:
            raise SaveError(self.logger.problem or RECORD_REFUSED)

    def _wait_for_save(self, skip_verification: bool = False) -> None:
        """Wait until the running save is complete.

        With `skip_verification` the save is neither retried nor read back.
        """
        self.monitor.phase("save", self.step)
        if skip_verification and self.stop.requested != STOP_FILE:
            self.writer.skip_verification()
        self.writer.wait()

    def _flags(self, now: float) -> list[float]:
        """Return this rank's contribution to the flags all-reduced with the step.

        These are stop, save, failure and the rank's own seconds. The step begins at `now`.
        """
        flags = [0.0, 0.0, float(self.writer.failed or bool(self.logger.problem))]
        every, request = self.config.checkpoint.every_seconds, self.monitor.poll_request()
        if request == "STOP":
            self.stop.requested = self.stop.requested or STOP_FILE

        flags[STOP] = float(self.stop.requested is not None)
        # Rank 0's clock decides; the sum over ranks carries its flag to all.
        due = every > 0 and self.grid.rank == 0 and now - self.checkpoints.saved_at >= every
        flags[SAVE] = float(due or request == "SAVE")
        return [*flags, *self.monitor.begin_step(self.step, self.writer.active)]

    def _reason_to_stop(self, result: StepResult) -> str | None:
        if result.flags[STOP] > 0:
            # The signal may have reached another rank only.
            return self.stop.requested or "signal on another rank"
        limit = self.config.run.stop_after_steps
        if limit is not None and self.step - self.first_step + 1 >= limit:
            return "run.stop_after_steps"
        return None

    def _log_skipped(self, result: StepResult, decision: str) -> None:
        position = self.order.position(self.step)
        rows = self.order.rows_of(self.step)
        bad = [name for name, norm in result.norms.items() if norm != norm or norm == float("inf")]
        self.logger.event(
            "step_skipped",
            attempt=self.attempt,
            step=self.step,
            chunk=position.name,
            rows=[rows.start, rows.stop],
            loss=str(result.loss),
            grad_norm=str(result.grad_norm),
            tensors=bad[:8],
            in_a_row=self.skips.in_a_row,
        )
        self.logger.info(
            f"step {self.step} skipped, "
            f"{'loss' if not bad else 'gradient of ' + bad[0]} not finite "
            f"({position.name} rows {rows.start}-{rows.stop - 1}; {self.skips.in_a_row} in a row)"
        )

    def _end_chunk(self, required: bool, scored: bool) -> None:
        """Save a checkpoint if one is due or `required`.

        `scored` adds the held-out loss, for which a signal leaves no time.
        """
        consumed = self.order.consumed_chunks(self.step)
        last = consumed == len(self.order.names)
        if last or required or consumed % self.config.checkpoint.every_chunks == 0:
            try:
                held_out = self._held_out_loss() if scored else None
            except DataError:
                # Save first: otherwise every start would train this chunk again and fail here.
                self._save(checkpoint_name(consumed), held_out=None)
                self._wait_for_save()
                raise
            self._save(checkpoint_name(consumed), held_out)

    def _held_out_loss(self) -> float | None:
        self.monitor.phase("evaluate", self.step)
        fault_injection.point("evaluate")
        return self.batches.held_out_loss(self.engine)

    def _save(self, name: str, held_out: float | None) -> None:
        # The save before may take long; what the ranks then do together (check, copy) may not.
        self._wait_for_save()
        began = time.monotonic()
        self.monitor.phase("evaluate", self.step)

        facts = {
            "step": self.step,
            "attempt": self.attempt,
            "loss": self.last_loss,
            "held_out_loss": held_out,
            "guard": {"finite": self.skips.state(), "spikes": self.spikes.state()},
            "parent": self.parent,
            **stage_facts(self.config, self.start, self.step),
        }

        def committed(path: Path, manifest: dict[str, Any]) -> None:
            self.monitor.saved()
            self.logger.committed(path, manifest, time.monotonic() - began)

        self.checkpoints.save(self.engine, name, facts, committed)
        # Restart the watchdog's clock when a save follows another one at once.
        self.monitor.saving(False)

    def _open_record(self) -> None:
        """Open ledger and metrics on rank 0; its errors are raised on every rank. Collective."""

        problem = ""
        leftovers: list[str] = []
        if self.grid.rank == 0:
            try:
                self.start.checkpoints.mkdir(parents=True, exist_ok=True)
                leftovers = remove_unfinished(self.start.checkpoints)
                self.logger = RankZeroRunLogger(self.config, self.start)
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = (
                    f"{error.filename or self.start.directory} cannot be written: {error.strerror}"
                )

        shared: list[Any] = [self.logger.attempt, problem, self.checkpoints.token]
        with collective_scope(self.grid.comm, "open the record"):
            dist.broadcast_object_list(shared, src=0, group=self.grid.host)
        if shared[1]:
            raise RunError(shared[1])
        self.attempt, _, self.checkpoints.token = shared
        self.monitor.watchdog.attempt = self.attempt

        if self.checkpoints.lock is not None and self.checkpoints.lock.takeover_message:
            self.logger.info(self.checkpoints.lock.takeover_message)
        for name in leftovers:
            self.logger.info(f"removed unfinished {name}")

    def _resume(self, path: Path, refused: list[str]) -> None:
        facts, _ = self.checkpoints.load(self.engine, path)
        self.step = int(facts["step"])
        self.first_step = self.step + 1
        self.last_loss, self.parent = facts.get("loss"), facts.get("parent")
        self.skips.load_state(facts["guard"]["finite"])
        self.spikes.load_state(facts["guard"]["spikes"])

        # Later checkpoints belong to a continuation that is given up.
        set_aside = set_aside_later(path, self.attempt) if self.grid.rank == 0 else []
        self.logger.recover(list_checkpoints(self.start.checkpoints))

        changes = config_differences(facts["config"], self.config.model_dump(mode="json"))
        self.logger.event(
            "resumed",
            attempt=self.attempt,
            checkpoint=path.name,
            requested=self.config.run.resume,
            step=self.step,
            refused=refused,
            set_aside=set_aside,
            layout=str(self.grid.layout),
            world_size=self.grid.layout.world_size,
            kernels=str(self.engine.kernels),
            memory=self.memory,
            config_changes=changes,
            allowed=self.allowed,
            config_sha256=self.logger.config_sha256,
            **self.checkpoints.lease_facts(),
        )

        self.logger.info(f"resumed from {path} at step {self.step} (attempt {self.attempt})")
        for text in self.allowed:
            self.logger.info(f"allowed by run.allow, although it makes this another run: {text}")
        if changes:
            self.logger.info(f"config changes since that checkpoint: {'; '.join(changes)}")

    def _start_anew(self, parent: Path | None) -> None:
        self.first_step = 1
        self.logger.event(
            "started",
            attempt=self.attempt,
            run=self.config.run.name,
            run_id=self.logger.run_id,
            world_size=self.grid.layout.world_size,
            layout=str(self.grid.layout),
            total_steps=self.order.total_steps,
            chunks=len(self.order.names),
            parameters=self.parameters,
            kernels=str(self.engine.kernels),
            memory=self.memory,
            data_manifest_sha256=self.start.manifest.sha256,
            environment=environment_facts(),
            config_sha256=self.logger.config_sha256,
            **self.checkpoints.lease_facts(),
        )

        if parent is not None:
            facts, kept = self.checkpoints.load(self.engine, parent)
            self.parent = {**self.start.transition, "moments_kept": kept}
            self.logger.event("seam", attempt=self.attempt, **self.parent)
            loaded = (
                "weights and moments"
                if kept
                else "weights alone (that checkpoint was thinned; moments start from zero)"
            )

            self.logger.info(f"{loaded} from {parent}, step {facts['step']}")

        # ckpt_000 is the state before the first step.
        self._save(checkpoint_name(0), self._held_out_loss())

    def _peak_memory_bytes(self) -> int:
        """Return this rank's peak device memory, or the process's peak resident size on a CPU."""
        if self.grid.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.grid.device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
