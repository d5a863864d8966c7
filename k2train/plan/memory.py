"""Memory of one rank at its fullest: what stays, the activations in flight, and what the work at hand needs besides.

A rank is at its fullest while micro-batches run or while gradients and weights are exchanged, whichever takes more: of
the activations little is left when the last gradients leave. Not counted: the allocator's own losses and what the
libraries of a device take for themselves.

The alternative refused is a reserve of so many percent: what a layer's backward needs depends on the layout, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from k2train.plan.action import Action
from k2train.plan.activations import (
    FP32,
    ActivationSpec,
    layer_bytes,
    peak_bytes,
    stage_bytes,
    stage_deferred_bytes,
)
from k2train.plan.cost import WEIGHT_BYTES, StateBytes, rank_parameters, state_bytes
from k2train.plan.layout import Layout

MIB = 2**20
STRIP_BYTES = {"cpu": 16 * MIB, "cuda": 64 * MIB}
"""What the logits of a strip of the loss may take in fp32: enough rows for a product to run at its full rate."""
STRIP_ROWS = {"cpu": 128, "cuda": 1024}
"""A strip has so many rows at least, also where they take more than that."""
BUCKET_BYTES = 128 * MIB
"""Size of a transfer of gradients where the config leaves it open: large enough for the full rate of a network, small
beside the gradients."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank; the parts that are there together make `total_bytes`."""

    state: StateBytes
    activations_bytes: int
    """The most that micro-batches in flight keep."""
    working_bytes: int
    """What the backward of one layer, or the loss, needs while it runs."""
    transfer_bytes: int
    """Gradients or weights on their way to other data-parallel ranks."""

    @property
    def total_bytes(self) -> int:
        """At the fullest moment."""
        return self.state.total_bytes + max(
            self.activations_bytes + self.working_bytes, self.transfer_bytes
        )


def rank_memory(
    spec: ActivationSpec,
    layout: Layout,
    program: Sequence[Action],
    pp: int,
    overlap: bool,
    bucket_bytes: int | None = None,
) -> RankMemory:
    """Memory of a rank of pipeline rank `pp` that runs `program`; `overlap` is that of the transfers."""
    peak = peak_bytes(
        program,
        lambda stage: stage_bytes(spec, layout, stage),
        lambda stage: stage_deferred_bytes(spec, layout, stage),
    )
    return RankMemory(
        state_bytes(spec.shape, layout, spec.precision, pp),
        peak,
        working_bytes(spec, layout, pp),
        transfer_bytes(spec, layout, pp, overlap, bucket_bytes),
    )


def working_bytes(spec: ActivationSpec, layout: Layout, pp: int) -> int:
    """What a rank of pipeline rank `pp` needs besides what is kept, at its fullest."""
    stages, last, working = layout.stages_of(pp), layout.num_stages - 1, layer_working_bytes(spec)
    if last not in stages:
        return working
    # When its layers begin, the last stage has used up what the final norm and the loss kept.
    used = 2 * spec.residual_bytes if len(stages) == 1 else 0
    return max(working - used, loss_working_bytes(spec))


def layer_working_bytes(spec: ActivationSpec) -> int:
    """What the backward of a layer holds at its fullest, besides what layers keep.

    Of three moments the largest: the last product, the SwiGLU, and the gate and up product. The gradient of the layer's
    output is there in all of them; what the layer kept and has used is gone.
    """
    ffn, shape = spec.split_bytes(spec.shape.ffn_hidden_size), spec.shape
    recomputed = [
        _recomputed_bytes(spec, policy) for policy in set(spec.policies(shape.num_layers))
    ]
    active = max(0 if policy == "none" else ffn for policy in set(spec.policies(shape.num_layers)))
    gathered = spec.gathered_bytes if spec.gathers else 0
    down = gathered + ffn + active + _matrix_bytes(spec, shape.ffn_hidden_size)
    swiglu = 4 * ffn - (ffn - active)
    gate_up = (
        active
        + spec.gathered_bytes
        + gathered * (1 + spec.regather)
        + _matrix_bytes(spec, 2 * shape.ffn_hidden_size)
    )
    return spec.residual_bytes + max(recomputed) + max(down, swiglu, gate_up - ffn)


def _recomputed_bytes(spec: ActivationSpec, policy: str) -> int:
    """Of a layer that runs again all that it would have kept, but for what it did, and the input of its last product."""
    if policy != "full":
        return 0
    return (
        layer_bytes(spec, "none")
        - layer_bytes(spec, "full")
        - spec.split_bytes(spec.shape.ffn_hidden_size)
    )


def _matrix_bytes(spec: ActivationSpec, width: int) -> int:
    """A weight gradient on its way into its fp32 sum: on a CPU bf16 factors cannot be added into it, and oneDNN does not."""
    if spec.device != "cpu" or (spec.precision == "fp32" and spec.matmul != "onednn"):
        return 0
    return spec.element_bytes * spec.shape.hidden_size * width // spec.tensor


def loss_working_bytes(spec: ActivationSpec) -> int:
    """What the loss holds while it runs: its input, and of a strip the logits, also in fp32, or what its gradients take."""
    width, hidden = -(-spec.shape.vocab_size // spec.tensor), spec.shape.hidden_size
    most = max(STRIP_ROWS[spec.device], STRIP_BYTES[spec.device] // (FP32 * width))
    rows = -(-spec.tokens // -(-spec.tokens // most))
    both = FP32 if spec.precision == "fp32" else FP32 + spec.element_bytes
    gradient_bytes = rows * (width * spec.element_bytes + hidden * both) + _matrix_bytes(
        spec, spec.shape.vocab_size
    )
    # Split over the sequence, the loss has its input whole and in part, and so the gradient of it.
    split = spec.gathered_bytes if spec.gathers else 0
    return spec.residual_bytes + 2 * split + max(rows * width * both, gradient_bytes)


def transfer_bytes(
    spec: ActivationSpec, layout: Layout, pp: int, overlap: bool, bucket_bytes: int | None = None
) -> int:
    """Gradients (fp32) or weights on their way: a bucket, or with `overlap` up to all of them."""
    if layout.data == 1:
        return 0
    count = rank_parameters(spec.shape, layout, pp)
    gradients, weights = FP32 * count, WEIGHT_BYTES[spec.precision] * count
    if overlap:
        return max(gradients + gradients // layout.data, weights)
    return min(gradients, bucket_bytes or BUCKET_BYTES)
