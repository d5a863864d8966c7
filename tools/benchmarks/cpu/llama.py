"""Reference LLaMA, written by hand on plain torch, and what several peers share of it.

- It is also the model of the DDP, FSDP2, DTensor and pipelining peers, so these differ only in
  their parallelism.
- Separate query, key and value matrices, as in the paper and as column-parallel plans need them.
- Fast where plain torch is: SDPA, F.rms_norm, fused AdamW.
- Activations are [b, s, h] here.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from benchmarks.cpu.contract import Built
from benchmarks.cpu.work import Work

LossOf = Callable[[Tensor], Tensor]
"""Mean loss of token ids [b, s]."""
IGNORE = -100
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def rotary_tables(work: Work, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rotary tables (cos, sin), each [s, head_dim]."""
    exponents = torch.arange(0, work.head_dim, 2, dtype=torch.float64) / work.head_dim
    angles = torch.outer(
        torch.arange(work.sequence_length, dtype=torch.float64), work.rope_theta**-exponents
    )
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to x [b, n, s, d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, work: Work):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(work.hidden_size))
        self.eps = work.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        # A no-op but for fp32 weights under autocast, which has no rule for this function.
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Causal attention over as many heads as the projections give, so that they can be sharded."""

    def __init__(self, work: Work):
        super().__init__()
        h = work.hidden_size
        self.query, self.key, self.value, self.output = (
            nn.Linear(h, h, bias=False) for _ in range(4)
        )
        self.head_dim = work.head_dim

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for p in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True
        )
        return self.output(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, work: Work):
        super().__init__()
        self.gate = nn.Linear(work.hidden_size, work.ffn_hidden_size, bias=False)
        self.up = nn.Linear(work.hidden_size, work.ffn_hidden_size, bias=False)
        self.down = nn.Linear(work.ffn_hidden_size, work.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One layer: pre-norm attention and feed-forward with residuals."""

    def __init__(self, work: Work):
        super().__init__()
        self.attention_norm, self.attention = Norm(work), Attention(work)
        self.mlp_norm, self.mlp = Norm(work), FeedForward(work)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """Consecutive layers, with the embedding before the first, and norm and head after the last."""

    def __init__(
        self,
        work: Work,
        layers: Iterable[int] | None = None,
        dtype: torch.dtype = torch.float32,
        activations: torch.dtype | None = None,
    ):
        """`activations`: dtype between the layers where the weights have another (autocast)."""
        super().__init__()
        self.activations = activations or dtype
        chosen = list(range(work.num_layers) if layers is None else layers)
        first, last = 0 in chosen, work.num_layers - 1 in chosen
        self.embedding = nn.Embedding(work.vocab_size, work.hidden_size) if first else None
        self.blocks = nn.ModuleDict({str(n): Block(work) for n in chosen})
        self.norm = Norm(work) if last else None
        self.head = nn.Linear(work.hidden_size, work.vocab_size, bias=False) if last else None
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=work.init_std)

        self.to(dtype)
        cos, sin = rotary_tables(work, dtype)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Ids [b, s] to logits [b, s, v].

        Hidden [b, s, h] in without embedding, out without head.
        """
        if self.embedding is not None:
            x = self.embedding(x).to(self.activations)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        for block in self.blocks.values():
            x = block(x, cos, sin)
        return x if self.head is None or self.norm is None else self.head(self.norm(x))


def labels_of(tokens: Tensor) -> Tensor:
    """The next token at every position [b, s]; the last position has none."""
    return torch.cat((tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORE)), dim=1)


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, mean over the targets: logits [b, s, v], labels [b, s]."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(0, 1), ignore_index=IGNORE)


def loss_of(model: Callable[[Tensor], Tensor]) -> LossOf:
    """Loss of a model that gives logits."""
    return lambda tokens: mean_loss(model(tokens), labels_of(tokens))


def global_batch(work: Work) -> Tensor:
    """Token ids [global_sequences, sequence_length], the same in every step, contender and rank."""
    generator = torch.Generator().manual_seed(work.seed)
    return torch.randint(
        work.vocab_size, (work.global_sequences, work.sequence_length), generator=generator
    )


class FusedAdamW:
    """torch's fused AdamW, one instance for DTensors and one for plain tensors.

    It refuses a mix of both.
    """

    def __init__(self, work: Work, parameters: Iterable[nn.Parameter]):
        kinds: dict[bool, list[nn.Parameter]] = {}
        for parameter in parameters:
            kinds.setdefault(isinstance(parameter, DTensor), []).append(parameter)
        self.optimizers = [
            torch.optim.AdamW(
                some, work.lr, (work.beta1, work.beta2), work.eps, work.weight_decay, fused=True
            )
            for some in kinds.values()
        ]

    def step(self) -> None:
        """Update, and release the gradients."""
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def accumulate(
    loss_of: LossOf, batch: Tensor, work: Work, ahead: Callable[[bool], None] | None = None
) -> float:
    """Forward and backward of this rank's sequences in micro-batches; returns the mean loss.

    `ahead` is called before each micro-batch with whether it is the last of the step.
    """
    parts = list(batch.split(work.micro_sequences))
    total = 0.0
    for index, tokens in enumerate(parts):
        if ahead is not None:
            ahead(index == len(parts) - 1)
        loss = loss_of(tokens) / len(parts)
        loss.backward()
        seen = loss.detach()
        total += float(seen.full_tensor() if isinstance(seen, DTensor) else seen)
    return total


def trained(
    model: nn.Module,
    loss_of: LossOf,
    batch: Tensor,
    work: Work,
    ahead: Callable[[bool], None] | None = None,
) -> Built:
    """A model trained on this rank's sequences by accumulation and fused AdamW."""
    optimizer = FusedAdamW(work, model.parameters())

    def step() -> float:
        loss = accumulate(loss_of, batch, work, ahead)
        optimizer.step()
        return loss

    return Built(step, size_of(model.parameters()))


def size_of(parameters: Iterable[nn.Parameter]) -> int:
    """Number of values; for DTensors the global one."""
    return sum(parameter.numel() for parameter in parameters)


def batches(batch: Tensor, rank: int, world: int) -> Tensor:
    """A data-parallel rank's contiguous share of the global batch."""
    return batch.chunk(world)[rank]
