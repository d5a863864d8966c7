"""Sharded AdamW (ZeRO-1): fp32 master weights and moments, a flat shard per data-parallel rank.

- State is three flat fp32 shards in the order of the gradient buffer, so a step is elementwise on
  contiguous ranges.
- On one data-parallel rank a step is two ranges (with and without weight decay). On more it goes
  bucket by bucket, each gathered to the other ranks while the next is updated.
- On one rank the parameters are views of one flat tensor. In fp32 that is the master weights
  themselves, which are then in memory once. In bf16 it is their rounded copy, made in one go.
- Whether a step is applied and the factor that clips it are tensors on the device. The host need
  not know them to queue the update.
- `adam_steps` counts applied updates, the t of the bias correction. It differs from the run's step
  when a step was skipped or the moments came from an earlier stage.

Formula: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2, as in torch.optim.AdamW (decay
scaled by the rate).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from k2train.parallel.param_gather import ParamGather
from k2train.parallel.shard import ParamSlice
from k2train.parallel.shard_layout import Bucket, BufferSlot, ShardLayout
from k2train.triton_kernels.load import load_adamw


@dataclass(frozen=True)
class Hyperparameters:
    """Numbers of AdamW that no step changes."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class _Rule:
    """Numbers of one update; `decay` is 0 for tensors that do not decay."""

    t: int
    lr: float
    betas: tuple[float, float]
    eps: float
    decay: float
    divisor: Tensor | None
    skip: Tensor | None


class ShardedAdamW:
    """Optimizer of the slices of one `ShardLayout`.

    `kernel` is `fused` (torch's), `triton` (this project's) or `reference` (written out here).
    """

    def __init__(
        self,
        shard_layout: ShardLayout,
        device: torch.device,
        hyperparameters: Hyperparameters,
        kernel: str,
        bucket_bytes: int | None = None,
    ):
        self.shard_layout, self.kernel = shard_layout, kernel
        self._triton = _triton() if kernel == "triton" else None
        self.hyperparameters = hyperparameters
        self.master = torch.zeros(shard_layout.elements, device=device)
        self.exp_avg = torch.zeros_like(self.master)
        self.exp_avg_sq = torch.zeros_like(self.master)
        self.adam_steps = 0

        # A checkpoint and a digest address the rows by these names.
        self._slot_of = {slot.param_slice.name: slot for slot in shard_layout.slots}
        assert len(self._slot_of) == len(shard_layout.slots), "two slices have the same name"
        covered = sum(slot.elements for slot in shard_layout.slots)
        assert covered <= shard_layout.elements, "slices overlap"

        self.param_gather = ParamGather(shard_layout)
        self._buckets = _in_order_of_use(shard_layout, bucket_bytes)
        # One data-parallel rank gathers nothing: its parameters share one flat tensor.
        self._weights = self._share_memory() if shard_layout.dp.size == 1 else None

    @torch.no_grad()
    def _share_memory(self) -> Tensor:
        """Move all parameters into one flat tensor, in fp32 the master weights, and return it."""
        held = self.shard_layout.parameters()
        dtype = held[0][0].dtype if held else self.master.dtype
        shard = (
            self.master
            if dtype == self.master.dtype
            else torch.zeros_like(self.master, dtype=dtype)
        )

        for parameter, slots in held:
            start = slots[0].offset - slots[0].param_slice.row * slots[0].width
            view = shard.narrow(0, start, parameter.numel()).view(parameter.shape)
            parameter.data = view.copy_(parameter)

        return shard

    def set_master(self, param_slice: ParamSlice, values: Tensor) -> None:
        """Set master weights to fp32 values [param_slice.shape]; this rank keeps its rows."""
        slot = self._slot_of[param_slice.name]
        start, stop = slot.rows(self.shard_layout.dp)
        self.view("master", slot).copy_(values[start:stop])

    @property
    def flat_shards(self) -> dict[str, Tensor]:
        """States by name, each a flat shard [elements]: what a checkpoint saves and fills."""
        return {"master": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def view(self, state: str, slot: BufferSlot) -> Tensor:
        """View this rank's rows of one state of a slice, in the slice's shape."""
        return self.shard_layout.local(getattr(self, state), slot)

    @torch.no_grad()
    def step(
        self, gradient: Tensor, lr: float, divisor: Tensor | None = None, skip: Tensor | None = None
    ) -> None:
        """Queue one update and the gather of the new weights. Collective.

        - The gradient is `gradient` [elements] / `divisor`.
        - Does nothing where `skip` is 1. `divisor` and `skip` are fp32 scalars on the device.
        - The update is number `adam_steps` + 1. `count` counts it once the host knows whether it
          was applied.
        - The gradient is used up.
        """
        h = self.hyperparameters
        for bucket in self._buckets:
            part = slice(bucket.start, bucket.stop)
            # Slices without decay lie behind `decayed`, in buckets of their own.
            decay = h.weight_decay if bucket.start < self.shard_layout.decayed else 0.0
            rule = _Rule(self.adam_steps + 1, lr, h.betas, h.eps, decay, divisor, skip)
            state = self.master[part], gradient[part], self.exp_avg[part], self.exp_avg_sq[part]
            if self._triton is None:
                (_fused if self.kernel == "fused" else _reference)(*state, rule)
                self._send(bucket)
                continue

            # It writes the rounded weights in the same pass, where they are on this rank only.
            copy = self._weights if self._weights is not self.master else None
            self._triton(*state, rule, copy if copy is None else copy[part])
            if copy is None:
                self._send(bucket)

    def count(self, applied: bool) -> None:
        """Count the last step, if it was applied."""
        self.adam_steps += int(applied)

    def write_parameters(self) -> None:
        """Write the master weights, rounded, into the parameters of every data-parallel rank.

        Collective.
        """
        for bucket in self._buckets:
            self._send(bucket)
        self.param_gather.finish()

    @torch.no_grad()
    def _send(self, bucket: Bucket) -> None:
        part = slice(bucket.start, bucket.stop)
        if self._weights is None:
            self.param_gather.start(bucket, self.master[part])
        elif self._weights is not self.master:
            self._weights[part].copy_(self.master[part])

    def finish(self) -> None:
        """Wait until all parameters hold the last update. Collective.

        For readers of parameters outside a forward pass, and for the end of a run, which must not
        leave others waiting.
        """
        self.param_gather.finish()

    def wait_for(self, module: nn.Module) -> None:
        """Wait until the parameters of `module` hold the last update."""
        self.param_gather.wait_for(module)


def _in_order_of_use(shard_layout: ShardLayout, bucket_bytes: int | None) -> tuple[Bucket, ...]:
    """Order the buckets by first use in a forward pass.

    Norms, used all over the model, come first.

    On one rank nothing is sent, and each half is one bucket.
    """
    buckets = shard_layout.buckets(
        bucket_bytes if shard_layout.dp.size > 1 else 4 * shard_layout.elements + 4
    )
    return tuple(
        sorted(buckets, key=lambda bucket: (bucket.start < shard_layout.decayed, bucket.start))
    )


def _fused(p: Tensor, g: Tensor, m: Tensor, v: Tensor, rule: _Rule) -> None:
    """Update by torch's fused kernel, functional interface.

    Its step counter is a tensor that it does not keep.
    """
    adamw(
        [p],
        [g],
        [m],
        [v],
        [],
        [torch.full((), float(rule.t - 1), device=p.device)],
        fused=True,
        foreach=False,
        amsgrad=False,
        grad_scale=rule.divisor,
        found_inf=rule.skip,
        beta1=rule.betas[0],
        beta2=rule.betas[1],
        lr=rule.lr,
        weight_decay=rule.decay,
        eps=rule.eps,
        maximize=False,
    )


def _triton() -> Callable[..., None]:
    """Load the Triton kernel, which takes a rule and the tensor of the rounded weights."""
    kernel = load_adamw()

    def update(
        p: Tensor, g: Tensor, m: Tensor, v: Tensor, rule: _Rule, copy: Tensor | None
    ) -> None:
        numbers = (rule.t, rule.lr, rule.betas, rule.eps, rule.decay)
        kernel(p, g, m, v, *numbers, rule.divisor, rule.skip, copy)

    return update


def _reference(p: Tensor, g: Tensor, m: Tensor, v: Tensor, rule: _Rule) -> None:
    g = g if rule.divisor is None else g / rule.divisor

    b1, b2 = rule.betas
    new_m = m.lerp(g, 1 - b1)
    new_v = v.mul(b2).addcmul_(g, g, value=1 - b2)
    denominator = (new_v.sqrt() / (1 - b2**rule.t) ** 0.5).add_(rule.eps)
    new_p = p.mul(1 - rule.lr * rule.decay).addcdiv_(
        new_m, denominator, value=-rule.lr / (1 - b1**rule.t)
    )

    for old, new in ((p, new_p), (m, new_m), (v, new_v)):
        # Chosen and not multiplied by 0: what must not be applied may not be a number.
        old.copy_(new if rule.skip is None else torch.where(rule.skip > 0, old, new))
