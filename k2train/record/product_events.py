"""Ledger event on matrix products: which library was found the fastest for which shape."""

from typing import Any

from k2train.record.event import Event


class ProductsMeasured(Event, name="products_measured"):
    """A start with `kernels.matmul: measured` measured products that the record did not have.

    - `products` names the library of each shape, as in `weight 1024x256x768`: n tokens, k inputs
      and m outputs. It holds until another measurement on that processor and number of threads.
    - `gflops` are the rates of the fastest rounds, by shape and library. Empty: the products are
      those of the checkpoint that this run began with.
    """

    attempt: int
    processor: str
    threads: int
    default: str
    products: dict[str, Any]
    gflops: dict[str, Any]
    seconds: float
