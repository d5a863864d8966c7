"""Benchmark results: medians with spread, ratios per round, work checks, and targets met or missed.

- A ratio is the median of the rounds' ratios, numerator and denominator from the same round: what
  slows a round slows both.

Alternatives considered:
- The ratio of two medians: they may be from different minutes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cpu.contenders import AIMS, PRECISIONS, REFERENCE, Aim
from benchmarks.cpu.rounds import Sample
from benchmarks.cpu.work import Work

ESTABLISHED = 0.08
"""Smaller differences are not significant on a shared machine."""
FIRST_LOSS_TOLERANCE = 0.02


@dataclass(frozen=True)
class Ratio:
    """Relative speed over the rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """Result of one contender; numbers are null where it has none, and `problem` says why."""

    name: str
    group: str
    precision: str
    ours: bool
    base: bool
    world: int
    threads: int
    tokens_per_second: float | None
    low: float | None
    high: float | None
    to_reference: Ratio | None
    seconds: tuple[float | None, ...]
    steps: int
    first_loss: float | None
    last_loss: float | None
    parameters: int | None
    peak_resident_bytes: int | None
    peak_step_bytes: int | None
    note: str
    runtime: dict[str, Any] | None
    problem: str | None
    kind: str
    """`unavailable`, `failed` or `other work`; empty without a problem."""


@dataclass(frozen=True)
class Verdict:
    """A target as measured: the best of ours against the best of theirs in one group."""

    title: str
    precision: str
    ours: str
    theirs: str
    wanted: float
    measured: Ratio

    @property
    def met(self) -> bool:
        """True when the target is met."""
        return self.measured.median >= self.wanted


def ratio(ours: Sequence[float | None], theirs: Sequence[float | None]) -> Ratio | None:
    """Speed of ours over theirs from seconds of the same rounds.

    None if no round finished in both.
    """
    found = [b / a for a, b in zip(ours, theirs, strict=False) if a is not None and b is not None]
    return Ratio(statistics.median(found), min(found), max(found)) if found else None


def rows_of(samples: Sequence[Sample], work: Work) -> list[Row]:
    """Rows of one group, each relative to the reference of its precision in that group."""
    references = {s.contender.precision: s for s in samples if s.contender.name == REFERENCE}
    return [_row(sample, references.get(sample.contender.precision), work) for sample in samples]


def _row(sample: Sample, reference: Sample | None, work: Work) -> Row:
    c = sample.contender
    problem, kind = sample.problem, sample.kind
    if problem is None and (differs := other_work(sample, work)):
        problem, kind = differs, "other work"
    rates = [work.tokens / s for s in sample.seconds if s is not None]

    return Row(
        name=c.name,
        group=c.group,
        precision=c.precision,
        ours=c.ours,
        base=c.root is not None,
        world=c.world,
        threads=sample.threads,
        tokens_per_second=statistics.median(rates) if rates else None,
        low=min(rates, default=None),
        high=max(rates, default=None),
        to_reference=ratio(sample.seconds, reference.seconds) if reference else None,
        seconds=tuple(sample.seconds),
        steps=len(sample.losses),
        first_loss=sample.losses[0] if sample.losses else None,
        last_loss=sample.losses[-1] if sample.losses else None,
        parameters=sample.parameters,
        peak_resident_bytes=sample.peak_resident_bytes,
        peak_step_bytes=sample.peak_step_bytes,
        note=sample.note,
        runtime=sample.runtime,
        problem=problem,
        kind=kind,
    )


def other_work(sample: Sample, work: Work) -> str | None:
    """Describe why a sample did other work than the rest; None when nothing indicates it."""
    if sample.parameters != work.parameters:
        return f"{sample.parameters} parameters instead of {work.parameters}"
    if not sample.losses or not all(map(math.isfinite, sample.losses)):
        return "its loss is not finite" if sample.losses else "it reported no loss"
    first, last, expected = sample.losses[0], sample.losses[-1], math.log(work.vocab_size)
    if abs(first / expected - 1) > FIRST_LOSS_TOLERANCE:
        return f"its first loss is {first:.3f}, ln(vocabulary) {expected:.3f}"
    if len(sample.losses) > 1 and last >= first:
        return (
            f"its loss did not fall on a repeated batch: {first:.3f} -> {last:.3f} in "
            f"{len(sample.losses)} steps"
        )

    return None


def verdicts_of(rows: Sequence[Row]) -> list[Verdict]:
    """Every target that these rows can answer."""
    found = [_verdict(rows, aim, precision) for precision in PRECISIONS for aim in AIMS]
    return [verdict for verdict in found if verdict is not None]


def _verdict(rows: Sequence[Row], aim: Aim, precision: str) -> Verdict | None:
    usable = [
        r
        for r in rows
        if r.precision == precision and r.tokens_per_second and not r.problem and not r.base
    ]
    ours = _fastest([r for r in usable if r.name in aim.ours])
    if ours is None:
        return None
    theirs = _fastest([r for r in usable if r.name in aim.theirs and r.group == ours.group])
    measured = ratio(ours.seconds, theirs.seconds) if theirs else None
    if theirs is None or measured is None:
        return None
    return Verdict(aim.title, precision, ours.name, theirs.name, aim.factor, measured)


def _fastest(rows: Sequence[Row]) -> Row | None:
    return max(rows, key=lambda r: r.tokens_per_second or 0.0, default=None)


def joining_ratio(rows: Sequence[Row], precision: str) -> float | None:
    """The reference in this precision against the fp32 one, from the group with both.

    None without.
    """
    references = [r for r in rows if r.name == REFERENCE]
    for row in references:
        for other in references:
            if (
                row.precision == precision
                and other.precision == PRECISIONS[0]
                and row.group == other.group
            ):
                found = ratio(row.seconds, other.seconds)
                return found.median if found else None
    return None
