"""Vocabulary-parallel cross entropy, fused with the head's product; no logits are kept.

- Takes the head's input and matrix. It processes positions in strips: the logits of a strip become
  probabilities in place (one pass of torch's softmax kernel, which keeps a row in the cache). The
  factor of the loss is known, so they become at once the gradients of input and matrix. Backward
  only returns them.
- The price: the matrix's gradient is computed in the forward pass, so a schedule cannot defer it.
  The incoming gradient must be exactly 1.
- The softmax of a strip can be another function with the same arguments (`softmax`): one pass of a
  Triton kernel that needs no fp32 copy of a bf16 strip.
- The gradient of the logits is (probability - label) x factor. The factor, times the rank's share
  of the row's probability, is one number per row. It scales rows of the two small matrices [n, h],
  not of the large one [n, v].

Alternatives considered:
- bf16 logits kept until the backward: n v values, and their exponentials twice.
- Products computed again in the backward: a third more of them.

Source: the gradient in the forward pass, in strips: Hsu et al. 2024 (arXiv:2410.10989) section 3.2,
"FusedLinearCrossEntropy".
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from k2train.parallel.collective_matmul import Product
from k2train.parallel.collectives import (
    Pending,
    all_gather,
    all_reduce_start,
    reduce_scatter_start,
)
from k2train.parallel.cross_entropy import IGNORE, VocabShard, refuse_bad_labels
from k2train.parallel.grad_accumulation import GradAccumulator, accumulator_of
from k2train.parallel.grid import Axis
from k2train.parallel.shard import first_rows
from k2train.plan.memory import strip_rows

BAND_BYTES = 2 * 2**20
"""fp32 copy of a part of a bf16 strip on a CPU. It stays in the cache during the passes over it."""
SMALLEST_SHARE = 1e-20
"""Lower bound of a rank's share of a row's probability, so that its inverse is finite."""


def _softmax_(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits [r, width] into the softmax over these columns, in place.

    `index` [r, 1] is the label's column. Returns fp32 [3, r]: the maximum, the logarithm of the sum
    of exponentials below it, the label's logit. And the label's probability, fp32 [r].
    """
    rows, width = logits.shape
    if not width:
        stats = torch.zeros(4, rows, dtype=torch.float32, device=logits.device)
        stats[0] = float("-inf")
    elif logits.dtype == torch.float32:
        stats = _wide_softmax_(logits, index)
    else:
        # A bf16 strip on a CPU is converted in bands that fit the cache.
        on_cpu = logits.device.type == "cpu"
        band = min(max(1, BAND_BYTES // (4 * width)), rows) if on_cpu else rows
        wide = torch.empty(band, width, dtype=torch.float32, device=logits.device)
        parts = []
        for part, columns in zip(logits.split(band), index.split(band), strict=True):
            x = wide[: part.shape[0]].copy_(part)
            parts.append(_wide_softmax_(x, columns))
            part.copy_(x)
        stats = torch.cat(parts, dim=1)

    return stats[:3], stats[3]


def _wide_softmax_(x: Tensor, index: Tensor) -> Tensor:
    """`_softmax_` of fp32 logits; its results as one tensor [4, r]."""
    peak, label_logit = x.amax(dim=-1), x.gather(-1, index)
    # One pass of torch's kernel, in place.
    torch.softmax(x, dim=-1, out=x)
    # The largest probability is 1 / sum, at least 1 / width: its logarithm is exact. That of a
    # label may be log 0.
    log_sum, probability = x.amax(dim=-1).log_().neg_(), x.gather(-1, index)
    return torch.stack((peak, log_sum, label_logit.squeeze(-1), probability.squeeze(-1)))


def _combine_ranks(stats: Tensor, mine: Tensor, tp: Axis) -> tuple[Tensor, Tensor | None]:
    """Combine the statistics [3, r] of all ranks' columns. Collective.

    Returns the loss [r] and this rank's share of each row's probability [r] (None: all of it). One
    gather of three numbers per row; every rank then adds the same numbers in the same order.
    """
    if tp.size == 1:
        peak, log_sum, label_logit = stats.unbind()
        return log_sum + (peak - label_logit), None

    # A label's logit counts on the rank that owns its column only.
    stats[2].mul_(mine)
    peaks, sums, label_logits = all_gather(stats, tp).view(tp.size, 3, -1).unbind(1)
    # logsumexp over ranks, relative to the largest maximum.
    peak = peaks.amax(dim=0)
    parts = peaks - peak + sums
    whole = torch.logsumexp(parts, dim=0)
    share = (parts[tp.rank] - whole).exp().clamp_(min=SMALLEST_SHARE)

    return whole + (peak - label_logits.sum(dim=0)), share


Softmax = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Arguments and results as of `_softmax_`."""


@dataclass(frozen=True)
class _Strips:
    """How the strips of one loss are computed; `rows` at a time.

    `checked`: whether every label is known to be an id of the vocabulary, or IGNORE.
    """

    checked: bool
    vocabulary: VocabShard
    scale: float
    rows: int
    product: Product
    softmax: Softmax
    keep: Callable[[Tensor], None] | None = None
    """Called with the loss of each position, fp32 [s, b]."""


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        strips: _Strips,
        needs_grad: bool,
    ) -> Tensor:
        tp = strips.vocabulary.tp
        x = all_gather(hidden, tp) if tp.sequence else hidden
        wants_x, wants_weight = (needs_grad and t.requires_grad for t in (hidden, weight))
        work = _StripLoss(x, weight, labels, strips, wants_x, wants_weight)
        losses = work.run()
        ctx.save_for_backward(*work.gradients())
        ctx.saved_flags = work.dx is not None, work.returned_grad is not None
        if strips.keep is not None:
            strips.keep(losses.view(labels.shape))

        return losses.sum() * strips.scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if grad.device.type == "cpu":
            assert float(grad) == 1.0, (
                "the gradient of the fused loss is made in the forward pass, for an incoming 1"
            )
        else:
            torch._assert_async(grad == 1.0)

        saved = iter(ctx.saved_tensors)
        dx, dw = (next(saved) if has else None for has in ctx.saved_flags)
        return dx, dw, None, None, None


class _StripLoss:
    """Fused loss of one micro-batch, strip by strip: x [s, b, h], labels [s, b] as n = s b rows."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        strips: _Strips,
        wants_x: bool,
        wants_weight: bool,
    ):
        v = strips.vocabulary
        self.v, self.strip, self.product, self.shape = v, strips.rows, strips.product, x.shape
        self.softmax = strips.softmax
        self.x, self.weight = x.flatten(0, 1), first_rows(weight, v.width)

        flat = labels.reshape(-1)
        self.counted = flat != IGNORE
        self.bad: Tensor | None = None
        if strips.checked and v.tp.size == 1:
            # All but IGNORE are columns of this rank.
            self.mine, self.index = self.counted, flat.clamp(min=0).unsqueeze(-1)
        else:
            self.mine = (flat >= v.start) & (flat < v.start + v.width)
            self.index = torch.where(self.mine, flat - v.start, 0).unsqueeze(-1)
            if not strips.checked:
                self.bad = self.counted & ((flat < 0) | (flat >= v.size))
        self.factor = self.counted.float() * strips.scale

        self.dx = torch.empty_like(self.x) if wants_x else None
        self.pending: Pending | None = None
        self.accumulator = accumulator_of(weight) if wants_weight else None
        self.returned_grad: GradAccumulator | None = None
        """Gradient of a matrix without an accumulator; the backward pass returns it to autograd."""
        if wants_weight and self.accumulator is None:
            self.accumulator = self.returned_grad = GradAccumulator(
                torch.zeros_like(weight, dtype=torch.float32)
            )

        self.dtype = weight.dtype

    def run(self) -> Tensor:
        """Return the loss of each row, fp32 [n]. Computes the requested gradients on the way."""
        rows = self.x.shape[0]
        buffer = (
            self.x.new_empty(min(self.strip, rows), self.v.width)
            if self.product.writes_out
            else None
        )

        losses = []
        for begin in range(0, rows, self.strip):
            part = slice(begin, min(begin + self.strip, rows))
            out = None if buffer is None else buffer[: part.stop - begin]
            strip = self.product.multiply(self.x[part], self.weight.t(), gradient=False, out=out)

            stats, label_probability = self.softmax(strip, self.index[part])
            # The one collective per strip.
            loss, share = _combine_ranks(stats, self.mine[part], self.v.tp)
            losses.append(loss)
            if self.dx is not None or self.accumulator is not None:
                self._strip_gradients(strip, label_probability, share, part)
            # Freed before the next strip: a product with memory of its own would keep two alive.
            del strip

        if self.accumulator is not None:
            self.accumulator.complete()

        found = torch.cat(losses) * self.counted
        return found if self.bad is None else found.masked_fill_(self.bad, float("nan"))

    def _strip_gradients(
        self, strip: Tensor, label_probability: Tensor, share: Tensor | None, part: slice
    ) -> None:
        factor, label_mass = self.factor[part], self.mine[part].float()
        if share is not None:
            factor, label_mass = factor * share, label_mass / share

        # Probability minus label, written over the strip: only the label's column changes.
        if self.v.width:
            strip.scatter_(
                -1, self.index[part], (label_probability - label_mass).to(strip.dtype).unsqueeze(-1)
            )

        factor = factor.unsqueeze(-1)
        if self.dx is not None:
            self.product.multiply(strip, self.weight, gradient=True, out=self.dx[part]).mul_(factor)
            if part.stop == self.x.shape[0]:
                self.pending = self._reduce_dx(self.dx.view(self.shape))

        if self.accumulator is not None and self.v.width:
            into = first_rows(self.accumulator.total, self.v.width)
            self.product.add_weight_gradient(into, strip, (self.x[part] * factor).to(strip.dtype))

    def _reduce_dx(self, dx: Tensor) -> Pending:
        """Start the sum of the input's gradient over ranks, in the forward pass.

        With sequence parallelism only this rank's part then waits for the backward. With overlap it
        runs behind the last strip's weight gradient.
        """
        tp = self.v.tp
        start = reduce_scatter_start if tp.sequence else all_reduce_start
        return start(dx, tp, wait=not tp.overlap)

    def gradients(self) -> list[Tensor]:
        """Return the requested gradients: of the input [s(/tp), b, h], then of the matrix."""
        dx = [] if self.pending is None else [self.pending.wait()]
        return dx if self.returned_grad is None else [*dx, self.returned_grad.total.to(self.dtype)]


def fused_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    vocabulary: VocabShard,
    scale: float,
    strip: int | None = None,
    product: Product | None = None,
    softmax: Softmax | None = None,
    keep: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Fused cross entropy: `scale` times the summed loss, a scalar in fp32. Collective.

    Labels are [s, b], logits = hidden weight^T.

    - `hidden` [s(/tp), b, h] is the head's input, `weight` [>= width, h] its matrix.
    - The matrix's gradient goes to its accumulator in this call, or to autograd in the backward
      where there is none. Backward must start with 1.
    - `strip` is the number of rows at a time, by default `strip_rows`. It is the same in every
      pipeline layout, so that no bit depends on it.
    - `product` multiplies where it is exact; None: torch does.
    - `softmax` turns a strip into probabilities; None: torch's operators do.
    - `keep` is called with the loss of each position, fp32 [s, b].

    Positions labelled IGNORE give 0. Raises DataError for a label outside the vocabulary (on a CPU;
    see `k2train.parallel.cross_entropy`) before any gradient is added.
    """
    strips = _strips_of(labels, vocabulary, scale, strip, product, softmax)
    strips = replace(strips, keep=keep)
    return _FusedCrossEntropy.apply(hidden, weight, labels, strips, torch.is_grad_enabled())


@torch.no_grad()
def position_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    vocabulary: VocabShard,
    product: Product | None = None,
    softmax: Softmax | None = None,
) -> Tensor:
    """Return the loss of each position, fp32 [s, b], without gradients. Collective.

    Arguments and labels as in `fused_cross_entropy`, which adds these numbers. Raises DataError.
    """
    strips = _strips_of(labels, vocabulary, 1.0, None, product, softmax)
    x = all_gather(hidden, vocabulary.tp) if vocabulary.tp.sequence else hidden
    losses = _StripLoss(x, weight, labels, strips, wants_x=False, wants_weight=False).run()
    return losses.view(labels.shape)


def _strips_of(
    labels: Tensor,
    vocabulary: VocabShard,
    scale: float,
    strip: int | None,
    product: Product | None,
    softmax: Softmax | None,
) -> _Strips:
    """Decide how the strips are computed. Raises DataError for a label outside the vocabulary."""
    checked = refuse_bad_labels(labels, vocabulary.size)
    if strip is None:
        # By the widest rank's columns: one collective per strip, so all ranks must cut alike.
        width = -(-vocabulary.size // vocabulary.tp.size)
        strip = strip_rows(labels.numel(), width, "cpu" if labels.device.type == "cpu" else "cuda")

    if product is None or not product.exact:
        product = Product()
    return _Strips(checked, vocabulary, scale, strip, product, softmax or _softmax_)
