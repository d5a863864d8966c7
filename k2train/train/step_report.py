"""Step report: metrics row, skipped steps and spikes of each step, for the run logger."""

import resource
from collections.abc import Sequence
from math import isfinite
from typing import NamedTuple

import torch

from k2train.guard.spike_verdict import SpikeVerdict, per_rate
from k2train.plan.cost import flops_per_token
from k2train.plan.device_peak import peak_flops, peak_precision
from k2train.record.events import ChunkStarted, Faults, Spike, StepSkipped
from k2train.record.metrics import StepRecord
from k2train.record.rollback_events import StepRechecked
from k2train.train.device_use import DeviceUse
from k2train.train.preflight import Start
from k2train.train.recheck import Rechecked, recheck_text
from k2train.train.row_exposure import SubsetLosses
from k2train.train.run_logger import RunLogger
from k2train.train.state import TrainState
from k2train.train.step_result import StepResult


class Done(NamedTuple):
    """A finished step, as rank 0 reports it."""

    step: int
    result: StepResult
    lr: float
    seconds: float
    ids: str
    """Hash of the ids that the step was fed."""
    state_root: str | None
    subsets: SubsetLosses | None
    row_targets: Sequence[int] | None
    """Targets of each row, where loss masks say which tokens are learned."""


class StepReport:
    """Reports the steps of a run to `logger`; `device` is the one that computes.

    `use`: the use of rank 0's device; None on other ranks.
    """

    def __init__(
        self, start: Start, logger: RunLogger, device: torch.device, use: DeviceUse | None = None
    ):
        self.start, self.logger, self.device, self._use = start, logger, device, use
        setup = start.setup
        self._flops = flops_per_token(setup.architecture, setup.config.data.sequence_length)
        self._peak = peak_precision(setup.config.precision, setup.config.kernels.matmul)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        peak = peak_flops(name, self._peak)
        self._peak_flops = None if peak is None else peak * start.layout.world_size

    def begins(self, step: int) -> None:
        """Report a step that begins: an event where it opens a chunk."""
        if self._use is not None:
            self._use.begin()
        order = self.start.order
        position = order.position(step)
        if position.step_in_chunk == 0:
            self.logger.event(
                ChunkStarted(
                    attempt=self.logger.attempt,
                    chunk=position.name,
                    order_index=position.order_index,
                    step=step,
                    dropped_rows=order.dropped_rows(position.order_index),
                )
            )

    def done(self, done: Done) -> None:
        """Report a finished step: its metrics row, and an event where values were changed."""
        order, tokens = self.start.order, self.start.setup.step_tokens
        step, result, rows = done.step, done.result, order.rows_of(done.step)
        speed = tokens / done.seconds
        self.logger.step(
            StepRecord(
                step,
                self.logger.attempt,
                chunk=order.position(step).name,
                consumed_tokens=step * tokens,
                loss=result.loss,
                grad_norm=result.grad_norm,
                lr=done.lr,
                rows=[rows.start, rows.stop],
                ids=done.ids,
                applied=result.applied,
                tokens_per_second=speed,
                mfu=None if self._peak_flops is None else speed * self._flops / self._peak_flops,
                mfu_peak=None if self._peak_flops is None else self._peak,
                seconds=done.seconds,
                peak_memory_bytes=self._peak_memory_bytes(),
                state_root=done.state_root,
                update_norm=result.update_norm,
                subsets=done.subsets,
                targets=None if done.row_targets is None else sum(done.row_targets),
                device=None if self._use is None else self._use.since_begin(),
            )
        )
        if result.faults:
            self.logger.event(Faults(attempt=self.logger.attempt, step=step, faults=result.faults))
            self.logger.info(f"step {step}: {', '.join(result.faults)} changed on purpose")

    def skipped(self, state: TrainState, result: StepResult) -> None:
        """Report a step that was not applied, and why: not finite, or too large."""
        step, guard = state.step, state.guard
        in_a_row = guard.reaction.outliers.in_a_row if result.outlier else guard.finite.in_a_row
        name, rows = self.start.order.position(step).name, self.start.order.rows_of(step)
        bad = [key for key, norm in result.norms.items() if norm != norm or norm == float("inf")]
        self.logger.event(
            StepSkipped(
                attempt=self.logger.attempt,
                step=step,
                chunk=name,
                rows=(rows.start, rows.stop),
                loss=str(result.loss),
                grad_norm=str(result.grad_norm),
                tensors=tuple(bad[:8]),
                in_a_row=in_a_row,
                reason="outlier" if result.outlier else None,
            )
        )
        self.logger.info(
            f"step {step} skipped, {self._reason(result, bad)} "
            f"({name} rows {rows.start}-{rows.stop - 1}; {in_a_row} in a row)"
        )

    def _reason(self, result: StepResult, bad: Sequence[str]) -> str:
        if result.outlier:
            return f"loss {result.loss:.4f}, grad_norm {result.grad_norm:.3g} far from usual"
        if bad:
            return f"gradient of {bad[0]} not finite"
        if not isfinite(result.loss):
            return "loss not finite"
        clip_norm = self.start.setup.config.optimizer.clip_norm
        clipped = (
            "without optimizer.clip_norm" if clip_norm is None else f"to clip to {clip_norm:g}"
        )
        return f"gradient norm {result.grad_norm:.3g} is too large {clipped}"

    def rechecked(self, step: int, found: Rechecked) -> None:
        """Report a step that was computed again, and which rank was wrong."""
        self.logger.event(
            StepRechecked(
                attempt=self.logger.attempt,
                step=step,
                chunk=self.start.order.position(step).name,
                same=found.same,
                ranks=found.ranks,
                losses=tuple(str(sums.loss) for sums in found.sums),
                grad_norms=tuple(str(sums.grad_norm) for sums in found.sums),
                tensors=found.tensors,
                applied=found.applied,
            )
        )
        self.logger.info(f"step {step}, done again: {recheck_text(found)}")

    def spikes(self, state: TrainState, result: StepResult, lr: float) -> list[SpikeVerdict]:
        """Observe an applied step; report its verdicts on spikes, and return them."""
        policy = self.start.setup.config.spikes.policy
        update = per_rate(result.update_norm, lr)
        found = state.guard.spikes.observe(state.step, result.loss, result.grad_norm, update)
        for verdict in found:
            self.logger.event(Spike(attempt=self.logger.attempt, policy=policy, **verdict.row()))
            self.logger.info(verdict.sentence(result.loss, result.grad_norm))
        return found

    def _peak_memory_bytes(self) -> int:
        """Return this rank's peak device memory, or the process's peak resident size on a CPU."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
