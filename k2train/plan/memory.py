"""Peak memory of one rank: persistent state, activations in flight, working set.

- The peak is while micro-batches run, or while gradients and weights are exchanged, whichever is
  larger. Few activations are left when the last gradients leave.
- Not counted: the allocator's own losses, and what a device's libraries take for themselves.

Alternatives considered:
- A reserve of some percent: a layer's backward depends on the layout, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from k2train.plan.action import Action, Op
from k2train.plan.activations import (
    FP32,
    ActivationSpec,
    layer_bytes,
    layer_deferred_bytes,
    peak_bytes,
    stage_bytes,
    stage_deferred_bytes,
)
from k2train.plan.buckets import DOWN, GATE_UP
from k2train.plan.cost import (
    WEIGHT_BYTES,
    StateBytes,
    rank_parameters,
    state_bytes,
)
from k2train.plan.layout import Layout
from k2train.plan.leaving import leaving_bytes

MIB = 2**20
STRIP_BYTES = {"cpu": 16 * MIB, "cuda": 512 * MIB}
"""Bytes of one strip of the loss's logits, counted in fp32: enough rows for a product at its full
rate.

Each strip also reads and writes the fp32 gradient of the head's matrix once. On a CUDA device that
counts: 4096 rows of a vocabulary of 32,000 make it two passes of a micro-batch of 8192 tokens,
where 1024 rows made it eight.
"""
STRIP_ROWS = {"cpu": 128, "cuda": 1024}
"""Smallest number of rows of a strip, even if they take more than STRIP_BYTES."""
BUCKET_BYTES = 128 * MIB
"""Default size of a gradient transfer.

Large enough for the full rate of a network, small beside the gradients.
"""


def strip_rows(rows: int, width: int, device: str) -> int:
    """Rows per strip of logits [rows, width]: what STRIP_BYTES holds, at least STRIP_ROWS, evenly.

    Measured on two cores, hidden 256, vocabulary 8192, 1 thread: the three products of 1024 rows
    take 186 ms in strips of 32, 159 of 128, 153 of 256, 148 of 512 and 142 of 1024 (bf16: 75, 42,
    35, 34, 35).
    """
    most = max(STRIP_ROWS[device], STRIP_BYTES[device] // (FP32 * max(width, 1)))
    strips = max(1, -(-rows // most))
    return max(1, -(-rows // strips))


@dataclass(frozen=True)
class RankMemory:
    """Memory of one rank in bytes. Parts that exist at the same time make `total_bytes`."""

    state: StateBytes
    activations_bytes: int
    """Most bytes kept by micro-batches in flight."""
    working_bytes: int
    """Working set of one layer's backward, or of the loss."""
    transfer_bytes: int
    """Gradients or weights in flight to other data-parallel ranks, and what is computed meanwhile.
    """

    @property
    def total_bytes(self) -> int:
        """Bytes at the peak."""
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
    """Memory of one rank of pipeline rank `pp` that runs `program`.

    `overlap` is that of the transfers.
    """
    kept, waiting = (
        {stage: of(spec, layout, stage) for stage in layout.stages_of(pp)}
        for of in (stage_bytes, stage_deferred_bytes)
    )
    peak = peak_bytes(program, kept.__getitem__, waiting.__getitem__)
    return RankMemory(
        state_bytes(spec.shape, layout, spec.precision, pp),
        peak,
        working_bytes(spec, layout, pp, _splits(program)) + crossing_bytes(spec, pp),
        transfer_bytes(spec, layout, program, pp, overlap, bucket_bytes),
    )


def _splits(program: Sequence[Action]) -> bool:
    """Whether a program defers weight gradients."""
    return any(action.op is Op.BACKWARD_INPUT for action in program)


def working_bytes(spec: ActivationSpec, layout: Layout, pp: int, split: bool = False) -> int:
    """Peak working set of a rank of pipeline rank `pp`, besides what is kept.

    `split`: weight gradients are deferred, and a recomputed layer is among what they keep.
    """
    stages, last, working = layout.stages_of(pp), layout.num_stages - 1, layer_working_bytes(spec)
    if split and "full" in spec.policies(spec.shape.num_layers):
        inputs = spec.split_bytes(spec.shape.hidden_size + spec.shape.ffn_hidden_size)
        working = max(0, working - (layer_deferred_bytes(spec) - inputs))
    if last not in stages:
        return working
    # When its layers begin, the last stage has used up what the final norm and the loss kept.
    used = 2 * spec.residual_bytes if len(stages) == 1 else 0
    return max(working - used, loss_working_bytes(spec))


def crossing_bytes(spec: ActivationSpec, pp: int) -> int:
    """Residual streams on their way between stages, besides those that micro-batches keep.

    Ranks behind the first have already received their next input, and the gradient of the one
    before may still be sent.
    """
    return 2 * spec.residual_bytes if pp else 0


def layer_working_bytes(spec: ActivationSpec) -> int:
    """Peak working set of a layer's backward, besides what layers keep."""
    return max(size for _, size in layer_moments(spec))


def layer_moments(spec: ActivationSpec) -> tuple[tuple[float, int], ...]:
    """Three moments of a layer's backward: (position that has its gradients, working set).

    The last product, the SwiGLU, and the gate and up product. The gradient of the layer's output
    exists in all of them. Kept tensors that were used are gone.
    """
    ffn, shape = spec.split_bytes(spec.shape.ffn_hidden_size), spec.shape
    recomputed = [
        _recomputed_bytes(spec, policy) for policy in set(spec.policies(shape.num_layers))
    ]
    active = max(0 if policy == "none" else ffn for policy in set(spec.policies(shape.num_layers)))
    gathered = spec.gathered_bytes if spec.gathers else 0

    down = gathered + ffn + active + _product_bytes(spec, shape.ffn_hidden_size, ffn)
    swiglu = 4 * ffn - (ffn - active)
    # The sum over ranks begins when an upcast product's copies are gone.
    gate_up = (
        active
        + spec.gathered_bytes
        + gathered * (spec.regather + (spec.matmul != "upcast"))
        + _product_bytes(spec, 2 * shape.ffn_hidden_size, spec.gathered_bytes)
    )

    always = spec.residual_bytes + max(recomputed)
    return (1.0, always + down), (DOWN, always + swiglu), (GATE_UP, always + gate_up - ffn)


def _recomputed_bytes(spec: ActivationSpec, policy: str) -> int:
    """Bytes of a recomputed layer: all it would have kept, except two tensors.

    These are its input, which it kept, and the input of its last product.
    """
    if policy != "full":
        return 0
    return (
        layer_bytes(spec, "none")
        - layer_bytes(spec, "full")
        - spec.split_bytes(spec.shape.ffn_hidden_size)
    )


def _product_bytes(spec: ActivationSpec, width: int, result_bytes: int) -> int:
    """Bytes that a product with a matrix of `width` columns needs besides its factors and result.

    Upcast, these are both factors and the result in fp32; they are gone when the result is rounded.
    """
    if spec.matmul != "upcast":
        return _matrix_bytes(spec, width)
    local, hidden = width // spec.tensor, spec.shape.hidden_size
    return FP32 * (spec.tokens * (local + hidden) + local * hidden) - result_bytes


def _matrix_bytes(spec: ActivationSpec, width: int) -> int:
    """Bytes of a weight gradient before its addition to the fp32 sum.

    Only on a CPU: bf16 factors cannot be added into fp32 there, and oneDNN does not add.
    """
    if spec.device != "cpu" or (spec.precision == "fp32" and spec.matmul != "onednn"):
        return 0
    return spec.element_bytes * spec.shape.hidden_size * width // spec.tensor


def loss_working_bytes(spec: ActivationSpec) -> int:
    """Working set of the loss: its input, and the logits of one strip.

    The logits also in fp32, where torch's operators make the softmax of bf16, or what their
    gradients need.
    """
    width, hidden = -(-spec.shape.vocab_size // spec.tensor), spec.shape.hidden_size
    rows = strip_rows(spec.tokens, width, spec.device)
    both = FP32 if spec.precision == "fp32" else FP32 + spec.element_bytes
    logits = spec.element_bytes if spec.loss == "triton" else both
    gradient_bytes = rows * (width * spec.element_bytes + hidden * both) + _matrix_bytes(
        spec, spec.shape.vocab_size
    )

    if spec.matmul == "upcast":
        # The input's gradient is a product of the strip: its factors and result in fp32.
        upcast = FP32 * (width * hidden + rows * (width + hidden))
        gradient_bytes = rows * width * spec.element_bytes + upcast

    # Split over the sequence, the loss has its input whole and in part, and so the gradient of it.
    split = spec.gathered_bytes if spec.gathers else 0
    return spec.residual_bytes + 2 * split + max(rows * width * logits, gradient_bytes)


def transfer_bytes(
    spec: ActivationSpec,
    layout: Layout,
    program: Sequence[Action],
    pp: int,
    overlap: bool,
    bucket_bytes: int | None = None,
) -> int:
    """Gradients (fp32) or weights in flight, and what is computed meanwhile.

    Without `overlap` one bucket. With it a bucket leaves when its last parameter has its gradient,
    and none is back before the step's end: the layer's backward that runs then counts.
    """
    if layout.data == 1:
        return 0
    count, limit = rank_parameters(spec.shape, layout, pp), bucket_bytes or BUCKET_BYTES
    if overlap:
        weights = WEIGHT_BYTES[spec.precision] * count
        moments, norm = layer_moments(spec), norm_working_bytes(spec)
        return max(weights, leaving_bytes(spec, layout, program, pp, limit, moments, norm))
    bucket = min(FP32 * count, limit)
    return bucket + bucket // layout.data


def norm_working_bytes(spec: ActivationSpec) -> int:
    """Working set of a norm's backward: gradient, input and their product in fp32, and the sum.

    The residual stream's gradient waits beside it.
    """
    wide = FP32 * spec.local_tokens * spec.shape.hidden_size
    return (wide if spec.precision == "fp32" else 3 * wide) + 3 * spec.residual_bytes
