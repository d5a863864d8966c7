"""Ranking of layouts: is the layout that the cost model takes the fastest of those measured?

- Rows of one source, model, batch and machine that differ in layout alone are a group.
- Of each: the rank correlation of predicted and measured seconds (Spearman), and how much longer
  the layout predicted fastest took than the one measured fastest.

Alternatives considered:
- All rows in one correlation: a large model is slower than a small one under any cost model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from k2train.planner.fit import Judged
from k2train.text import markdown_table

HEADINGS = ["model", "machine", "layouts", "rank correlation", "chosen layout slower by"]


@dataclass(frozen=True)
class Ranking:
    """How well the layouts of one model on one machine are ordered."""

    model: str
    machine: str
    layouts: int
    correlation: float
    """Of the ranks, -1 to 1."""
    slower: float
    """Measured seconds of the layout predicted fastest for those of the fastest, less one."""


def rankings(judged: Sequence[Judged]) -> list[Ranking]:
    """Groups of two and more layouts, in the rows' order."""
    groups: dict[tuple[object, ...], list[Judged]] = {}
    for one in judged:
        work, cluster = one.case.work, one.case.cluster
        key = (
            one.case.source,
            *(work.shape, work.sequence_length, work.global_sequences, work.precision),
            *(cluster.device.name, work.world_size),
        )
        groups.setdefault(key, []).append(one)
    return [_ranking(own) for own in groups.values() if len(own) > 1]


def _ranking(own: Sequence[Judged]) -> Ranking:
    case = own[0].case
    measured = [one.case.measured_seconds or math.nan for one in own]
    predicted = [one.seconds for one in own]
    chosen = min(range(len(own)), key=lambda index: predicted[index])
    return Ranking(
        f"{case.row.get('model', '')}, {case.work.global_sequences} sequences",
        f"{case.work.world_size} {case.cluster.device.name}",
        len(own),
        rank_correlation(measured, predicted),
        measured[chosen] / min(measured) - 1,
    )


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's correlation: that of the ranks, equal values sharing theirs. NaN if all do."""
    pairs = list(zip(_ranks(first), _ranks(second), strict=True))
    middle = (len(pairs) - 1) / 2
    both = sum((a - middle) * (b - middle) for a, b in pairs)
    own = sum((a - middle) ** 2 for a, _ in pairs) * sum((b - middle) ** 2 for _, b in pairs)
    return both / math.sqrt(own) if own else math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def ranking_lines(judged: Sequence[Judged]) -> list[str]:
    """Markdown table of all groups, and a line of how many layouts were chosen well."""
    found = rankings(judged)
    if not found:
        return []
    rows = [
        [one.model, one.machine, str(one.layouts), f"{one.correlation:.2f}", f"{one.slower:.1%}"]
        for one in found
    ]
    good = sum(one.slower <= 0.03 for one in found)
    return [
        "",
        *markdown_table(HEADINGS, rows),
        "",
        f"In {good} of {len(found)} groups the layout predicted fastest is within 3 % of the "
        f"fastest measured.",
    ]
