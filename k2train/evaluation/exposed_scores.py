"""Scores of exposed and clean test items down the checkpoints, and before and after exposure.

- At each checkpoint: the mean of exposed items, that of clean ones, and their difference.
- Before and after: each exposed item at the last evaluated checkpoint before the step that exposed
  it, and at the first one with that step. Clean items are taken at the same pairs of checkpoints,
  so that what training itself gains is taken off.
- Every mean has its count and its standard error; of one item there is none.

Alternatives considered:
- Only comparing exposed with clean items: they may differ in difficulty, and a pair does not.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from k2train.errors import UserError
from k2train.evaluation.contamination_findings import CLEAN, EXPOSED, ItemFinding
from k2train.evaluation.pass_at_k import mean_and_error
from k2train.evaluation.results import Item, TaskResult
from k2train.evaluation.scores import main_of
from k2train.text import counted

FEW_ITEMS = 30
"""Below so many items the error of a mean is itself uncertain."""
TARGET_LIKELIHOOD = "target_log_likelihood"
"""Log-likelihood of the right choice: it moves where a score of 0 or 1 does not."""


@dataclass(frozen=True)
class Mean:
    """A mean of so many items, and its standard error."""

    items: int
    mean: float | None
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        """Return the mean of values, of none of them, too."""
        return cls(len(values), *(mean_and_error(values) if values else (None, None)))


def difference(left: Mean, right: Mean) -> Mean:
    """Return the difference of two independent means; `items` is the smaller count."""
    items = min(left.items, right.items)
    if left.mean is None or right.mean is None:
        return Mean(items, None, None)
    error = None
    if left.error is not None and right.error is not None:
        error = math.sqrt(left.error**2 + right.error**2)
    return Mean(items, left.mean - right.mean, error)


@dataclass(frozen=True)
class CheckpointScores:
    """Scores at one checkpoint; `read` of the exposed items were exposed by then."""

    checkpoint: str
    step: int
    read: int
    exposed: Mean
    clean: Mean
    difference: Mean


@dataclass(frozen=True)
class ExposedScores:
    """Scores of a task by exposure."""

    metric: str
    checkpoints: tuple[CheckpointScores, ...]
    pairs: Mapping[tuple[str, str], int]
    """Checkpoints before and after, and the exposed items between them."""
    exposed_change: Mean
    """After minus before, item by item."""
    clean_change: Mean
    """The same of clean items, at the same pairs."""
    difference: Mean
    notes: tuple[str, ...]


def metric_of(result: TaskResult, items: Sequence[Item], wanted: str | None) -> str:
    """Return the metric that is compared: `wanted`, or the main one that its items have.

    Raises UserError when they do not have it.
    """
    own = {name for item in items for name in item.scores}
    # In the task's order: where no usual metric is there, its first one is the main one.
    names = [name for name in result.scores if name in own]
    names += sorted(own - set(names))
    main = main_of(names)
    if any(_target_likelihood(item) is not None for item in items):
        names.append(TARGET_LIKELIHOOD)
    if wanted is not None:
        if wanted not in names:
            raise UserError(f"--metric ({wanted}): the items have {', '.join(names) or 'none'}")
        return wanted
    if main is None and not names:
        raise UserError("the items of this task have no scores: evaluate it again")
    return main or names[0]


def exposed_scores(
    results: Sequence[tuple[TaskResult, Sequence[Item]]],
    findings: Sequence[ItemFinding],
    metric: str,
) -> ExposedScores:
    """Compare scores by exposure; `results` are those of one task, in the order of their steps."""
    exposed = {one.name: one.step for one in findings if one.label == EXPOSED}
    steps = {name: step for name, step in exposed.items() if step is not None}
    clean = {one.name for one in findings if one.label == CLEAN}
    values = [_values(items, metric) for _, items in results]

    checkpoints = []
    for (result, _), own in zip(results, values, strict=True):
        left = Mean.of([own[name] for name in sorted(steps) if name in own])
        right = Mean.of([own[name] for name in sorted(clean) if name in own])
        read = sum(step <= result.step for step in steps.values())
        both = difference(left, right)
        checkpoints.append(
            CheckpointScores(result.checkpoint, result.step, read, left, right, both)
        )

    changes: list[float] = []
    pairs: Counter[tuple[int, int]] = Counter()
    alone = 0
    for name, step in steps.items():
        pair = _around([result.step for result, _ in results], step)
        if pair is None or any(name not in values[at] for at in pair):
            alone += 1
            continue
        pairs[pair] += 1
        changes.append(values[pair[1]][name] - values[pair[0]][name])

    own_change = Mean.of(changes)
    clean_change = Mean.of(_clean_changes(values, clean, pairs))
    names = {
        (results[before][0].checkpoint, results[after][0].checkpoint): count
        for (before, after), count in sorted(pairs.items())
    }
    notes = _notes(len(steps), len(clean), alone, own_change)
    endless = sum(
        (value := _value(item, metric)) is not None and not math.isfinite(value)
        for _, items in results
        for item in items
    )
    if endless:
        notes += (f"left out, because they are not finite: {counted(endless, 'value')}",)
    return ExposedScores(
        metric,
        tuple(checkpoints),
        names,
        own_change,
        clean_change,
        difference(own_change, clean_change),
        notes,
    )


def _values(items: Sequence[Item], metric: str) -> dict[str, float]:
    found = {}
    for item in items:
        value = _value(item, metric)
        # A sum with one of infinity is infinite, and a difference of two is no number.
        if value is not None and math.isfinite(value):
            found[item.item] = float(value)
    return found


def _value(item: Item, metric: str) -> float | None:
    if metric == TARGET_LIKELIHOOD:
        return _target_likelihood(item)
    return item.scores.get(metric)


def _target_likelihood(item: Item) -> float | None:
    """Log-likelihood of the choice that is the target, with or without a space around it."""
    texts = [choice.strip() for choice in item.choices]
    target = item.target.strip()
    if target not in texts or len(item.log_likelihoods) != len(texts):
        return None
    return float(item.log_likelihoods[texts.index(target)])


def _around(steps: Sequence[int], step: int) -> tuple[int, int] | None:
    """Last position before a step, and the first that has it."""
    before = [at for at, one in enumerate(steps) if one < step]
    after = [at for at, one in enumerate(steps) if one >= step]
    return (before[-1], after[0]) if before and after else None


def _clean_changes(
    values: Sequence[Mapping[str, float]], clean: set[str], pairs: Counter[tuple[int, int]]
) -> list[float]:
    """Change of each clean item, averaged over the pairs as the exposed items are."""
    total = sum(pairs.values())
    changes = []
    for name in sorted(clean):
        if total and all(name in values[at] for pair in pairs for at in pair):
            changes.append(
                sum(
                    count * (values[after][name] - values[before][name])
                    for (before, after), count in pairs.items()
                )
                / total
            )
    return changes


def _notes(exposed: int, clean: int, alone: int, change: Mean) -> tuple[str, ...]:
    notes = []
    if not exposed:
        return ("no item is exposed, so there is nothing to compare",)
    for count, what in ((exposed, "exposed"), (clean, "clean")):
        if count < FEW_ITEMS:
            notes.append(
                f"{count} {what} items are few: a difference below two standard errors says "
                "nothing, and the error itself is uncertain"
            )
    if alone:
        notes.append(
            f"{alone} of {exposed} exposed items have no evaluated checkpoint on both sides of "
            "their step"
        )
    if change.items > 1 and change.error == 0:
        notes.append("all exposed items changed alike: an error of 0 is not certainty")
    return tuple(notes)
