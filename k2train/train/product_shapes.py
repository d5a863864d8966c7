"""Shapes of the matrix products that the layers and the loss of a layout compute.

- Every tensor-parallel rank's shapes are listed on every rank: the vocabulary may divide unevenly,
  and with overlap a rank multiplies its own rows first.
- Not listed: products of a few rows, such as those of the forward check and of generation.
"""

from collections.abc import Iterator

from k2train.model.kernels.product_choice import FORWARD, INPUT, KINDS, WEIGHT, ProductShape
from k2train.parallel.shard import even_slice
from k2train.plan.memory import strip_rows
from k2train.train.setup import Setup


def product_shapes(setup: Setup) -> list[ProductShape]:
    """Return the shapes of a step's products on a CPU, each once, over all ranks."""
    return list(dict.fromkeys(_shapes(setup)))


def step_flops(setup: Setup) -> float:
    """Return the floating-point operations of a rank's products in a step: the mean over ranks."""
    a = setup.architecture
    kv = a.num_kv_heads * (a.hidden_size // a.num_heads)
    layer = a.hidden_size * (2 * a.hidden_size + 2 * kv + 3 * a.ffn_hidden_size)
    weights = a.num_layers * layer + a.hidden_size * a.vocab_size
    return 6.0 * weights * setup.step_tokens / setup.layout.world_size


def _shapes(setup: Setup) -> Iterator[ProductShape]:
    a, tp = setup.architecture, setup.layout.tensor
    n = setup.config.data.sequence_length * setup.config.batch.micro_sequences
    kv = a.num_kv_heads * (a.hidden_size // a.num_heads)
    parts = _parts(setup, n)

    # A column-parallel product gathers its input, a row-parallel one the gradient of its result.
    for m in ((a.hidden_size + 2 * kv) // tp, 2 * a.ffn_hidden_size // tp):
        yield from (ProductShape(FORWARD, rows, a.hidden_size, m) for rows in parts)
        yield ProductShape(INPUT, n, a.hidden_size, m)
        yield ProductShape(WEIGHT, n, a.hidden_size, m)
    for k in (a.hidden_size // tp, a.ffn_hidden_size // tp):
        yield ProductShape(FORWARD, n, k, a.hidden_size)
        yield from (ProductShape(INPUT, rows, k, a.hidden_size) for rows in parts)
        yield ProductShape(WEIGHT, n, k, a.hidden_size)

    strip = min(n, strip_rows(n, -(-a.vocab_size // tp), "cpu"))
    for rows in filter(None, (strip, n % strip)):
        for rank in range(tp):
            start, stop = even_slice(a.vocab_size, tp, rank)
            if stop > start:
                yield from (ProductShape(kind, rows, a.hidden_size, stop - start) for kind in KINDS)


def _parts(setup: Setup, n: int) -> list[int]:
    """Rows of the products that follow a gather: all, or with overlap own, earlier and later."""
    tp = setup.layout.tensor
    if not (setup.sequence and setup.overlap("cpu")):
        return [n]
    own = n // tp
    sizes = (rows for rank in range(tp) for rows in (own, rank * own, n - (rank + 1) * own))
    return sorted({rows for rows in sizes if rows})
