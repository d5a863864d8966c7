"""Cost model: parameters, FLOPs and bytes of a model under a layout, before it is built.

- One formula per fact, from the shapes alone. A test compares it with the built model, so neither
  can drift.
- Architecture: untied input and output embeddings, no biases. A layer has four attention matrices,
  three SwiGLU matrices and two norms. One norm precedes the head.
- FLOP convention: one multiply-add is 2, backward twice forward, causal attention counted as full
  (not halved), recomputation not counted.

Alternatives considered:
- Counting on the built model only: needs the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from k2train.plan.layout import Layout


@dataclass(frozen=True)
class ModelShape:
    """Sizes that decide every count, named as in the config's `model` section."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


def layer_matrix_parameters(shape: ModelShape) -> int:
    """Parameters in the matrices of one layer: query, key, value, output, gate, up and down."""
    attention = (
        2 * shape.hidden_size**2 + 2 * shape.hidden_size * shape.num_kv_heads * shape.head_dim
    )
    return attention + 3 * shape.hidden_size * shape.ffn_hidden_size


def layer_parameters(shape: ModelShape) -> int:
    """Parameters of one layer: its matrices and its two norms."""
    return layer_matrix_parameters(shape) + 2 * shape.hidden_size


def embedding_parameters(shape: ModelShape) -> int:
    """Parameters of input embedding and head together, without padding of the vocabulary."""
    return 2 * shape.vocab_size * shape.hidden_size


def parameters(shape: ModelShape) -> int:
    """Total number of parameters, the same under every layout."""
    return (
        shape.num_layers * layer_parameters(shape) + embedding_parameters(shape) + shape.hidden_size
    )


def tensor_count(shape: ModelShape) -> int:
    """Number of named tensors: nine per layer, embedding, head and the last norm."""
    return 9 * shape.num_layers + 3


def stage_parameters(shape: ModelShape, layout: Layout, stage: int) -> int:
    """Parameters of one pipeline stage, all tensor-parallel ranks together, each counted once.

    Without padding. The first stage has the input embedding, the last one the final norm and the
    head. The stages sum to `parameters`.
    """
    total = len(layout.layers_of(stage, shape.num_layers)) * layer_parameters(shape)
    if stage == 0:
        total += shape.vocab_size * shape.hidden_size
    if stage == layout.num_stages - 1:
        total += shape.vocab_size * shape.hidden_size + shape.hidden_size
    return total


def rank_parameters(shape: ModelShape, layout: Layout, pp: int) -> int:
    """Parameters in the memory of one rank of pipeline rank `pp`, vocabulary padding included.

    Tensor-parallel ranks split the matrices, replicate the norms, and each hold `ceil(vocab / tp)`
    rows of an embedding.
    """
    embedding = math.ceil(shape.vocab_size / layout.tensor) * shape.hidden_size

    total = 0
    for stage in layout.stages_of(pp):
        num_layers = len(layout.layers_of(stage, shape.num_layers))
        total += num_layers * (
            layer_matrix_parameters(shape) // layout.tensor + 2 * shape.hidden_size
        )
        if stage == 0:
            total += embedding
        if stage == layout.num_stages - 1:
            total += embedding + shape.hidden_size

    return total


def flops_per_token(shape: ModelShape, sequence_length: int) -> int:
    """Model FLOPs of forward and backward for one token, under any layout.

    6 x the parameters in matrices (head included, input embedding not: it is a look-up) + 12 x
    layers x sequence x hidden for the scores and their use (Chowdhery et al. 2022, PaLM, appendix
    B).
    """
    matmul_parameters = (
        shape.num_layers * layer_matrix_parameters(shape) + shape.vocab_size * shape.hidden_size
    )
    return 6 * matmul_parameters + 12 * shape.num_layers * sequence_length * shape.hidden_size


@dataclass(frozen=True)
class StateBytes:
    """Bytes one rank keeps from step to step. Activations and library buffers come on top."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int

    @property
    def total_bytes(self) -> int:
        """Weights, gradients and optimizer together."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes


WEIGHT_BYTES = {"bf16": 2, "fp32": 4}


def state_bytes(shape: ModelShape, layout: Layout, precision: str, pp: int = 0) -> StateBytes:
    """Bytes of weights, fp32 gradient sums and optimizer state of one rank of pipeline rank `pp`.

    - Data-parallel ranks share the optimizer's fp32 master weights and two moments (12 bytes per
      parameter, whatever `precision`). The largest share is returned.
    - With several data-parallel ranks, the rank's share of the reduced gradients has memory of its
      own. With one, fp32 weights are the master weights.
    """
    assert precision in WEIGHT_BYTES, (
        f"precision must be one of {tuple(WEIGHT_BYTES)}, not {precision!r}"
    )
    # Gradients are fp32 sums over the step, whatever the weights' dtype.
    count = rank_parameters(shape, layout, pp)
    share = math.ceil(count / layout.data)

    weights, alone = WEIGHT_BYTES[precision] * count, layout.data == 1
    gradients = 4 * count + (0 if alone else 4 * share)
    return StateBytes(
        weights, gradients, 8 * share if alone and precision == "fp32" else 12 * share
    )
