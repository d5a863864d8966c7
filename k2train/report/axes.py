"""Axes of the figures: tokens and seconds of training up to a step, for the script of the page.

- Figures are drawn over steps. The page moves their points onto another axis by this table, so a
  page with three axes is not three times as large.
- Seconds are those of the steps that count, without pauses and without what was undone: a longer
  way to the same step does not shift the curve.

Alternatives considered:
- Time of day: what was done twice would be drawn twice, and a night between two starts is a gap.
"""

import math
from collections.abc import Sequence

from k2train.report.collect import RunView

KNOTS = 400
"""Places of the table, as many as a curve has columns."""


def axis_table(run: RunView) -> dict[str, list[float]]:
    """Return steps, and the tokens and seconds of training up to each of them; all rise from 0."""
    steps, tokens, seconds = [0], [0], [0.0]
    each = max(1, math.ceil(len(run.kept) / KNOTS))
    trained = 0.0
    for number, record in enumerate(run.kept, 1):
        trained += record.seconds if math.isfinite(record.seconds) else 0.0
        if number % each == 0 or number == len(run.kept):
            steps.append(record.step)
            tokens.append(max(record.consumed_tokens, tokens[-1]))
            seconds.append(round(trained, 3))
    return {"step": [*steps], "tokens": [*tokens], "time": seconds}


def axis_tables(runs: Sequence[RunView]) -> list[dict[str, list[float]]]:
    """Return the table of each run that is drawn."""
    return [axis_table(run) for run in runs]
