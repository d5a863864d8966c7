"""LLaMA-architecture transformer, cut into pipeline stages.

- Pre-norm blocks, RMSNorm, rotary, SwiGLU, untied embedding and head, no biases (Touvron et al.
  2023, arXiv:2302.13971, section 2.2).
- Stage 0 holds the embedding, the last stage the final norm and the head.

Global tensor names:

    embedding.weight
    layers.N.{attention_norm,mlp_norm}.weight
    layers.N.attention.{query,key,value,output}.weight
    layers.N.mlp.{gate,up,down}.weight
    norm.weight, head.weight
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from k2train.model.architecture import Architecture
from k2train.model.attention import Attention
from k2train.model.kernels.select import Documents, Kernels, Norm
from k2train.model.layer_changes import parts_of
from k2train.model.layer_function import formulas_of, run_as_one, runs_as_one
from k2train.model.layers import FeedForward, RMSNorm, Rotary
from k2train.model.recompute import Cheap, run_layer
from k2train.parallel.collectives import all_gather
from k2train.parallel.cross_entropy import IGNORE, VocabShard, vocab_parallel_cross_entropy
from k2train.parallel.fused_cross_entropy import fused_cross_entropy, position_losses
from k2train.parallel.grad_accumulation import WeightGradStore
from k2train.parallel.grid import Axis
from k2train.parallel.shard import Sharded
from k2train.parallel.tensor_parallel import ColumnLinear
from k2train.parallel.vocab_embedding import VocabEmbedding


class Block(nn.Module):
    """Transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    [s(/tp), b, h] -> the same shape.
    """

    def __init__(
        self,
        index: int,
        a: Architecture,
        tp: Axis,
        kernels: Kernels,
        recompute: str = "none",
    ):
        super().__init__()
        self.recompute, self.add_norm = recompute, kernels.add_norm
        own = type(self) is Block and recompute == "none"
        self.kernels, self.formulas = kernels, formulas_of(kernels) if own else None
        prefix = f"layers.{index}"
        self.attention_norm = RMSNorm(f"{prefix}.attention_norm.weight", a, tp, kernels.norm)
        self.attention = Attention(f"{prefix}.attention", a, tp, kernels)
        self.mlp_norm = RMSNorm(f"{prefix}.mlp_norm.weight", a, tp, kernels.norm)
        self.mlp = FeedForward(f"{prefix}.mlp", a, tp, kernels)
        # A tuple, so that they are not registered a second time.
        self.parts = parts_of(self)

    def forward(self, x: Tensor, rotary: Rotary, documents: Documents | None = None) -> Tensor:
        if self.formulas is not None and documents is None and runs_as_one(self, x):
            return run_as_one(self, x, rotary)
        return run_layer(self, x, self.recompute, rotary, documents)

    def inner(
        self, x: Tensor, cheap: Cheap, rotary: Rotary, documents: Documents | None
    ) -> tuple[Tensor, Tensor]:
        """Compute everything but the SwiGLU and its output product.

        Returns the residual [s(/tp), b, h], and gate and up [s, b, 2f/tp].
        """
        add_norm = self.add_norm
        if add_norm is None:
            x = x + cheap(self.attention_norm, x, lambda y: self.attention(y, rotary, documents))
            return x, cheap(self.mlp_norm, x, self.mlp.gate_up)

        # The residual stream leaves each norm as it is: the norm's backward adds both gradients.
        norm = self.attention_norm
        x, y = add_norm(x, None, norm.weight, norm.eps)
        attended = cheap(norm, x, lambda y: self.attention(y, rotary, documents), y)

        norm = self.mlp_norm
        x, y = add_norm(x, attended, norm.weight, norm.eps)
        return x, cheap(norm, x, self.mlp.gate_up, y)

    def activate(self, x: Tensor) -> Tensor:
        """Apply the SwiGLU: [s, b, 2f/tp] -> [s, b, f/tp]."""
        return self.mlp.activate(x)

    def outer(self, residual: Tensor, x: Tensor) -> Tensor:
        """Add the output product of the SwiGLU [s, b, f/tp] to the residual: [s(/tp), b, h]."""
        return residual + self.mlp.down(x)


class Head(nn.Module):
    """Final norm, [s(/tp), b, h] -> the same shape.

    `Stage.logits` and the loss apply the output product.
    """

    def __init__(self, a: Architecture, tp: Axis, norm: Norm):
        super().__init__()
        self.norm = RMSNorm("norm.weight", a, tp, norm)
        self.output = ColumnLinear(
            a.hidden_size, {"head.weight": a.vocab_size}, tp, a.init_std, pad=True
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Stage(nn.Module):
    """One pipeline stage: tokens [b, s] or activations [s(/tp), b, h] -> activations.

    The last stage ends with the final norm. Its output is the input of `loss` or `logits`. With
    `documents` attention stops at document borders. Without, it is causal over the whole row.
    """

    def __init__(
        self,
        a: Architecture,
        layers: Sequence[int],
        first: bool,
        last: bool,
        tp: Axis,
        kernels: Kernels,
    ):
        super().__init__()
        self.architecture, self.tp = a, tp
        self.fused_loss = kernels.loss != "reference"
        self.product, self.softmax = kernels.product, kernels.softmax
        self.embedding = (
            VocabEmbedding("embedding.weight", a.vocab_size, a.hidden_size, tp, a.init_std)
            if first
            else None
        )

        policies = kernels.recompute_of(len(layers))
        self.blocks = nn.ModuleDict(
            {
                str(n): Block(n, a, tp, kernels, policy)
                for n, policy in zip(layers, policies, strict=True)
            }
        )

        self.head = Head(a, tp, kernels.norm) if last else None
        self.rotary: Rotary | None = None
        self.first_use: Callable[[nn.Module], None] | None = None
        """Called with a child module before its weights are read, which may still be in flight."""

        self.keep_losses: Callable[[Tensor], None] | None = None
        """Called by `loss` with the loss of each position of a micro-batch, fp32 [s, b]."""

        self.weight_grad_store = WeightGradStore()
        # One store per stage: the executor defers all of its weight gradients together.
        for child in self.modules():
            if isinstance(child, Sharded):
                child.weight_grad_store = self.weight_grad_store

    def set_rotary(self, rotary: Rotary) -> None:
        """Give the stage its position tables.

        They are not part of the module's state on purpose.
        """
        self.rotary = rotary

    def forward(self, x: Tensor, documents: Documents | None = None) -> Tensor:
        if self.embedding is not None:
            self._about_to_use(self.embedding)
            x = self.embedding(x)
        for block in self.blocks.values():
            self._about_to_use(block)
            x = block(x, self.rotary, documents)

        if self.head is None:
            return x
        self._about_to_use(self.head)
        return self.head(x)

    def _about_to_use(self, part: nn.Module) -> None:
        if self.first_use is not None:
            self.first_use(part)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of the last stage's output: [s(/tp), b, h] -> [s, b, v/tp]."""
        assert self.head is not None, "only the last stage has logits"
        return self.head.output(hidden)

    @torch.no_grad()
    def logits_at(self, hidden: Tensor, positions: Sequence[int], sequence: int = 0) -> Tensor:
        """fp32 logits [positions, vocab_size] of one sequence, on every rank of tp.

        `hidden` is [s(/tp), b, h]. Meant for a few positions: the logits of all are gigabytes.
        Collective over tp.
        """
        assert self.head is not None, "only the last stage has logits"

        rows = hidden[:, sequence].contiguous()
        if self.tp.sequence:
            rows = all_gather(rows, self.tp)
        mine = nn.functional.linear(rows[list(positions)], self.head.output.weight).float()

        # Every rank has as many rows, padding last: gathered they begin with the vocabulary.
        whole = all_gather(mine.t().contiguous(), self.tp)
        return whole[: self.architecture.vocab_size].t().contiguous()

    def loss(self, hidden: Tensor, targets: Tensor, scale: float = 1.0) -> Tensor:
        """Return `scale` times the summed loss of a micro-batch, targets [b, s].

        Collective over tp.

        - Position i predicts target i+1, unless that is IGNORE; the last position has no label.
          `hidden` [s(/tp), b, h] is the last stage's output.
        - A sum, not a mean: the caller divides once by the targets of the whole global batch. So no
          split into micro-batches or ranks changes the weighting.
        - The first token of a document is a target of the </s> before it, also where attention
          stops at document borders. So the number of targets follows from the config, not from the
          rows, and all that is learned there is how documents begin.

        Alternatives considered:
        - Leaving these targets out: the number of targets would depend on the rows.
        """
        assert self.head is not None, "only the last stage has a loss"
        labels, vocabulary = self._labels(targets), self._vocabulary()
        if self.fused_loss:
            return fused_cross_entropy(
                hidden,
                self.head.output.weight,
                labels,
                vocabulary,
                scale,
                product=self.product,
                softmax=self.softmax,
                keep=self.keep_losses,
            )
        losses = self._unfused_losses(hidden, labels, vocabulary)
        if self.keep_losses is not None:
            self.keep_losses(losses.detach())
        return losses.sum() * scale

    @torch.no_grad()
    def row_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the summed loss of each row of a micro-batch, fp64 [b], without gradients.

        Arguments and targets as in `loss`. Collective over tp.
        """
        assert self.head is not None, "only the last stage has a loss"
        labels, vocabulary = self._labels(targets), self._vocabulary()
        if self.fused_loss:
            weight = self.head.output.weight
            losses = position_losses(hidden, weight, labels, vocabulary, self.product, self.softmax)
        else:
            losses = self._unfused_losses(hidden, labels, vocabulary)
        return losses.sum(dim=0, dtype=torch.float64)

    def _unfused_losses(self, hidden: Tensor, labels: Tensor, vocabulary: VocabShard) -> Tensor:
        logits, v = self.logits(hidden), vocabulary
        return vocab_parallel_cross_entropy(logits, labels, v.start, v.size, self.tp)

    @staticmethod
    def _labels(targets: Tensor) -> Tensor:
        """Labels [s, b] of targets [b, s]: position i gets target i+1, the last one IGNORE."""
        labels = torch.full_like(targets, IGNORE)
        labels[:, :-1] = targets[:, 1:]
        return labels.t()

    def _vocabulary(self) -> VocabShard:
        """The head's rows on this rank, padding left out."""
        assert self.head is not None, "only the last stage has a head"
        output = self.head.output
        start = output.slices["weight"][0].start
        return VocabShard(start, output.rows, self.architecture.vocab_size, self.tp)


def activation_shape(
    a: Architecture, sequence_length: int, micro_sequences: int, tp: Axis
) -> tuple[int, int, int]:
    """Shape of an activation between stages: [s(/tp), b, h], /tp with sequence parallelism."""
    length = sequence_length // tp.size if tp.sequence else sequence_length
    return (length, micro_sequences, a.hidden_size)
