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
import re
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


# (words that the device's name must contain, dense bf16 FLOP/s, source). The first match counts, so
# special parts precede general ones. Dense: data sheets print twice as much "with sparsity".
PEAK_FLOPS: tuple[tuple[tuple[str, ...], float, str], ...] = (
    (("A100",), 312e12, "NVIDIA A100 data sheet, BFLOAT16 Tensor Core"),
    (("A800",), 312e12, "NVIDIA A800 data sheet, as A100"),
    (("H100", "PCIE"), 756e12, "NVIDIA H100 data sheet, PCIe: 1,513 with sparsity"),
    (("H100", "NVL"), 835.5e12, "NVIDIA H100 NVL data sheet: 1,671 with sparsity"),
    (("H100",), 989.4e12, "NVIDIA H100 architecture paper, SXM5"),
    (("H800", "PCIE"), 756e12, "NVIDIA H800 data sheet, PCIe, as H100: 1,513 with sparsity"),
    (("H800",), 989.4e12, "NVIDIA H800 data sheet, SXM, as H100"),
    (("H200", "NVL"), 835.5e12, "NVIDIA H200 data sheet, NVL: 1,671 with sparsity"),
    (("H200",), 989.4e12, "NVIDIA H200 data sheet, SXM: 1,979 with sparsity"),
    (("GH200",), 989.4e12, "NVIDIA GH200 data sheet: 1,979 with sparsity"),
    (("H20",), 148e12, "NVIDIA H20 data sheet"),
    (("GB200",), 2500e12, "NVIDIA GB200 NVL72 data sheet: 5,000 with sparsity a GPU"),
    (("B200",), 2250e12, "NVIDIA HGX B200 data sheet: 4,500 with sparsity a GPU"),
    (("L40S",), 362.05e12, "NVIDIA L40S data sheet"),
    (("A40",), 149.7e12, "NVIDIA A40 data sheet"),
    (("L4",), 121e12, "NVIDIA L4 data sheet: 242 with sparsity"),
    (("A10",), 125e12, "NVIDIA A10 data sheet"),
    (
        ("MI250X",),
        191.5e12,
        "AMD Instinct MI250X data sheet: 383 for the two dies, of which each is a device",
    ),
    (("MI300X",), 1307.4e12, "AMD Instinct MI300X data sheet"),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a device, in FLOP/s, by its driver name; None when unknown.

    Unknown devices, CPUs and MIG slices give None, never a guess: utilisation is then not reported.
    Names match word by word, so that an A10 is no A100 and an H20 no H200.
    """
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    if "MIG" in words:
        return None
    return next((flops for required, flops, _ in PEAK_FLOPS if words.issuperset(required)), None)
