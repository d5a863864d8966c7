"""Kernels of a training step to be timed: products, attention, element-wise work, loss, embedding.

- They are the ones that a run on this device takes with `auto`, at several shapes each. Their
  amounts of work are those of `plan.measured`, by which a step is predicted.
- Products have the strides of a layer: input times the transposed weight, gradient times the
  weight, transposed gradient times input into an fp32 sum.
- Inputs rotate over several copies, as the layers of a model do: one copy would stay in the
  innermost cache.
- Each backward runs on a graph of its own, made before the clock starts.

Alternatives considered:
- Timing whole layers alone: a term that is wrong could hide behind another.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from k2train.model.kernels.select import DeviceTraits, Kernels, choose_kernels
from k2train.model.layers import Rotary
from k2train.parallel.collective_matmul import Product
from k2train.parallel.cross_entropy import VocabShard
from k2train.parallel.fused_cross_entropy import fused_cross_entropy
from k2train.parallel.grad_accumulation import GradAccumulator, attach
from k2train.parallel.grid import SINGLE
from k2train.plan.measured import (
    Amount,
    attention_amount,
    element_amount,
    loss_amount,
    product_amount,
    weight_amount,
)
from k2train.plan.memory import strip_rows
from k2train.train.setup_kernels import DTYPES

COPIES = 4
INIT_STD = 0.02


@dataclass(frozen=True)
class Shapes:
    """Sizes to be timed on one kind of device."""

    rows: Sequence[int]
    """Tokens of a product."""
    matrices: Sequence[tuple[int, int]]
    """(k, m) of a product."""
    attention: Sequence[tuple[int, int, int, int]]
    """(sequences, heads, length, d)."""
    streams: Sequence[tuple[int, int]]
    """(tokens, width) of element-wise work."""
    losses: Sequence[tuple[int, int, int]]
    """(tokens, hidden, vocabulary)."""
    largest: int
    """Width of the square product whose rate is the peak."""
    copied_bytes: int
    """Of the copy that measures the memory."""


SHAPES = {
    "cpu": Shapes(
        rows=(256, 1024),
        matrices=((64, 64), (128, 384), (352, 128), (256, 256), (256, 1408), (704, 256)),
        # With few heads the starts of its blocks are most of it: a line needs such points, too.
        attention=(
            *((4, 4, 256, 32), (2, 8, 256, 32), (8, 4, 128, 32), (2, 4, 512, 64)),
            *((1, 4, 256, 32), (1, 2, 64, 32)),
        ),
        streams=((256, 64), (1024, 128), (1024, 352), (1024, 704)),
        losses=((256, 64, 1024), (1024, 128, 4096), (512, 256, 4096)),
        largest=1024,
        copied_bytes=128 * 2**20,
    ),
    "cuda": Shapes(
        rows=(2048, 8192),
        matrices=((1024, 1024), (1024, 6144), (4096, 4096), (4096, 22016), (11008, 4096)),
        attention=((1, 8, 2048, 128), (1, 32, 2048, 128), (2, 8, 4096, 128)),
        streams=((2048, 1024), (8192, 4096), (8192, 11008)),
        losses=((2048, 1024, 32000), (4096, 4096, 32000)),
        largest=8192,
        copied_bytes=4 * 2**30,
    ),
}
TINY = Shapes(
    rows=(64,),
    matrices=((32, 32), (64, 96)),
    attention=((1, 2, 64, 32), (2, 2, 128, 32)),
    streams=((64, 32), (128, 64)),
    losses=((64, 32, 128), (128, 32, 256)),
    largest=128,
    copied_bytes=2**20,
)
"""For tests, and for a walk through an emulated device."""


@dataclass(frozen=True)
class Case:
    """One kernel at one shape."""

    name: str
    amount: Amount
    prepare: Callable[[int], Callable[[], Any]]
    """Makes what is timed, from the number of the round."""


class Cases:
    """Kernels of one device and precision, over some shapes."""

    def __init__(self, device: torch.device, precision: str, shapes: Shapes):
        self.device, self.dtype, self.shapes = device, DTYPES[precision], shapes
        self.size = self.dtype.itemsize
        self.plain = self._kernels(None, None)

    def __iter__(self) -> Iterator[Case]:
        for n in self.shapes.rows:
            for k, m in self.shapes.matrices:
                yield from self._products(n, k, m)
        for sizes in self.shapes.attention:
            yield from self._attention(*sizes)
        for n, width in self.shapes.streams:
            yield from self._elementwise(n, width)
        for loss in self.shapes.losses:
            yield self._loss(*loss)

    def _kernels(self, length: int | None, d: int | None) -> Kernels:
        traits = DeviceTraits(self.device, self.dtype, length, d)
        return choose_kernels(traits=traits)

    def _random(self, *shape: int, grad: bool = False) -> list[Tensor]:
        """Copies of one input."""
        return [
            torch.randn(*shape, device=self.device).to(self.dtype).requires_grad_(grad)
            for _ in range(COPIES)
        ]

    def _products(self, n: int, k: int, m: int) -> Iterator[Case]:
        product = self.plain.product or Product()
        x, dy, weight = self._random(n, k), self._random(n, m), self._random(m, k)
        sums = [torch.zeros(m, k, device=self.device) for _ in range(COPIES)]
        amount = product_amount(n, k, m, self.size)

        def forward(i: int) -> Callable[[], Any]:
            return lambda: product.multiply(x[i], weight[i].t(), gradient=False)

        def inputs(i: int) -> Callable[[], Any]:
            return lambda: product.multiply(dy[i], weight[i], gradient=True)

        def weights(i: int) -> Callable[[], Any]:
            return lambda: product.add_weight_gradient(sums[i], dy[i], x[i])

        yield Case("product forward", amount, forward)
        yield Case("product input", amount, inputs)
        yield Case("product weight", weight_amount(n, k, m, self.size), weights)

    def _attention(self, sequences: int, heads: int, length: int, d: int) -> Iterator[Case]:
        kernel = self._kernels(length, d).attention
        # In memory [s, b, n, d], as the split leaves it.
        inputs = [
            [one.permute(1, 2, 0, 3) for one in self._random(length, sequences, heads, d)]
            for _ in range(3)
        ]
        amount = attention_amount(sequences, heads, length, d, self.size)
        yield from self._both(
            "attention",
            amount,
            lambda q, k, v: kernel(q, k, v, None),
            list(zip(*inputs, strict=True)),
        )

    def _elementwise(self, n: int, width: int) -> Iterator[Case]:
        kernels, eps = self.plain, 1e-5
        stream, other = self._random(n, 1, width), self._random(n, 1, width)
        scale = torch.ones(width, device=self.device).to(self.dtype).requires_grad_()
        amount = element_amount(n * width, self.size)

        def add(i: int) -> Callable[[], Any]:
            return lambda: stream[i] + other[i]

        yield Case("add", amount, add)
        norm = [(x, scale) for x in stream]
        yield from self._both("norm", amount, lambda x, w: kernels.norm(x, w, eps), norm)
        yield from self._both("swiglu", amount, kernels.swiglu, [(x,) for x in stream])

        d = min(32, width // 4) // 2 * 2
        heads = width // (3 * d)
        rotary = Rotary(d, n, 1e4, self.device)
        packed = [(x,) for x in self._random(n, 1, 3 * heads * d)]
        yield from self._both(
            "rotary",
            element_amount(n * 3 * heads * d, self.size),
            lambda x: kernels.split(x, rotary.cos, rotary.sin, heads, heads),
            packed,
        )

        table = torch.randn(4 * n, width, device=self.device).to(self.dtype)
        ids = [torch.randint(4 * n, (n, 1), device=self.device) for _ in range(COPIES)]
        yield Case("embedding", amount, lambda i: lambda: nn.functional.embedding(ids[i], table))

    def _both(
        self,
        name: str,
        amount: Amount,
        function: Callable[..., Any],
        inputs: Sequence[tuple[Tensor, ...]],
    ) -> Iterator[Case]:
        """Forward and backward of a kernel."""

        def forward(i: int) -> Callable[[], Any]:
            leaves = [x.detach().requires_grad_() for x in inputs[i]]
            return lambda: function(*leaves)

        def backward(i: int) -> Callable[[], Any]:
            leaves = [x.detach().requires_grad_() for x in inputs[i]]
            found = function(*leaves)
            outputs = found if isinstance(found, tuple) else (found,)
            gradients = [torch.ones_like(one) for one in outputs]
            return lambda: torch.autograd.grad(outputs, leaves, gradients)

        yield Case(f"{name} forward", amount, forward)
        yield Case(f"{name} backward", amount, backward)

    def _loss(self, n: int, hidden: int, vocab: int) -> Case:
        rows = strip_rows(n, vocab, self.device.type)
        x = self._random(n, 1, hidden, grad=True)
        # As small as a model's: large logits leave denormal probabilities, which a CPU multiplies
        # ten times slower.
        drawn = INIT_STD * torch.randn(vocab, hidden, device=self.device)
        weight = nn.Parameter(drawn.to(self.dtype))
        attach(weight, GradAccumulator(torch.zeros(vocab, hidden, device=self.device)))
        labels = torch.randint(vocab, (n, 1), device=self.device)
        shard = VocabShard(0, vocab, vocab, SINGLE["tp"])
        product, softmax = self.plain.product, self.plain.softmax

        def loss(i: int) -> Callable[[], Any]:
            return lambda: fused_cross_entropy(
                x[i], weight, labels, shard, 1.0, product=product, softmax=softmax
            )

        return Case("loss", loss_amount(n, hidden, vocab, self.size, -(-n // rows)), loss)


def peak_case(device: torch.device, precision: str, shapes: Shapes) -> Case:
    """Return the large square product whose rate counts as the peak."""
    n, dtype = shapes.largest, DTYPES[precision]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return Case("peak", product_amount(n, n, n, dtype.itemsize), lambda i: lambda: a @ b)


def memory_case(device: torch.device, shapes: Shapes) -> Case:
    """Return a large copy, which reads and writes the memory."""
    source = torch.zeros(shapes.copied_bytes // 4, device=device)
    target = torch.empty_like(source)
    size = 2.0 * source.numel() * 4
    return Case("copy", (1.0, 0.0, size), lambda i: lambda: target.copy_(source))
