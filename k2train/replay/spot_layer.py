"""Spot check of one layer of a large checkpoint, in little memory: digests, and what Adam allows.

- Tensors are read in blocks of rows, so memory does not grow with the layer.
- The digests of the layer's tensors are computed anew and must be those under the state's root.
- The weights must be the rounded master weights.
- Two inequalities hold for every element, whatever the gradients were. With c of `step_bound`:
  the first moment is at most c times the root of the second; and between two checkpoints a master
  weight moves, its decay aside, by at most c times the sum of the rates (bias corrections above 1
  included).

It does not prove that the gradients were those of the data: for that, the steps are replayed.
"""

from collections.abc import Iterator, Sequence
from math import prod, sqrt
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from k2train.checkpoint.manifest import CheckpointManifest
from k2train.errors import CheckpointError
from k2train.replay.read_rows import read_rows
from k2train.replay.recorded_run import RecordedRun, Segment
from k2train.state_digest import LANES, MASK, block_sums, digest_text, state_root

BLOCK_BYTES = 1 << 26
"""Bytes of a block of rows of one state."""
STATES = ("master", "exp_avg", "exp_avg_sq")
ROUNDING = 1e-5
"""Relative slack for fp32 in the inequalities."""


class LayerSpot(NamedTuple):
    """What was checked of a layer, and what is wrong."""

    tensors: int
    elements: int
    moved: float
    """Largest movement of a weight, as a part of what Adam allows."""
    problems: tuple[str, ...]


def step_bound(betas: tuple[float, float]) -> float:
    """Return c: |m| <= c sqrt(v) for any gradients, by the inequality of Cauchy and Schwarz.

    m is (1 - b1) sum b1^k g, v is (1 - b2) sum b2^k g^2. Infinite where b1^2 >= b2.
    """
    b1, b2 = betas
    if b1 * b1 >= b2:
        return float("inf")
    return (1 - b1) / sqrt((1 - b2) * (1 - b1 * b1 / b2))


def largest_step(betas: tuple[float, float], first: int, last: int) -> float:
    """Largest |update| / rate of the updates `first` to `last`, bias corrections included."""
    b1, b2 = betas
    corrections = (sqrt(1 - b2**t) / (1 - b1**t) for t in range(first, min(last, first + 5000) + 1))
    return step_bound(betas) * max(1.0, *corrections)


def spot_layer(run: RecordedRun, segment: Segment, layer: int) -> LayerSpot:
    """Check layer `layer` of the checkpoint at the end of a segment against its begin.

    Raises CheckpointError when a file is damaged, or the model has no such layer.
    """
    assert segment.end is not None, "a segment between two checkpoints"
    before, after = run.manifest(segment.begin), run.manifest(segment.end)
    prefix, shapes = f"layers.{layer}.", after.shapes("model")
    names = [name for name in shapes if name.startswith(prefix)]
    if not names:
        raise CheckpointError(f"{segment.end}: the model has no layer {layer}")
    known = after.state
    if known is None:
        raise CheckpointError(f"{segment.end} has no digests (format 1): it cannot be spot-checked")

    problems = list[str]()
    if state_root(known.digests, after.step, after.adam_steps) != known.root:
        problems.append(f"{segment.end.name}: its digests are not those of its root")
    optimizer = after.config["optimizer"]
    betas = (float(optimizer["betas"][0]), float(optimizer["betas"][1]))
    rates = [run.row(step).lr for step in range(segment.first, segment.last + 1)]
    largest = largest_step(betas, before.adam_steps + 1, after.adam_steps)
    rules = _Rules(betas, rates, float(optimizer["weight_decay"]), largest)

    elements, moved = 0, 0.0
    for name in names:
        sums = {state: [0] * LANES for state in STATES}
        found = list[str]()
        for rows in _blocks(shapes[name]):
            part = _Part.read((segment.begin, before), (segment.end, after), name, rows)
            part.add_sums(sums, rows, shapes[name])
            found += part.problems(rules)
            moved = max(moved, part.moved(rules))
        for state in STATES:
            key = f"{name}.{state}"
            if digest_text(sums[state]) != known.digests.get(key):
                found.append("digest is not the recorded one")
        elements += prod(shapes[name])
        problems += [f"{segment.end.name}: {name}: {text}" for text in dict.fromkeys(found)]
    return LayerSpot(len(names), elements, moved, tuple(problems))


class _Rules(NamedTuple):
    """Numbers of the inequalities."""

    betas: tuple[float, float]
    rates: Sequence[float]
    decay: float
    largest: float

    def allowed(self) -> float:
        """Most that a weight may move besides its decay."""
        return self.largest * sum(self.rates) * (1 + ROUNDING)

    def kept(self) -> float:
        """What the decay leaves of a weight."""
        return prod(1 - rate * self.decay for rate in self.rates)


class _Part(NamedTuple):
    """A block of rows of one tensor, before and after."""

    old: Tensor
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    weight: Tensor
    decays: bool

    @classmethod
    def read(
        cls,
        before: tuple[Path, CheckpointManifest],
        after: tuple[Path, CheckpointManifest],
        name: str,
        rows: range,
    ) -> "_Part":
        """Read the block, every piece of it checked. Raises CheckpointError."""
        shape = after[1].shapes("model")[name]
        (old,) = read_rows(*before, "optimizer", {f"{name}.master": shape}, rows)
        master, exp_avg, exp_avg_sq = read_rows(
            *after, "optimizer", {f"{name}.{state}": shape for state in STATES}, rows
        )
        (weight,) = read_rows(*after, "model", {name: shape}, rows)
        return cls(old, master, exp_avg, exp_avg_sq, weight, decays=len(shape) > 1)

    def add_sums(self, sums: dict[str, list[int]], rows: range, shape: list[int]) -> None:
        """Add this block's part of the digests."""
        offsets = [rows.start, *[0] * (len(shape) - 1)]
        for state, values in zip(STATES, (self.master, self.exp_avg, self.exp_avg_sq), strict=True):
            added = block_sums(values.numpy(), offsets, shape)
            sums[state] = [(a + b) & MASK for a, b in zip(sums[state], added, strict=True)]

    def moved(self, rules: _Rules) -> float:
        """Largest movement as a part of what is allowed; decay moves at most by itself."""
        kept = rules.kept() if self.decays else 1.0
        # Between an update without and one with all the decay, the weight lies anywhere.
        low = torch.minimum(self.old, self.old * kept)
        high = torch.maximum(self.old, self.old * kept)
        away = torch.maximum(low - self.master, self.master - high).clamp_(min=0.0)
        return float(away.max()) / max(rules.allowed(), 1e-300)

    def problems(self, rules: _Rules) -> list[str]:
        """Say which inequality does not hold."""
        found = []
        if not torch.equal(self.weight, self.master.to(self.weight.dtype)):
            found.append("the weights are not the rounded master weights")
        if (moved := self.moved(rules)) > 1:
            found.append(
                f"a weight moved {moved:.3g} times as far as {len(rules.rates)} updates at these "
                "rates allow"
            )
        bound = step_bound(rules.betas) * (1 + ROUNDING)
        # A second moment that vanishes in fp32 says nothing of the first.
        if bool((self.exp_avg.abs() > bound * self.exp_avg_sq.sqrt() + 1e-19).any()):
            found.append("a first moment is larger than its second moment allows")
        if bool((self.exp_avg_sq < 0).any()):
            found.append("a second moment is negative")
        return found


def _blocks(shape: Sequence[int]) -> Iterator[range]:
    """Blocks of rows of about `BLOCK_BYTES`."""
    rows = max(1, BLOCK_BYTES // (4 * prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield range(start, min(start + rows, shape[0]))
