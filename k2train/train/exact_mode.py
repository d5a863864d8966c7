"""`run.exact` in an engine: units of a micro-batch, sums in a fixed tree, one thread on a CPU.

- A data-parallel rank reads consecutive rows, and so do its micro-batches. So a unit of consecutive
  rows is the same unit in every layout.
- On a CPU an engine computes with one thread: a product of several threads may cut its sums, and
  how many threads a process has follows from how many processes a machine has.

Alternatives considered:
- The number of threads as a key: on another machine another number is right, and one process for
  each core is as fast.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from k2train.model.kernels.select import Documents
from k2train.optim.exact_norm import decide_exact_step
from k2train.optim.grad_norm import StepDecision
from k2train.parallel.exact_buffer import ExactGradientBuffer, Leaves
from k2train.parallel.exact_units import losses_in_units, run_in_units
from k2train.parallel.grid import Axis, ProcessGrid
from k2train.train.setup import Setup


class ExactMode:
    """How the engine of one rank computes with `run.exact`."""

    def __init__(self, setup: Setup, grid: ProcessGrid):
        self.setup, self.grid, self.batch = setup, grid, setup.config.batch
        self.unit = self.batch.exact_unit
        self.units = self.batch.micro_sequences // self.unit
        """Units of a micro-batch."""
        leaf = self.batch.exact_leaf or self.unit
        self.leaves = Leaves(len(setup.leaves(grid.dp.rank)), leaf // self.unit)
        self._losses: list[Tensor] = []
        """Loss of each unit of this rank's step, in their order."""

    def gradients(
        self, modules: Sequence[nn.Module], dp: Axis, tp: Axis, device: torch.device
    ) -> ExactGradientBuffer:
        """Return the gradient buffer."""
        limit = self.setup.config.parallel.bucket_bytes
        return ExactGradientBuffer(modules, dp, tp, device, self.leaves, limit)

    def run_stage(
        self,
        call: Callable[[Tensor, Documents | None], Tensor],
        x: Tensor,
        documents: Documents | None,
    ) -> Tensor:
        """Apply a stage to the units of a micro-batch, each with its documents."""
        parts: Sequence[Documents | None]
        parts = [None] * self.units if documents is None else documents.cut(self.units)
        return run_in_units(x, [_with(call, part) for part in parts])

    def loss(
        self, call: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, targets: Tensor
    ) -> Tensor:
        """Return the loss of a micro-batch, and keep that of each unit for `losses`."""

        def keep(hidden: Tensor, targets: Tensor) -> Tensor:
            loss = call(hidden, targets)
            self._losses.append(loss.detach())
            return loss

        return losses_in_units(hidden, [_with(keep, part) for part in self._cut(targets)])

    def row_losses(
        self, call: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, targets: Tensor
    ) -> Tensor:
        """Return `call`'s losses [b] of a micro-batch, unit by unit; without gradients."""
        units = zip(hidden.chunk(self.units, dim=1), self._cut(targets), strict=True)
        return torch.cat([call(unit.contiguous(), part) for unit, part in units])

    def losses(self) -> Tensor:
        """Return the loss of each unit of the global batch, fp64 [units].

        Zero where another rank has it. Forgets them.
        """
        found = torch.zeros(
            self.batch.global_sequences // self.unit, dtype=torch.float64, device=self.grid.device
        )
        if self._losses:
            first = self.grid.dp.rank * len(self._losses)
            found[first : first + len(self._losses)] = torch.stack(self._losses).double()
        self._losses = []
        return found

    def decide(
        self, bins: Tensor, names: Sequence[str], losses: Tensor, flags: Sequence[float]
    ) -> StepDecision:
        """Decide about a step; collective."""
        clip_norm = self.setup.config.optimizer.clip_norm
        return decide_exact_step(
            bins, names, losses, flags, self.grid.stage, self.grid.pp, clip_norm
        )

    def _cut(self, rows: Tensor) -> list[Tensor]:
        """Cut [b, s] into the rows of units."""
        return list(rows.chunk(self.units))


def _with(call: Callable[[Tensor, Any], Tensor], second: Any) -> Callable[[Tensor], Tensor]:
    return lambda first: call(first, second)
