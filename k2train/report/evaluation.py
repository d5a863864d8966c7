"""Scores on tasks in the report: one curve a task over the steps of its checkpoints.

- Shares of right answers and losses have figures of their own: their axes differ. A figure has at
  most as many curves as the page has colors.
- A score that is not finite has no point.
- A result of other weights under the name of a checkpoint is left out, with a note.

Source: the figure is that of K2-65B (arXiv:2501.07124, Figure 4), score against checkpoint.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from k2train.errors import RunError
from k2train.evaluation.results import TaskResult, is_of_other_weights, read_results
from k2train.evaluation.scores import LOWER_IS_BETTER, main_metric, shown, title_of
from k2train.report.figure import Curve, Figure

CURVES = 8
"""Curves of a figure: colors of the page."""


def read_evaluations(directory: Path, notes: list[str]) -> list[TaskResult]:
    """Read the scores of a run; what is damaged or of other weights is a note."""
    try:
        found = read_results(directory)
    except RunError as error:
        notes.append(f"no scores on tasks: {error}")
        return []
    kept = [one for one in found if not is_of_other_weights(directory, one)]
    others = sorted({one.checkpoint for one in found} - {one.checkpoint for one in kept})
    if others:
        notes.append(
            f"scores on tasks of {', '.join(others)} left out: it was saved again since; evaluate "
            "it again"
        )
    return kept


def evaluation_figures(results: Sequence[TaskResult]) -> list[Figure]:
    """Return the figures of all tasks: shares first, then losses."""
    kept = [one for one in shown(results) if main_metric(one) is not None]
    shares = [one for one in kept if not _is_loss(one)]
    losses = [one for one in kept if _is_loss(one)]
    return [
        *_figures("Scores on tasks", "share of right answers", shares),
        *_figures("Losses on tasks", "lower is better", losses),
    ]


def _is_loss(result: TaskResult) -> bool:
    return str(main_metric(result)).partition(",")[0] in LOWER_IS_BETTER


def _figures(title: str, unit: str, results: Sequence[TaskResult]) -> list[Figure]:
    names = list(dict.fromkeys(one.task for one in results))
    parts = [names[start : start + CURVES] for start in range(0, len(names), CURVES)]
    found = []
    for number, part in enumerate(parts, start=1):
        curves = [_curve(name, color, results) for color, name in enumerate(part, start=1)]
        several = f", {number} of {len(parts)}" if len(parts) > 1 else ""
        found.append(Figure(f"{title}{several}", unit, curves))
    return found


def _curve(name: str, color: int, results: Sequence[TaskResult]) -> Curve:
    own = sorted((one for one in results if one.task == name), key=lambda one: one.step)
    metric = main_metric(own[0])
    assert metric is not None, "results without a score have no curve"
    scores = [(one.step, one.scores[metric]) for one in own if metric in one.scores]
    points = [(step, score) for step, score in scores if math.isfinite(score)]
    return Curve(f"{title_of(own[0])} {metric}", points, color, dots=True)
