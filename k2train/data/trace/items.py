"""Evaluation items that occur in the chunks: longest span, share covered, and when trained on.

- An item is one line of a JSON Lines file; its text is a string under one key.
- Covered are the tokens that lie in any span of at least the given length. Thirteen tokens are the
  usual length for that: long enough that a match is rarely chance.
- An item counts as trained on when one of its longest spans was, by the run.

Source: 13-grams against contamination: Brown et al. 2020 (arXiv:2005.14165) appendix C.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from k2train.data.inspect.run_progress import TRAINED
from k2train.data.trace.findings import PlaceFinding, SpanFinding
from k2train.data.trace.query import Spelling
from k2train.errors import DataError
from k2train.retry import open_retried

ITEM_TOKENS = 13
BOUNDS = (1.0, 0.8, 0.5, 0.0)
"""Lower bounds of the covered share in the summary's lines."""


@dataclass(frozen=True)
class ItemFinding:
    """One item: its tokens, the longest span, and the share of its tokens in spans."""

    item: int
    """Number of the item, from 1."""
    tokens: int
    longest: int
    covered: float
    trained: bool
    steps: tuple[int, ...]
    """Steps that trained on its longest span."""
    where: PlaceFinding | None
    text: str
    spans: tuple[SpanFinding, ...]


@dataclass(frozen=True)
class SummaryLine:
    """Items whose covered share is within bounds."""

    covered: str
    items: int
    trained: int


@dataclass(frozen=True)
class ItemSummary:
    """Counts of all items."""

    items: int
    min_tokens: int
    lines: tuple[SummaryLine, ...]


def read_items(path: Path, key: str) -> list[str]:
    """Read the texts of a JSON Lines file. Raises DataError naming the line."""
    try:
        with open_retried(path) as stream:
            return list(_texts(path, key, stream))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _texts(path: Path, key: str, lines: Iterator[bytes]) -> Iterator[str]:
    for line_number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}: line {line_number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise DataError(f"{where} is not JSON; each line must hold one object") from None
        if not isinstance(row, dict) or not isinstance(row.get(key), str):
            known = ", ".join(sorted(row)[:8]) if isinstance(row, dict) else "no keys"
            raise DataError(
                f"{where} has no text under {key!r}; it has {known}; name the key with --key"
            )
        yield row[key]


def item_finding(
    item: int, text: str, spelling: Spelling, spans: Sequence[SpanFinding]
) -> ItemFinding:
    """Sum up the spans of an item; `spelling` are its tokens."""
    covered = np.zeros(max(1, int(spelling.offsets[-1])), dtype=np.bool_)
    for span in spans:
        covered[span.first : span.last] = True
    inside = [
        bool(covered[begin:end].all()) and begin < end
        for begin, end in zip(spelling.offsets[:-1], spelling.offsets[1:], strict=True)
    ]

    longest = max(spans, key=lambda span: span.tokens, default=None)
    exposures = [] if longest is None else longest.exposures
    steps = sorted({e.step for e in exposures if e.state == TRAINED and e.step is not None})
    return ItemFinding(
        item,
        len(spelling.ids),
        0 if longest is None else longest.tokens,
        sum(inside) / max(1, len(inside)),
        any(one.state == TRAINED for one in exposures),
        tuple(steps),
        longest.places[0] if longest is not None and longest.places else None,
        text,
        tuple(spans),
    )


def summary_of(items: Sequence[ItemFinding], min_tokens: int) -> ItemSummary:
    """Count items by how much of them is covered."""
    lines, above = [], 2.0
    for bound in BOUNDS:
        here = [i for i in items if i.longest and bound <= i.covered < above]
        name = "wholly" if bound == 1 else f"{bound:.0%} or more" if bound else "less"
        lines.append(SummaryLine(name, len(here), sum(item.trained for item in here)))
        above = bound
    none = sum(not item.longest for item in items)
    return ItemSummary(len(items), min_tokens, (*lines, SummaryLine("no span", none, 0)))


def facts_of(item: ItemFinding) -> Mapping[str, object]:
    """Return keys and values for JSON."""
    return {
        **{key: getattr(item, key) for key in ("item", "tokens", "longest", "covered", "trained")},
        "steps": list(item.steps),
        "spans": [span.facts() for span in item.spans],
    }
