"""Peak memory of a rank under other programs: states, activations, logits, gathered weights.

- `plan.memory` knows this project's kernels tensor by tensor. Published rows come from programs
  that keep other tensors. Their formulas are those of Korthikanti et al. 2022
  (arXiv:2205.05198), widened to gated MLPs and grouped heads.
- Bytes that a program allocates. What its allocator reserves comes on top, as a range.

    bytes a token and layer    kept whole (L tokens)          divided by tensor
    norms' inputs, outputs     8 h
    dropout masks              2 h, where fp16 programs drop
    query, key, value, output                                 2 (a + 2 g) d + 2 h
    scores                                                    5 a s, unless attention is fused
    MLP                                                       4 f, gated 6 f

  In fp8 Transformer Engine keeps the input of each product as it was cast, one byte instead of two;
  attention's output is then there twice.

    kept besides, by programs that say so (`Workload.keeps`)
    norms       4 h (L tokens)      norms of plain operators: their result before the gain
    gathered    4 h (T - L tokens)  norms' outputs of all tokens, and not this rank's part
    logits      16 V (T tokens)     every rank gathers the whole vocabulary: logits of two
                                    micro-batches in bf16, and in fp32 their softmax, its gradient
                                    and theirs

  Read off the program of Aleph Alpha's study, as published a year later
  (github.com/Aleph-Alpha/scaling): `core/nn/norm/rms_norm.py`, the input that a linear layer saves
  there, `transformer/model/layers/lm_head.py`, and `PIPELINE_STAGE_OUTPUT` of
  `core/nn/parallel_module/parallel_module.py`, which stays until its buffer is used again.

Alternatives considered:
- A factor times the parameters: knows neither recomputation nor the schedule.
- Two more tensors of that source, SiLU's output and copies of attention's: with them four runs
  that ran would not fit. The study's release was an earlier one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from k2train.plan.activations import peak_bytes
from k2train.plan.greedy_schedule import StageSeconds, greedy_held
from k2train.plan.hardware import GIB, Cluster
from k2train.plan.program_graph import programs_of
from k2train.plan.step_time import STEADY_ROUNDS
from k2train.plan.workload import Workload

RESERVED = (1.02, 1.12)
"""What an allocator reserves for what is allocated: the least and the most, as a factor."""
CONTEXT_BYTES = (1.0 * GIB, 3.0 * GIB)
"""What the driver, libraries and communicators take: the least and the most."""
KEPT = ("norms", "gathered", "logits")
WHOLE_LOGITS = 16
"""Bytes of each logit of a program that keeps `logits`."""


@dataclass(frozen=True)
class ProgramMemory:
    """Peak of one rank by kind, bytes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    working: float

    @property
    def total(self) -> float:
        """All kinds together."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.working

    @property
    def reserved(self) -> tuple[float, float]:
        """Least and most that a device must have, bytes."""
        low, high = (self.total * factor for factor in RESERVED)
        return low + CONTEXT_BYTES[0], high + CONTEXT_BYTES[1]

    def fits(self, cluster: Cluster) -> bool:
        """Whether the least of that range is within a device's memory.

        An allocator under pressure gives back what it holds for later.
        """
        return self.reserved[0] <= cluster.device.memory_bytes


def program_memory(work: Workload) -> ProgramMemory:
    """Memory of the fullest pipeline rank."""
    return max((rank_memory(work, pp) for pp in range(work.pipeline)), key=lambda one: one.total)


def rank_memory(work: Workload, pp: int) -> ProgramMemory:
    """Memory of one rank of pipeline rank `pp`."""
    count, ranks = work.rank_parameters(pp), work.data * work.context
    layers = sum(
        len(work.layout.layers_of(stage, work.shape.num_layers))
        for stage in work.layout.stages_of(pp)
    )
    copies = (work.weight_bytes - 2.0) * layers * work.layer_matrices / work.tensor
    weights, gradients, optimizer = (
        2.0 * count + copies,
        float(work.gradient_bytes * count),
        work.optimizer_bytes * count,
    )
    if work.zero == 3:
        weights, gradients, optimizer = (
            4.0 * count / ranks,
            4.0 * count / ranks,
            8.0 * count / ranks,
        )
    elif work.zero >= 1:
        optimizer /= ranks
    if work.zero == 2:
        gradients /= ranks

    layout = work.layout
    held, deferred = layer_bytes(work, work.recompute), deferred_bytes(work)

    def layers_of(stage: int) -> int:
        return len(layout.layers_of(stage, work.shape.num_layers))

    here = 1.0 - work.offloaded_layers / work.shape.num_layers

    def forward(stage: int) -> int:
        return math.ceil(here * layers_of(stage) * held)

    p = work.pipeline
    simulated = min(work.num_microbatches, STEADY_ROUNDS * p)
    if work.kind == "interleaved":
        simulated = max(p, simulated - simulated % p)
    if p == 1:
        activations = float(sum(forward(stage) for stage in layout.stages_of(0)))
    else:
        program = programs_of(work.kind, p, simulated, layout.stages_per_rank)[pp]
        activations = float(
            peak_bytes(program, forward, lambda stage: math.ceil(layers_of(stage) * deferred))
        )
    if work.schedule == "zb-1p":
        own = sum(forward(stage) for stage in layout.stages_of(pp))
        activations = own * _searched(work, deferred / held)[pp]
    if work.schedule == "zb-2p":
        # Its search fills every rank to 2p - 1 micro-batches, whatever the rank's place.
        own = sum(forward(stage) for stage in layout.stages_of(pp))
        activations = float(own * min(2 * p - 1, work.num_microbatches))
    return ProgramMemory(weights, gradients, optimizer, activations, working_bytes(work, pp))


def _searched(work: Workload, kept: float) -> tuple[float, ...]:
    """Most micro-batches that each pipeline rank of ZB-1p holds, as its search orders them.

    The times of a stage are its products', all three alike: only how they differ between stages
    decides. `kept`: share of a micro-batch's activations that its weight gradients need.
    """
    head = work.shape.vocab_size * work.shape.hidden_size / work.layer_matrices
    layout, last = work.layout, work.layout.num_stages - 1
    seconds = [
        len(layout.layers_of(stage, work.shape.num_layers)) + (head if stage == last else 0.0)
        for stage in range(last + 1)
    ]
    stages = tuple(StageSeconds(one, one, one) for one in seconds)
    count = min(work.num_microbatches, STEADY_ROUNDS * work.pipeline)
    return greedy_held(stages, 0.0, count, work.pipeline, kept)


def layer_bytes(work: Workload, policy: str) -> float:
    """Bytes one layer keeps of a micro-batch."""
    shape, t = work.shape, work.tensor
    h, f, d = shape.hidden_size, shape.ffn_hidden_size, shape.head_dim
    whole, split = work.local_tokens, work.tokens / t
    if policy == "full":
        return 2.0 * h * whole

    drops = 2 * h if work.attention == "plain" else 0
    query_key_value = 2 * (shape.num_heads + 2 * shape.num_kv_heads) * d
    mlp = (6 if work.gated else 4) * f
    scores = 5 * shape.num_heads * work.sequence_length
    if policy == "selective" and work.zero == 3:
        # By operator: the input, attention's output, and every second product's output. A compiler
        # sees that no gradient reads the last product's.
        kept = 2 * sum(work.products_by_operator[::2])
        last = 2 * h if work.gated and work.fused else 0
        return whole * 2 * h + split * 2 * h + work.tokens * (kept - last)
    if policy == "selective" or work.flash:
        scores = 0
    if work.narrow_inputs:
        # Inputs of four products lose a byte; attention keeps its own output for itself.
        drops -= 2 * h
        mlp -= f
        scores += h
    more = whole * 4 * h if "norms" in work.keeps else 0.0
    more += (work.tokens - whole) * 4 * h if "gathered" in work.keeps else 0.0
    return whole * (8 * h + drops) + split * (query_key_value + 2 * h + mlp + scores) + more


def deferred_bytes(work: Workload) -> float:
    """Bytes one layer holds between its input backward and its weight backward.

    Every product's input, and the gradient of its output.
    """
    shape, t = work.shape, work.tensor
    h, f, d = shape.hidden_size, shape.ffn_hidden_size, shape.head_dim
    inputs = 2 * h * work.local_tokens + work.tokens / t * (h + f)
    outputs = (shape.num_heads + 2 * shape.num_kv_heads) * d + (2 if work.gated else 1) * f
    return 2 * (inputs + 2 * h * work.tokens + outputs * work.tokens / t)


def working_bytes(work: Workload, pp: int) -> float:
    """Bytes that exist only for a while: a recomputed layer, logits, gathered weights."""
    shape, layout = work.shape, work.layout
    layer = layer_bytes(work, "none") - layer_bytes(work, work.recompute)
    gradient = work.tokens / work.tensor * 2 * shape.ffn_hidden_size * (2 if work.gated else 1)
    logits = 0.0
    if layout.num_stages - 1 in layout.stages_of(pp):
        # bf16 logits, an fp32 copy that becomes the softmax; eager: softmax and gradient besides.
        # One kernel: logits and their gradient.
        kept = 4.0 if work.fused_loss else 8.0 if work.zero < 3 else 14.0
        logits = work.tokens * shape.vocab_size / work.tensor * kept
        if "logits" in work.keeps:
            logits = float(work.tokens * shape.vocab_size * WHOLE_LOGITS)

    gathered = 0.0
    if work.zero == 3:
        table = shape.vocab_size * shape.hidden_size / work.tensor
        # Two layers' weights, one layer's gradients in fp32, the table and its gradient.
        gathered = (2 * 2 + 4) * work.layer_matrices / work.tensor + 2 * table
    return max(layer + gradient, logits) + gathered
