"""Which shard files probably hold a rank's values, from the layout that was saved and its own. No
torch.

- A rank reads the side files of these first. Whether they hold all of its values is then known for
  certain; if not, it reads those of all files.
- Equal layouts: its own file, and that of its first tensor-parallel rank.
- Others: a few neighbours in each saved pipeline stage, however large the world.

Alternatives considered:
- Reading all side files: at 16,384 ranks these are a gigabyte for each of them.
"""

from collections.abc import Iterator
from math import ceil, floor
from typing import cast

from k2train.checkpoint.run_facts import LayoutFacts
from k2train.plan.layout import Coordinate, Layout, Placement

MARGIN = 1
"""Neighbours on each side: uneven rows shift the cuts."""


def saved_layout(facts: LayoutFacts | None, files: int) -> Layout | None:
    """Layout that a manifest of so many `files` names.

    None when it names none that can be, or more ranks than can have written these files.
    """
    if facts is None or facts.tensor * facts.pipeline * facts.data > files:
        return None
    layers, placement = facts.layers_per_stage, facts.placement
    if placement not in ("loop", "v"):
        return None
    try:
        return Layout(
            facts.tensor,
            facts.pipeline,
            facts.data,
            facts.stages_per_rank,
            cast(Placement, placement),
            None if layers is None else tuple(layers),
        )
    except AssertionError:
        return None


def likely_files(layout: Layout, rank: int, saved: Layout | None) -> list[int]:
    """Indices of files, in the order of names, that probably hold the values of `rank`."""
    at = layout.coordinate(rank)
    # What all tensor-parallel ranks hold whole is in the file of the first of them.
    own = [rank, layout.rank(Coordinate(pp=at.pp, dp=at.dp, tp=0))]
    if saved is None or saved == layout:
        return own

    # Stages may be cut elsewhere, so each of them is asked.
    cells = sorted(set(_cells(layout, at, saved)))
    return [
        saved.rank(Coordinate(pp=pp, dp=dp, tp=tp))
        for pp in range(saved.pipeline)
        for tp, dp in cells
    ]


def _cells(layout: Layout, at: Coordinate, saved: Layout) -> Iterator[tuple[int, int]]:
    """Yield saved (tp, dp) whose boxes may overlap this rank's."""
    rows = (at.dp / layout.data, (at.dp + 1) / layout.data)
    # Cut by columns: a part of the columns, and of all rows.
    for tp in _overlapping(at.tp / layout.tensor, (at.tp + 1) / layout.tensor, saved.tensor):
        for dp in _overlapping(*rows, saved.data, MARGIN):
            yield tp, dp
    # Held whole: the first rank's rows.
    for dp in _overlapping(*rows, saved.data, MARGIN):
        yield 0, dp
    # Cut by rows: first over tensor-parallel ranks, then over data-parallel ones.
    low, high = ((at.tp + part) / layout.tensor for part in rows)
    for index in _overlapping(low, high, saved.tensor * saved.data, MARGIN):
        yield divmod(index, saved.data)


def _overlapping(low: float, high: float, parts: int, margin: int = 0) -> range:
    """Indices of the `parts` equal parts of 0 to 1 that `low` to `high` overlaps."""
    first, last = floor(low * parts) - margin, ceil(high * parts) + margin
    return range(max(first, 0), min(last, parts))
