"""The training loop: build, resume, step through the chunks, save one numbered checkpoint after each.

Where a step stands in the data is computed from its number, so a restart needs the checkpoint's step and nothing else.
Every decision (skip, save, stop) is taken from sums that all ranks share in the step's one exchange, so all ranks take it
at the same step. One path for every layout, a single process included.
"""

import contextlib
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from k2train.allocator import keep_memory
from k2train.checkpoint.load import agree_on_checkpoint, load_states
from k2train.checkpoint.manifest import checkpoint_name, list_checkpoints, read_manifest
from k2train.checkpoint.save import CheckpointWriter, SaveError, remove_unfinished, set_aside_later, snapshot
from k2train.config import Config, config_differences
from k2train.data.loader import Batch, Loader
from k2train.engine import Engine, StepResult, architecture_of
from k2train.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, CheckpointError, DataError, RunError, UserError
from k2train.guard.finite import SkipCounter
from k2train.guard.signals import StopRequest
from k2train.guard.spikes import SpikeAlert
from k2train.parallel.environment import Launch
from k2train.parallel.grid import ProcessGrid, choose_device, start_process_group, stop_process_group
from k2train.plan.cost import flops_per_token, parameters, peak_flops
from k2train.preflight import Start, learning_rate
from k2train.record.environment import environment_facts
from k2train.record.jsonl import plain
from k2train.recorder import RankZeroRecorder, Recorder, announcement, stage_facts

STOP, SAVE, FAILED = 0, 1, 2
"""Places of the flags in the step's exchange."""


def train(config: Config, launch: Launch, start: Start, stop: StopRequest) -> int:
    """Run the stage on this rank and return the exit code."""
    device = choose_device(launch)
    memory = keep_memory(device.type)
    start_process_group(launch, device)
    grid = ProcessGrid(start.layout, launch.rank, device)
    if launch.launched:
        stop.install()
    trainer = Trainer(config, grid, start, stop, verify=launch.local_rank == 0, memory=memory)
    try:
        trainer.begin()
        if trainer.finished is not None:
            code = EXIT_DONE
            if launch.rank == 0:
                sys.stdout.write(f"{trainer.finished} is the last checkpoint: this stage is finished, nothing to do\n")
        else:
            code = trainer.run()
            trainer.engine.optimizer.finish()
    except SaveError as error:
        code = trainer.end_unsaved(error)
    finally:
        trainer.close()
    stop_process_group()
    return code


class Trainer:
    """One rank's part of a run; `begin`, `run`, `close`."""

    def __init__(
        self,
        config: Config,
        grid: ProcessGrid,
        start: Start,
        stop: StopRequest,
        verify: bool,
        memory: str = "malloc as it is",
    ):
        """`memory` says how the process keeps its host memory, for the first lines and the record."""
        self.config, self.grid, self.start, self.stop = config, grid, start, stop
        self.order = start.order
        self.memory = memory
        self.step, self.first_step = 0, 0
        self.saved_at = time.monotonic()
        self.last_loss: float | None = None
        self.parent: dict[str, Any] | None = None
        self.skips, self.spikes = SkipCounter(), SpikeAlert()
        self.recorder: Recorder = Recorder()
        self.finished: Path | None = None
        """The last checkpoint of the stage, found whole: there is nothing left to do."""
        self.attempt = 0
        self.loader = Loader(
            start.manifest,
            start.order,
            grid.dp.rank,
            grid.dp.size,
            config.batch.micro_sequences,
            config.model.vocab_size,
            verify=verify,
            documents=config.data.cross_documents == "block",
        )
        c = config.checkpoint
        self.writer = CheckpointWriter(start.checkpoints, grid, c.keep_optimizer_states, c.asynchronous)
        shape = architecture_of(config)
        self.parameters = parameters(shape)
        self.flops = flops_per_token(shape, config.data.sequence_length)
        peak = peak_flops(torch.cuda.get_device_name(grid.device)) if grid.device.type == "cuda" else None
        self.peak_flops = None if peak is None else peak * grid.layout.world_size
        self.step_tokens = config.batch.global_sequences * config.data.sequence_length

    def begin(self) -> None:
        """Choose the checkpoint together, open the record, build the engine, load or draw its state."""
        chosen, refused = agree_on_checkpoint(self.start.candidates, self.grid)
        refused = [*self.start.refused, *refused]
        if self.start.candidates and chosen is None:
            raise CheckpointError(f"no checkpoint in {self.start.checkpoints} is whole: {'; '.join(refused)}")
        if self.start.parent is not None:
            parent, problems = agree_on_checkpoint([self.start.parent], self.grid)
            if parent is None:
                raise CheckpointError(f"run.init_from: {problems[0]}")
        if chosen is not None and int(read_manifest(chosen)["step"]) >= self.order.total_steps:
            self.finished = chosen
            return
        self._open_record()
        source = chosen or self.start.parent
        self.engine = Engine(self.config, self.grid, fill=source is None)
        for line in announcement(self.config, self.start, self.engine, self.parameters):
            self.recorder.note(line)
        self.recorder.note(self.memory)
        for problem in refused:
            self.recorder.note(f"refused: {problem}")
        if chosen is not None:
            self._resume(chosen, refused)
        else:
            self._start_anew(source)

    def run(self) -> int:
        """Train to the end of the stage, or to a request to stop; returns the exit code."""
        self.saved_at = time.monotonic()
        while self.step < self.order.total_steps:
            self.step += 1
            position = self.order.position(self.step)
            if position.step_in_chunk == 0:
                self.recorder.event(
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
                self._tell_skipped(result, decision)
            if decision == "stop":
                self.writer.wait()
                self.recorder.event("stopped", attempt=self.attempt, reason="non-finite", step=self.step)
                self.recorder.note(
                    f"{self.skips.limit} steps in a row were not finite; stopped, nothing was applied since"
                )
                return EXIT_FAILED
            if result.flags[FAILED] > 0:
                self.writer.wait()
                raise SaveError(
                    self.recorder.problem or "rank 0 could not write the record of the run; see its message"
                )
            reason = self._reason_to_stop(result)
            if self.order.is_chunk_end(self.step):
                self._end_chunk(required=reason is not None or result.flags[SAVE] > 0)
            elif reason is not None or result.flags[SAVE] > 0:
                self._save(checkpoint_name(self.order.consumed_chunks(self.step), self.step), held_out=None)
            if reason is not None and self.step < self.order.total_steps:
                self.writer.wait()
                self.recorder.event("stopped", attempt=self.attempt, reason=reason, step=self.step)
                self.recorder.note(
                    f"stopped on request ({reason}) at step {self.step}; start the same command to go on"
                )
                return EXIT_STOPPED
        self.writer.wait()
        self.recorder.event("finished", attempt=self.attempt, step=self.step)
        return EXIT_DONE

    def end_unsaved(self, error: SaveError) -> int:
        """Every rank knows that a checkpoint could not be written: say it, in the ledger too if that can be written."""
        with contextlib.suppress(OSError):
            self.recorder.event(
                "stopped", attempt=self.attempt, reason="save failed", step=self.step, problem=str(error)
            )
        self.recorder.note(str(error))
        return EXIT_FAILED

    def close(self) -> None:
        """Stop the loader's threads and the record. A save under way ends with the process."""
        self.loader.close()
        self.recorder.close()

    def _one_step(self) -> StepResult:
        began = time.monotonic()
        batch = self._read()
        lr = learning_rate(self.config, self.step, self.order.total_steps)
        flags = [0.0, 0.0, float(self.writer.failed or bool(self.recorder.problem))]
        flags[STOP] = float(self.stop.requested is not None)
        every = self.config.checkpoint.every_seconds
        flags[SAVE] = float(every > 0 and self.grid.rank == 0 and began - self.saved_at >= every)
        result = self.engine.train_step(batch.tokens, lr, flags, batch.documents)
        seconds = time.monotonic() - began
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
            "mfu": None if self.peak_flops is None else self.step_tokens / seconds * self.flops / self.peak_flops,
            "seconds": seconds,
            "peak_memory_bytes": self._peak_memory_bytes(),
        }
        self.recorder.step(row)
        if result.applied:
            for event in self.spikes.observe(self.step, result.loss, result.grad_norm):
                self.recorder.event("spike", attempt=self.attempt, policy=self.config.spikes.policy, **event)
                self.recorder.note(
                    f"spike {event['kind']} at step {self.step}: loss {result.loss:.4f}, grad_norm {result.grad_norm:.3g}"
                )
        return result

    def _read(self) -> Batch:
        """This rank's micro-batches of the step."""
        opens = self.step == self.first_step or self.order.position(self.step).step_in_chunk == 0
        return self._agreed(partial(self.loader.step, self.step), opens)

    def _agreed(self, read: Callable[[], Batch], opens: bool) -> Batch:
        """What `read` gives, on the device; where it opens a chunk, a damaged one stops all ranks alike."""
        problem, batch = "", Batch([])
        try:
            # Also where the batch is not looked at: this rank may be the one that verifies for its machine.
            if opens or self.engine.needs_batch:
                batch = read()
        except DataError as error:
            if not opens:
                raise
            problem = str(error)
        if opens:
            problems: list[str] = [""] * self.grid.layout.world_size
            dist.all_gather_object(problems, problem, group=self.grid.host)
            if any(problems):
                # All ranks leave here together, so the checkpoint of the chunk before can still be finished.
                self.writer.wait()
                raise DataError(next(text for text in problems if text))
        return batch.to(self.grid.device)

    def _reason_to_stop(self, result: StepResult) -> str | None:
        if result.flags[STOP] > 0:
            return self.stop.requested or "signal on another rank"
        limit = self.config.run.stop_after_steps
        if limit is not None and self.step - self.first_step + 1 >= limit:
            return "run.stop_after_steps"
        return None

    def _tell_skipped(self, result: StepResult, decision: str) -> None:
        position = self.order.position(self.step)
        rows = self.order.rows_of(self.step)
        bad = [name for name, norm in result.norms.items() if norm != norm or norm == float("inf")]
        self.recorder.event(
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
        self.recorder.note(
            f"step {self.step} skipped, {'loss' if not bad else 'gradient of ' + bad[0]} not finite "
            f"({position.name} rows {rows.start}-{rows.stop - 1}; {self.skips.in_a_row} in a row)"
        )

    def _end_chunk(self, required: bool) -> None:
        consumed = self.order.consumed_chunks(self.step)
        last = consumed == len(self.order.names)
        if last or required or consumed % self.config.checkpoint.every_chunks == 0:
            try:
                held_out = self._held_out_loss()
            except DataError:
                # The chunk just trained must not be lost, and trained again at every start, for the sake of its score.
                self._save(checkpoint_name(consumed), held_out=None)
                self.writer.wait()
                raise
            self._save(checkpoint_name(consumed), held_out)

    def _held_out_loss(self) -> float | None:
        """Mean loss over the held-out chunk (nats a target); None when the data has none."""
        batches = self.loader.num_held_out_batches()
        if self.config.data.held_out_batches is not None:
            batches = min(batches, self.config.data.held_out_batches)
        if batches == 0:
            return None
        losses = []
        for index in range(batches):
            batch = self._agreed(partial(self.loader.held_out, index), opens=index == 0)
            losses.append(self.engine.evaluate(batch.tokens, batch.documents))
        return sum(losses) / batches

    def _save(self, name: str, held_out: float | None) -> None:
        optimizer = self.engine.optimizer
        began = time.monotonic()
        frozen = snapshot(self.engine.gradients.table, optimizer.lines, self.engine.dtype)
        facts = {
            "step": self.step,
            "attempt": self.attempt,
            "adam_steps": optimizer.adam_steps,
            "loss": self.last_loss,
            "held_out_loss": held_out,
            "guard": {"finite": self.skips.state(), "spikes": self.spikes.state()},
            "parent": self.parent,
            **stage_facts(self.config, self.start, self.step),
        }

        def committed(path: Path, manifest: dict[str, Any]) -> None:
            self.recorder.committed(path, manifest, time.monotonic() - began)

        # A loss that is not finite has no JSON form of its own.
        self.writer.save(name, frozen, dict(plain(facts)), committed)
        self.saved_at = time.monotonic()

    def _open_record(self) -> None:
        """Rank 0 opens ledger and metrics; what goes wrong there is every rank's error, so that none waits."""
        problem = ""
        leftovers: list[str] = []
        if self.grid.rank == 0:
            try:
                self.start.checkpoints.mkdir(parents=True, exist_ok=True)
                leftovers = remove_unfinished(self.start.checkpoints)
                self.recorder = RankZeroRecorder(self.config, self.start)
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = f"{error.filename or self.start.directory} cannot be written: {error.strerror}"
        told: list[Any] = [self.recorder.attempt, problem]
        dist.broadcast_object_list(told, src=0, group=self.grid.host)
        if told[1]:
            raise RunError(told[1])
        self.attempt = told[0]
        for name in leftovers:
            self.recorder.note(f"removed {name}, which was never finished")

    def _resume(self, path: Path, refused: list[str]) -> None:
        facts = read_manifest(path)
        load_states(path, self.engine.gradients.table, self.engine.optimizer.lines, self.grid, self.engine.dtype)
        self._adopt(facts["adam_steps"])
        self.step = int(facts["step"])
        self.first_step = self.step + 1
        self.last_loss, self.parent = facts.get("loss"), facts.get("parent")
        self.skips.load_state(facts["guard"]["finite"])
        self.spikes.load_state(facts["guard"]["spikes"])
        set_aside = set_aside_later(path, self.attempt) if self.grid.rank == 0 else []
        self.recorder.recover(list_checkpoints(self.start.checkpoints))
        changes = config_differences(facts["config"], self.config.model_dump(mode="json"))
        self.recorder.event(
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
        )
        self.recorder.note(f"resumed from {path} at step {self.step} (attempt {self.attempt})")
        if changes:
            self.recorder.note(f"changed since that checkpoint: {'; '.join(changes)}")

    def _start_anew(self, parent: Path | None) -> None:
        self.first_step = 1
        self.recorder.event(
            "started",
            attempt=self.attempt,
            run=self.config.run.name,
            run_id=self.recorder.run_id,
            world_size=self.grid.layout.world_size,
            layout=str(self.grid.layout),
            total_steps=self.order.total_steps,
            chunks=len(self.order.names),
            parameters=self.parameters,
            kernels=str(self.engine.kernels),
            memory=self.memory,
            data_manifest_sha256=self.start.manifest.sha256,
            environment=environment_facts(),
        )
        if parent is not None:
            facts = read_manifest(parent)
            kept = load_states(
                parent, self.engine.gradients.table, self.engine.optimizer.lines, self.grid, self.engine.dtype
            )
            self._adopt(facts["adam_steps"] if kept else 0)
            self.parent = {**self.start.seam, "moments_kept": kept}
            self.recorder.event("seam", attempt=self.attempt, **self.parent)
            told = (
                "weights and moments"
                if kept
                else "weights alone (that checkpoint was thinned; moments start from zero)"
            )
            self.recorder.note(f"{told} from {parent}, step {facts['step']}")
        self._save(checkpoint_name(0), self._held_out_loss())

    def _adopt(self, adam_steps: int) -> None:
        self.engine.optimizer.adam_steps = int(adam_steps)
        self.engine.optimizer.publish()

    def _peak_memory_bytes(self) -> int:
        """Of this rank: device memory on an accelerator, else the process's largest resident size."""
        if self.grid.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.grid.device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
