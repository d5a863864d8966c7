"""GPU benchmark part `tp8`: the local work of one of eight tensor-parallel ranks, for the planner.

- Pieces of a K2 layer and of the head, without communication: one device has no peer.
- Norms are timed on the rank's eighth of the sequence, as in sequence parallelism; everything else
  on the whole sequence.
- The weight gradient of a product is added into fp32, as in the gradient buffer.
- Kernels shorter than their launch are replayed from a graph (`graph` in a row).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import world_of_one
from benchmarks.gpu.rank_modules import RankModules, rank_modules
from benchmarks.gpu.sizes import RankPart, sizes
from benchmarks.gpu.timing import Timer, Work, captured
from k2train.parallel.grad_accumulation import GradAccumulator
from k2train.train.strict_mode import strict_mode


@dataclass(frozen=True)
class Piece:
    """One piece of work: its forward, and the parts of its backward.

    FLOPs are those of the forward.
    """

    forward: Work
    input_gradient: Work
    weight_gradient: Work | None = None
    flops: int = 0
    backward_flops: int = 0
    """Of the input gradient."""


@contextmanager
def one_stream(bench: Bench) -> Iterator[None]:
    """A stream that can be captured: autograd runs a backward on the stream of its forward.

    The default stream cannot be captured.
    """
    if not bench.cuda:
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream()):
        yield


def run(bench: Bench) -> None:
    """Time every piece, and write its row."""
    work = sizes(bench.dry)
    rank = work.rank

    with world_of_one(bench) as grid, one_stream(bench):
        timer = Timer(bench)
        modules: list[RankModules] = []

        def build() -> Mapping[str, Any]:
            modules.append(rank_modules(grid, rank))
            return {"kind": "built", "kernels": modules[0].kernels}

        bench.attempt("modules", build, rank=asdict(rank))
        # As the engine computes its steps, or other kernels would be timed.
        with strict_mode(any(built.strict for built in modules)):
            for name, make in pieces(bench, rank, modules).items():
                bench.attempt(name, partial(timed, bench, timer, make, work.rounds), kind="piece")


def timed(bench: Bench, timer: Timer, make: Callable[[], Piece], rounds: int) -> Mapping[str, Any]:
    """Seconds of the forward, the input gradient and the weight gradient, in turns."""
    piece = make()
    works = {"forward": piece.forward, "input_gradient": piece.input_gradient}
    if piece.weight_gradient is not None:
        works["weight_gradient"] = piece.weight_gradient
    ready = {key: captured(bench, work) for key, work in works.items()}
    took = timer.in_turns(list(ready.values()), rounds=max(rounds, 20) if bench.cuda else rounds)
    figures: dict[str, Any] = {"graph": all(ready[key] is not works[key] for key in works)}
    flops = {
        "forward": piece.flops,
        "input_gradient": piece.backward_flops,
        "weight_gradient": piece.flops,
    }
    for key, timing in zip(ready, took, strict=True):
        figures[f"{key}_seconds"] = timing.median
        figures[f"{key}_flops_per_second"] = flops[key] / timing.median if flops[key] else None

    figures["spread"] = max(timing.spread for timing in took)
    return figures


def product(bench: Bench, rank: RankPart, inner: int, columns: int) -> Piece:
    """x W^T, dy W and dy^T x into fp32: x [tokens, inner], W [columns, inner], bf16."""

    def drawn(rows: int, width: int) -> Tensor:
        return torch.randn(rows, width, device=bench.device, dtype=torch.bfloat16)

    tokens = rank.batch.tokens
    x, weight, dy = drawn(tokens, inner), drawn(columns, inner), drawn(tokens, columns)
    y, dx = torch.empty_like(dy), torch.empty_like(x)
    accumulator = GradAccumulator(torch.zeros(columns, inner, device=bench.device))
    flops = 2 * tokens * inner * columns

    return Piece(
        lambda: torch.mm(x, weight.t(), out=y),
        lambda: torch.mm(dy, weight, out=dx),
        lambda: accumulator.add_product(dy, x),
        flops,
        flops,
    )


def differentiated(
    function: Callable[..., Any], *inputs: Tensor, weights: Sequence[Tensor] = (), flops: int = 0
) -> Piece:
    """A function of tensors and its backward through autograd, by its inputs and its `weights`.

    With `flops`, attention's: backward has five products where forward has two.
    """
    leaves = [tensor.requires_grad_() for tensor in inputs]
    given = function(*leaves)
    y = given if isinstance(given, tuple) else (given,)
    # A norm of ours adds its weight's gradient to the weight's sum, and autograd gets none.
    dy = [torch.randn_like(t) if t.dim() else torch.ones_like(t) for t in y]
    return Piece(
        lambda: function(*leaves),
        lambda: torch.autograd.grad(
            y, [*leaves, *weights], dy, retain_graph=True, allow_unused=True
        ),
        flops=flops,
        backward_flops=5 * flops // 2,
    )


def pieces(
    bench: Bench, rank: RankPart, modules: list[RankModules]
) -> dict[str, Callable[[], Piece]]:
    """Makers by name, called one at a time, so that a failure costs its own row only."""
    h, f, tokens = rank.hidden_size, rank.ffn_hidden_size, rank.batch.tokens
    s, b, n, d = rank.batch.length_tokens, rank.batch.sequences, rank.num_heads, rank.head_dim
    local = n * d

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=bench.device, dtype=torch.bfloat16)

    def loss() -> Piece:
        ids = torch.randint(0, rank.vocab_rows, (b, s), device=bench.device)
        stage = modules[0].stage
        return differentiated(lambda x: stage.loss(x, ids, 1.0 / tokens), drawn(s, b, h), flops=0)

    def embedding() -> Piece:
        ids = torch.randint(0, rank.vocab_rows, (b, s), device=bench.device)
        module = modules[0].embedding
        dy = drawn(s, b, h)
        y = module(ids)
        # Its gradient goes into the weight's sum and not through autograd.
        return Piece(lambda: module(ids), lambda: torch.autograd.backward(y, dy, retain_graph=True))

    def attention() -> Piece:
        q, k, v = (t.detach() for t in modules[0].split(drawn(s, b, 3 * local)))
        return differentiated(modules[0].attend, q, k, v, flops=causal)

    # Of attention, pairs that causality leaves out are not counted: half of 4 s^2 d a head.
    causal = 2 * b * n * s * s * d

    return {
        "norm, its part of the sequence": lambda: differentiated(
            modules[0].norm, drawn(s // rank.degree, b, h), weights=[modules[0].norm.weight]
        ),
        "qkv product": lambda: product(bench, rank, h, 3 * local),
        "split and rotary": lambda: differentiated(modules[0].split, drawn(s, b, 3 * local)),
        "attention": attention,
        "output product": lambda: product(bench, rank, local, h),
        "gate and up product": lambda: product(bench, rank, h, 2 * f),
        "SwiGLU": lambda: differentiated(modules[0].activate, drawn(s, b, 2 * f)),
        "down product": lambda: product(bench, rank, f, h),
        "residual addition": lambda: differentiated(
            torch.add, drawn(s // rank.degree, b, h), drawn(s // rank.degree, b, h)
        ),
        "embedding, all gradients": embedding,
        "head product": lambda: product(bench, rank, h, rank.vocab_rows),
        "head and loss, all gradients": loss,
    }
