"""Workload: a model, its batch and its layout as numbers, for any program that trains it.

- Wider than a config of this project: published rows also have two-matrix MLPs, tied embeddings,
  context parallelism, ZeRO-3 and unfused attention.
- Parameters are counted as in `plan.cost`, which a test compares.

Alternatives considered:
- Predicting through a config: most published rows are no legal config here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from k2train.errors import ConfigError
from k2train.plan.cost import ModelShape
from k2train.plan.layout import Layout
from k2train.plan.schedule import placement_of

SCHEDULE_NAMES = {"zb-2p": "zb-h2", "zb-1p": "zb-h1", "zbv": "zb-v", "afab": "gpipe"}
"""Names of papers, and what they are called here."""


@dataclass(frozen=True)
class Workload:
    """What one step computes and how it is divided. Degrees are numbers of ranks."""

    shape: ModelShape
    sequence_length: int
    micro_sequences: int
    global_sequences: int
    tensor: int = 1
    pipeline: int = 1
    stages_per_rank: int = 1
    data: int = 1
    context: int = 1
    sequence_parallel: bool = False
    recompute: str = "none"
    zero: int = 1
    """ZeRO stage: 0 replicates the optimizer, 1 and 2 share it, 3 also shares the weights."""
    schedule: str = "1f1b"
    precision: str = "bf16"
    gated: bool = True
    """Three matrices in the MLP (SwiGLU), not two."""
    tied: bool = False
    attention: str = "flash2"
    """Kind of attention: `plain` stores the scores; a fused one is a key of `FUSED_ATTENTION`."""
    fused: bool = True
    """Fused element-wise kernels, by hand or by a compiler."""
    fused_loss: bool = False
    """One kernel for the loss, on logits as the head's product wrote them."""
    overlap_data: bool = True
    overlap_tensor: bool = False
    layers_per_stage: tuple[int, ...] | None = None
    gradient_bytes: int = 4
    """Of each element of the gradient sums: 4 for fp32, 2 for sums in bf16."""
    weight_bytes: float = 2.0
    """Of each parameter in a layer's matrices: the weight, and the copies in fp8 that are kept."""
    optimizer_bytes: float = 12.0
    """Of each parameter: master weight and moments. Fewer where moments are bf16, or where only the
    bits that a bf16 weight lacks are kept of the master weight."""
    gather_bytes: int = 2
    """Of each element of a layer's weights that ZeRO-3 gathers: 2 for bf16, 1 for fp8."""
    gathers_in_place: bool = False
    """ZeRO-3's weights are views of the buffer that a gather fills (Megatron-FSDP), not copies."""
    narrow_inputs: bool = False
    """Products keep their inputs in one byte, as they were cast (Transformer Engine in fp8)."""
    cp_exchange: str = "ring"
    """How context-parallel ranks exchange keys and values: one of `context_traffic.KINDS`."""
    keeps: frozenset[str] = frozenset()
    """What the program keeps besides the published formulas: words of `program_memory.KEPT`."""
    offloaded_layers: int = 0
    """Layers whose activations are in the host's memory."""
    without_barrier: bool = False
    """Ranks start a step while others end the one before it, and check afterwards."""

    def __post_init__(self) -> None:
        if self.global_sequences % (self.data * self.micro_sequences):
            raise ConfigError(
                f"a batch of {self.global_sequences} sequences must be divisible by data-parallel "
                f"ranks ({self.data}) x sequences of a micro-batch ({self.micro_sequences}) = "
                f"{self.data * self.micro_sequences}"
            )
        if self.shape.num_layers < self.pipeline * self.stages_per_rank:
            raise ConfigError(
                f"{self.shape.num_layers} layers are too few for {self.pipeline} pipeline ranks x "
                f"{self.stages_per_rank} stages = {self.pipeline * self.stages_per_rank}"
            )

    @property
    def flash(self) -> bool:
        """Whether attention never stores the scores, and leaves out what causality hides."""
        return self.attention != "plain"

    @property
    def world_size(self) -> int:
        """Number of devices."""
        return self.tensor * self.pipeline * self.data * self.context

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of a step on each data-parallel rank."""
        return self.global_sequences // (self.data * self.micro_sequences)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one rank."""
        return self.micro_sequences * self.sequence_length // self.context

    @property
    def local_tokens(self) -> float:
        """Tokens whose residual stream a rank holds."""
        return self.tokens / self.tensor if self.sequence_parallel else self.tokens

    @property
    def step_tokens(self) -> int:
        """Tokens of a step over all ranks."""
        return self.global_sequences * self.sequence_length

    @property
    def kind(self) -> str:
        """Name of the schedule in `SCHEDULES`, for this number of stages."""
        kind = SCHEDULE_NAMES.get(self.schedule, self.schedule)
        if kind in ("1f1b", "interleaved"):
            return "interleaved" if self.stages_per_rank > 1 and self.pipeline > 1 else "1f1b"
        return kind

    @cached_property
    def layout(self) -> Layout:
        """Which stage has which layers; uneven numbers take layers from both ends first."""
        stages = self.stages_per_rank if self.pipeline > 1 else 1
        kind = self.kind
        if kind == "zb-v":
            stages = 2
        count = self.pipeline * stages
        layers = self.layers_per_stage or uneven_layers(self.shape.num_layers, count)
        placement = placement_of(kind)
        return Layout(self.tensor, self.pipeline, self.data, stages, placement, layers)

    @property
    def layer_matrices(self) -> int:
        """Parameters in the matrices of one layer."""
        shape = self.shape
        attention = 2 * shape.hidden_size**2
        attention += 2 * shape.hidden_size * shape.num_kv_heads * shape.head_dim
        return attention + (3 if self.gated else 2) * shape.hidden_size * shape.ffn_hidden_size

    @property
    def products_by_operator(self) -> tuple[float, ...]:
        """Widths of one rank's product outputs in order: query, key, value, output, MLP."""
        shape, t = self.shape, self.tensor
        key = shape.num_kv_heads * shape.head_dim / t
        f = shape.ffn_hidden_size / t
        mlp = (f, f) if self.gated else (f,)
        return (
            shape.num_heads * shape.head_dim / t,
            key,
            key,
            float(shape.hidden_size),
            *mlp,
            float(shape.hidden_size),
        )

    @property
    def dropped_outputs(self) -> float:
        """Width of the products that `selective` computes again where weights are sharded.

        Programs of that kind choose by operator: every second product is not kept (torchtitan's
        `selective` with the option `op`). As multiples of a product with `hidden_size` inputs.
        """
        shape, dropped = self.shape, self.products_by_operator[1::2]
        # The output projection's inputs are its rank's heads, the second MLP matrix's its width.
        heads = shape.num_heads * shape.head_dim / self.tensor / shape.hidden_size
        width = shape.ffn_hidden_size / self.tensor / shape.hidden_size
        total = dropped[0] + dropped[1] * heads
        return total + dropped[2] * (1.0 if self.gated else width)

    @property
    def parameters(self) -> int:
        """Parameters of the model. Biases are not counted."""
        shape = self.shape
        embeddings = (1 if self.tied else 2) * shape.vocab_size * shape.hidden_size
        layers = shape.num_layers * (self.layer_matrices + 2 * shape.hidden_size)
        return layers + embeddings + shape.hidden_size

    def rank_parameters(self, pp: int) -> int:
        """Parameters of one rank of pipeline rank `pp`, as if data-parallel ranks shared nothing.

        A tied embedding is on the first and on the last stage, unless one rank has both.
        """
        shape, layout = self.shape, self.layout
        table = math.ceil(shape.vocab_size / self.tensor) * shape.hidden_size
        total = 0
        for stage in layout.stages_of(pp):
            layers = len(layout.layers_of(stage, shape.num_layers))
            total += layers * (self.layer_matrices // self.tensor + 2 * shape.hidden_size)
            last = stage == layout.num_stages - 1
            total += table * (stage == 0) + (table + shape.hidden_size) * last

        both = self.tied and {0, layout.num_stages - 1} <= set(layout.stages_of(pp))
        return total - (table if both else 0)

    @property
    def model_flops(self) -> float:
        """Model FLOPs of a step: 6 x matrices, head included + 12 x layers x sequence x hidden.

        A token's, times the tokens of a step; nothing recomputed (PaLM, appendix B).
        """
        shape = self.shape
        matrices = shape.num_layers * self.layer_matrices + shape.vocab_size * shape.hidden_size
        scores = 12 * shape.num_layers * self.sequence_length * shape.num_heads * shape.head_dim
        return float(self.step_tokens * (6 * matrices + scores))


def uneven_layers(num_layers: int, stages: int) -> tuple[int, ...] | None:
    """Layers of each stage where they do not divide: the ends get fewer; None where they divide."""
    more, rest = divmod(num_layers, stages)
    if not rest:
        return None
    counts = [more + 1] * stages
    # The ends also have embedding and head: last, first, last but one, and so on.
    ends = [
        index for pair in zip(range(stages)[::-1], range(stages), strict=True) for index in pair
    ]
    for index in ends[: stages - rest]:
        counts[index] -= 1
    return tuple(counts)
