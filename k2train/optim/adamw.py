"""AdamW with fp32 master weights and moments, each data-parallel rank holding a shard of the rows.

State is three flat fp32 lines in the order of the gradient buffer, so a step is elementwise on two contiguous halves
(with and without weight decay). `adam_steps` counts applied updates: it is the t of the bias correction and differs from
the step of the run when a step was skipped or the moments came from an earlier stage.

Formula: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2, as in torch.optim.AdamW (decay scaled by the rate).
"""

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from k2train.parallel.gradients import Slot, SlotTable, publish
from k2train.parallel.shard import Piece


class ShardedAdamW:
    """Optimizer of the pieces of one `SlotTable`; `kernel` is `fused` (torch's) or `reference` (written out here)."""

    def __init__(
        self,
        table: SlotTable,
        device: torch.device,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        kernel: str,
    ):
        self.table, self.betas, self.eps, self.weight_decay, self.kernel = table, betas, eps, weight_decay, kernel
        self.master = torch.zeros(table.elements, device=device)
        self.exp_avg = torch.zeros_like(self.master)
        self.exp_avg_sq = torch.zeros_like(self.master)
        self.adam_steps = 0
        self._slot_of = {slot.piece.name: slot for slot in table.slots}
        assert len(self._slot_of) == len(table.slots), "two pieces carry one name"
        covered = sum(slot.elements for slot in table.slots)
        assert covered <= table.elements, "pieces overlap"

    def adopt(self, piece: Piece, values: Tensor) -> None:
        """Take fp32 initial values [piece.shape] as master weights; keeps this rank's rows."""
        slot = self._slot_of[piece.name]
        start, stop = slot.rows(self.table.dp)
        self.view("master", slot).copy_(values[start:stop])

    @property
    def lines(self) -> dict[str, Tensor]:
        """The states by name, each a line [elements]: what a checkpoint saves and fills."""
        return {"master": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def view(self, state: str, slot: Slot) -> Tensor:
        """This rank's rows of one state of a piece, in the piece's shape."""
        return self.table.local(getattr(self, state), slot)

    @torch.no_grad()
    def step(self, gradient: Tensor, lr: float) -> None:
        """Apply one update with `gradient` [elements], already clipped, then write the weights back on every rank."""
        self.adam_steps += 1
        split = self.table.decayed
        for part, decay in ((slice(0, split), self.weight_decay), (slice(split, None), 0.0)):
            if self.master[part].numel():
                update = _fused if self.kernel == "fused" else _reference
                update(
                    self.master[part],
                    gradient[part],
                    self.exp_avg[part],
                    self.exp_avg_sq[part],
                    self.adam_steps,
                    lr,
                    self.betas,
                    self.eps,
                    decay,
                )
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Write the master weights, rounded to the parameters' dtype, into the parameters of every data-parallel rank."""
        if self.table.slots:
            publish(self.table, self.master.to(self.table.slots[0].parameter.dtype))


def _fused(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, lr: float, betas: tuple[float, float], eps: float, decay: float
) -> None:
    """torch's own fused kernel through its functional interface; its step counter is a tensor that it does not advance."""
    adamw(
        [p],
        [g],
        [m],
        [v],
        [],
        [torch.tensor(float(t - 1), device=p.device)],
        fused=True,
        foreach=False,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=decay,
        eps=eps,
        maximize=False,
    )


def _reference(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, lr: float, betas: tuple[float, float], eps: float, decay: float
) -> None:
    p.mul_(1 - lr * decay)
    m.lerp_(g, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    denominator = (v.sqrt() / (1 - betas[1] ** t) ** 0.5).add_(eps)
    p.addcdiv_(m, denominator, value=-lr / (1 - betas[0] ** t))
