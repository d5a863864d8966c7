"""Norm of the update that a step applied to the weights, equal on every rank.

- The update follows from the state after it: u = rate * m / (sqrt(v) + eps) with the corrections of
  Adam, and the weights before it from u and the decay. So nothing is copied before the step.
- It is written over the gradient, which is used up by then, and summed like the gradient's norm:
  square sums by tensor in fp64, over the ranks of a stage, then over stages.
- Costs a pass over the optimizer's state, one exchange of a number a tensor, and one wait of the
  host. A run computes it where `spikes.update_norm` asks for it.

Alternatives considered:
- In the exchange of the gradient norm: the update needs that norm to be clipped, and comes after.
- The weights before the step, kept: a third more memory for the optimizer.
"""

from math import fsum, sqrt

import torch
from torch import Tensor

from k2train.optim.adamw import ShardedAdamW
from k2train.optim.exact_norm import ExactSquareSums, value_of
from k2train.optim.grad_norm import SquareSums
from k2train.parallel.collectives import all_reduce
from k2train.parallel.comm_tracker import wait_scope
from k2train.parallel.grid import ProcessGrid


class UpdateNorm:
    """Computes the norm of the last update of `optimizer`."""

    def __init__(
        self,
        optimizer: ShardedAdamW,
        square_sums: SquareSums | ExactSquareSums,
        grid: ProcessGrid,
        asked: bool,
    ) -> None:
        self.optimizer, self.square_sums = optimizer, square_sums
        self.grid, self.asked = grid, asked

    @torch.no_grad()
    def __call__(self, shard: Tensor, lr: float, applied: bool) -> float | None:
        """Return the norm of the update that was counted last; 0 if it was not applied. Collective.

        None, and no exchange, where nobody asked. `shard` [elements] is the used gradient, and is
        overwritten.
        """
        if not self.asked:
            return None
        if not applied:
            return 0.0

        write_update(self.optimizer, shard, lr)
        sums = self.square_sums(shard)
        all_reduce(sums, self.grid.stage)
        all_reduce(sums, self.grid.pp)
        with wait_scope(self.grid.comm, "the device"):
            # Exactly rounded: no layout changes the order of a sum.
            return sqrt(fsum((sums if sums.dim() == 1 else value_of(sums)).tolist()))


def write_update(optimizer: ShardedAdamW, out: Tensor, lr: float) -> None:
    """Write the update that was counted last into `out` [elements]: weights before less after."""
    h, decayed = optimizer.hyperparameters, optimizer.shard_layout.decayed
    correction1 = 1 - h.betas[0] ** optimizer.adam_steps
    correction2 = (1 - h.betas[1] ** optimizer.adam_steps) ** 0.5

    torch.sqrt(optimizer.exp_avg_sq, out=out)
    out.div_(correction2).add_(h.eps)
    torch.div(optimizer.exp_avg, out, out=out)
    out.mul_(lr / correction1)

    # after = keep * before - u, so before - after = (u + (1 - keep) * after) / keep.
    keep = 1.0 - lr * h.weight_decay
    part = slice(0, decayed)
    out[part].add_(optimizer.master[part], alpha=1.0 - keep).div_(keep)
