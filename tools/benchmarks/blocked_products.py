"""Price of tensor-parallel products whose bits do not depend on the degree, for one layer.

    python -m benchmarks.blocked_products HIDDEN FFN TOKENS ROUNDS

- Every weight is cut into a fixed number of blocks, whatever the degree: a column-parallel one
  along its outputs, a row-parallel one along its inputs. Each product of a block has the same shape
  on every degree. Sums of blocks are made in fp32 in a fixed tree, and rounded once.
- Degrees 1, 2, 4 and 8 are computed one after another in this process, each rank from its own part
  of the weight. Their outputs and all gradients must be equal, to the bit.
- Processor time of degree 1 against plain products, in turns, one thread: outputs, input gradients
  and weight gradients of a layer's four weights.

`run.exact` does not use them: see docs/exact.md.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

BLOCKS = (4, 8)
DEGREES = (1, 2, 4, 8)
Results = tuple[Tensor, Tensor, Tensor]
"""Output [n, out], input gradient [n, in], weight gradient [out, in] in fp32."""


def add_tree(values: Sequence[Tensor]) -> Tensor:
    """Add 2**k values: the sum of the left half plus that of the right half."""
    if len(values) == 1:
        return values[0]
    half = len(values) // 2
    return add_tree(values[:half]) + add_tree(values[half:])


def plain(x: Tensor, dy: Tensor, weight: Tensor) -> Results:
    """Whole products of x [n, in], dy [n, out] and a weight [out, in]."""
    gradient = torch.zeros(weight.shape)
    if weight.dtype == torch.float32:
        gradient.addmm_(dy.t(), x)
    else:
        gradient.add_(dy.t() @ x)
    return x @ weight.t(), dy @ weight, gradient


def column(x: Tensor, dy: Tensor, weight: Tensor, blocks: int, degree: int) -> Results:
    """The same in blocks of outputs; each rank has `blocks` / `degree` of them."""
    width = weight.shape[0] // blocks
    outputs, gradients, sums = [], [], []
    for rank_weight, rank_dy in zip(weight.chunk(degree), dy.chunk(degree, dim=1), strict=True):
        mine = list(
            zip(rank_weight.split(width), rank_dy.contiguous().split(width, dim=1), strict=True)
        )
        pieces = [(part, grad.contiguous()) for part, grad in mine]
        outputs += [x @ part.t() for part, _ in pieces]
        gradients += [(grad.t() @ x).float() for _, grad in pieces]
        # A rank adds what it has; the ranks' sums are the upper part of the same tree.
        sums.append(add_tree([(grad @ part).float() for part, grad in pieces]))
    return torch.cat(outputs, 1), add_tree(sums).to(x.dtype), torch.cat(gradients)


def row(x: Tensor, dy: Tensor, weight: Tensor, blocks: int, degree: int) -> Results:
    """The same in blocks of inputs."""
    width = weight.shape[1] // blocks
    inputs, gradients, sums = [], [], []
    for rank_weight, rank_x in zip(weight.chunk(degree, 1), x.chunk(degree, 1), strict=True):
        pieces = [
            (part.contiguous(), own.contiguous())
            for part, own in zip(
                rank_weight.contiguous().split(width, 1),
                rank_x.contiguous().split(width, 1),
                strict=True,
            )
        ]
        inputs += [dy @ part for part, _ in pieces]
        gradients += [(dy.t() @ own).float() for _, own in pieces]
        sums.append(add_tree([(own @ part.t()).float() for part, own in pieces]))
    return add_tree(sums).to(x.dtype), torch.cat(inputs, 1), torch.cat(gradients, 1)


Layer = list[tuple[Callable[..., Results], Tensor, Tensor, Tensor]]
"""Of each weight how it is cut, and x, dy and the weight."""


def _whole(layer: Layer) -> None:
    for _, *given in layer:
        plain(*given)


def _blocked(layer: Layer, blocks: int) -> None:
    for kind, *given in layer:
        kind(*given, blocks, 1)


def _processor_seconds(rounds: int, *works: Callable[[], None]) -> list[float]:
    """Median processor seconds of each work, in turns, after one round that does not count."""
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(rounds + 1):
        for work, own in zip(works, seconds, strict=True):
            began = time.process_time()
            work()
            own.append(time.process_time() - began)
    return [statistics.median(own[1:]) for own in seconds]


def measure(hidden: int, ffn: int, tokens: int, rounds: int) -> list[list[str]]:
    """Rows of a table: precision, blocks, price of a layer, degrees with the same bits."""
    shapes = [
        (column, 3 * hidden, hidden),
        (row, hidden, hidden),
        (column, 2 * ffn, hidden),
        (row, hidden, ffn),
    ]
    generator = torch.Generator().manual_seed(1)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        layers = [
            (kind, *(torch.randn(*size, generator=generator).to(dtype) for size in sizes))
            for kind, out, inside in shapes
            for sizes in (((tokens, inside), (tokens, out), (out, inside)),)
        ]
        for blocks in BLOCKS:
            equal = []
            for degree in (n for n in DEGREES if n <= blocks):
                same = all(
                    torch.equal(a, b)
                    for kind, *given in layers
                    for a, b in zip(
                        kind(*given, blocks, degree), kind(*given, blocks, 1), strict=True
                    )
                )
                equal += [str(degree)] if same else []

            before, after = _processor_seconds(
                rounds, partial(_whole, layers), partial(_blocked, layers, blocks)
            )
            name = "bf16" if dtype == torch.bfloat16 else "fp32"
            price = f"{after / before - 1:+.0%}"
            rows.append([name, str(blocks), f"{before * 1e3:.1f}", price, ", ".join(equal)])
    return rows


def main(arguments: Sequence[str]) -> None:
    """Measure, and print the rows as JSON."""
    torch.set_num_threads(1)
    print(json.dumps(measure(*map(int, arguments))))


if __name__ == "__main__":
    main(sys.argv[1:])
