"""Measured speed of a machine: kernels, collectives and host overhead as straight lines.

- A line is a start and constant rates: seconds = start + FLOPs x a + bytes x b. It is fitted to
  several shapes of the kernels that a training takes there.
- What a line counts is defined here once, for the measurement and for the prediction alike.
- Ranks of a CPU share its cores, caches and memory. So each number of ranks that compute at the
  same time has its own lines, and more ranks than cores take turns.

Alternatives considered:
- A table of every shape: it would need all shapes of a model before the model is known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from k2train.errors import ConfigError

NOISY = 0.3
"""Spread of repeated measurements from which on a machine counts as noisy."""
ATTENTION_BLOCK = 64
"""Queries that an attention kernel takes at a time; each such block is a start."""
ELEMENT_BYTES: Mapping[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}

Amount = tuple[float, float, float]
"""(starts, FLOPs, bytes) of a piece of work."""


@dataclass(frozen=True)
class Line:
    """Time of one kernel or collective: a start, and constant rates for FLOPs and bytes."""

    start_seconds: float
    seconds_per_flop: float = 0.0
    seconds_per_byte: float = 0.0

    def seconds(self, amount: Amount) -> float:
        """Seconds of an amount of work."""
        starts, flops, size = amount
        return (
            starts * self.start_seconds
            + flops * self.seconds_per_flop
            + size * self.seconds_per_byte
        )


def product_amount(n: float, k: float, m: float, size: int) -> Amount:
    """[n, k] x [k, m] of elements with `size` bytes; the same for the gradient of an input."""
    return 1.0, 2 * n * k * m, size * (n * k + k * m + n * m)


def weight_amount(n: float, k: float, m: float, size: int) -> Amount:
    """Gradient of a weight [k, m] from n rows, added to an fp32 sum."""
    return 1.0, 2 * n * k * m, size * (n * k + n * m) + 8 * k * m


def attention_amount(sequences: float, heads: float, length: int, d: int, size: int) -> Amount:
    """Causal attention: FLOPs of half of the pairs, bytes of their scores."""
    pairs = sequences * heads * length * (length + ATTENTION_BLOCK) / 2
    return math.ceil(length / ATTENTION_BLOCK), 4 * pairs * d, size * pairs


def element_amount(elements: float, size: int) -> Amount:
    """An element-wise kernel, by the elements of its input."""
    return 1.0, 0.0, size * elements


def loss_amount(n: float, hidden: float, vocab: float, size: int, strips: int) -> Amount:
    """Head, softmax and both gradients of n positions, in `strips` strips."""
    return float(strips), 6 * n * hidden * vocab, size * n * vocab


@dataclass(frozen=True)
class RankSpeed:
    """Speed of one rank while `ranks` ranks compute at the same time."""

    ranks: int
    threads: int
    """Threads of each rank."""
    kernels: Mapping[str, Mapping[str, Line]]
    """By precision and name."""
    in_layer: float
    """Time of a kernel in a layer, whose input was just written, for that of its line."""
    layer_forward_seconds: float
    """Host time of a layer's forward beside its kernels."""
    layer_backward_seconds: float
    stage_forward_seconds: float
    """Host time of a stage's forward beside that of its layers, its kernels and head."""
    stage_backward_seconds: float
    step_seconds: float
    """What a step takes after its passes, whatever its size."""
    optimizer_seconds: float
    """Per parameter of the rank: sums cleared, norm, update."""
    wait_seconds: float = 0.0
    """What a collective of a layer waits beyond its line, whatever the layer's size: two ranks that
    share cores, and threads that are woken."""
    wait_share: float = 0.0
    """What a layer's collectives wait besides, for its work: ranks arrive unevenly."""
    uneven: float = 0.0
    """How much longer the slowest of the ranks takes than their mean, for the same work at the same
    time."""
    reference_seconds: float = 0.0
    """One round of the kernels that were timed: how fast the machine was. 0: not known."""


@dataclass(frozen=True)
class Measured:
    """A machine as it was measured, and how sure that is."""

    when: str
    processor: str
    torch: str
    cores: int | None
    """Cores that all ranks share; None where each has a device of its own."""
    spread: float
    """Distance of the quartiles of repeated measurements, as a share of their median."""
    error: float
    """Standard deviation of the measurements around their lines, as a share."""
    speeds: tuple[RankSpeed, ...]
    """By number of ranks, growing."""
    collectives: Mapping[str, Mapping[int, Line]]
    """By kind (`all-reduce`, `all-gather`, `reduce-scatter`, `weight-gather`, `send`) and number of
    ranks."""

    @property
    def noisy(self) -> bool:
        """Whether the same work took too different times."""
        return self.spread > NOISY

    def speed(self, ranks: int) -> RankSpeed:
        """Speed of a rank of so many: the entry of as many as compute at the same time, or less."""
        at_once = ranks if self.cores is None else min(ranks, self.cores)
        fitting = [one for one in self.speeds if one.ranks <= at_once]
        return fitting[-1] if fitting else self.speeds[0]

    def collective(self, kind: str, ranks: int) -> Line | None:
        """Line of a collective over so many ranks; None where none of that size was measured."""
        return self.collectives.get(kind, {}).get(ranks)


def kernel_line(speed: RankSpeed, precision: str, name: str) -> Line:
    """Line of a kernel. Raises ConfigError for a precision that was not measured."""
    if precision not in speed.kernels:
        raise ConfigError(
            f"this machine was measured in {', '.join(speed.kernels)}, not in {precision}: "
            "choose one of them, or measure it again"
        )
    return speed.kernels[precision][name]
