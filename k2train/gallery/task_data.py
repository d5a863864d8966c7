"""Data files of the evaluation gallery: scores of a task, and each item down the checkpoints.

- Read one checkpoint at a time. The texts of an item are those of the newest one.
- Texts and numbers are in files of their own: a search loads the texts alone.
- A number that is not finite is a string, as in the results; the page shows it and draws no point.
- An item is right where the main metric of its task is 1, and partly right between 0 and 1. A loss
  says nothing of right and wrong.

Alternatives considered:
- A file for each item: a task of 14,000 items would have 28,000 files.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from k2train.evaluation.results import (
    Item,
    TaskResult,
    is_of_other_weights,
    json_number,
    read_items,
    read_results,
)
from k2train.evaluation.scores import LOWER_IS_BETTER, main_metric
from k2train.gallery.prompt_data import Spans, with_spans
from k2train.gallery.verbatim import Facts
from k2train.text import counted

ITEMS_A_FILE = 50
NO_ANSWER = -1
RIGHT, PARTLY, WRONG, UNKNOWN = "1", "h", "0", "-"


@dataclass
class _Entry:
    """One item, as the checkpoints answered it."""

    newest: Item
    texts: dict[tuple[str, ...], int] = field(default_factory=dict)
    """Generated answers, several where a task takes samples, and their numbers."""
    answers: list[int] = field(default_factory=list)
    likelihoods: list[list[float | str] | None] = field(default_factory=list)
    prompts: list[str | None] = field(default_factory=list)


@dataclass
class TaskView:
    """A task with all its items over the checkpoints that were evaluated, oldest first."""

    results: Sequence[TaskResult]
    metric: str | None
    entries: list[_Entry]
    right: list[str]
    """A letter for each item, for each checkpoint."""

    def texts(self) -> Iterator[str]:
        """Yield all generated texts and all choices, for the search in the training data."""
        for entry in self.entries:
            yield from entry.newest.choices
            for samples in entry.texts:
                yield from samples


def current_results(
    run: Path, names: Sequence[str] | None
) -> tuple[dict[str, list[TaskResult]], list[str]]:
    """Return the results by task, oldest first, and notes of those of other weights.

    With `names`, only of these checkpoints. Raises RunError.
    """
    found: dict[str, list[TaskResult]] = {}
    stale = 0
    for result in read_results(run):
        if names is not None and result.checkpoint not in names:
            continue
        if is_of_other_weights(run, result):
            stale += 1
            continue
        found.setdefault(result.task, []).append(result)
    note = f"{counted(stale, 'result')} of other weights left out; evaluate again"
    return found, [note] if stale else []


def read_task(run: Path, results: Sequence[TaskResult]) -> TaskView:
    """Read all items of a task. Raises RunError."""
    entries: dict[str, _Entry] = {}
    metric = right_metric(results[-1])
    right: list[dict[str, str]] = []
    # The newest first: it decides the order and the texts, as it does the metric.
    for behind, result in enumerate(reversed(results)):
        letters: dict[str, str] = {}
        for item in read_items(run, result):
            entry = entries.setdefault(item.item, _Entry(item))
            _fill_up(entry, behind)
            _add(entry, item)
            letters[item.item] = letter_of(item.scores, metric)
        right.append(letters)
    for entry in entries.values():
        _fill_up(entry, len(results))
        for column in (entry.answers, entry.likelihoods, entry.prompts):
            column.reverse()
    rows = ["".join(letters.get(name, UNKNOWN) for name in entries) for letters in reversed(right)]
    return TaskView(results, metric, list(entries.values()), rows)


def _fill_up(entry: _Entry, checkpoints: int) -> None:
    """Leave gaps for checkpoints that did not answer the item."""
    while len(entry.answers) < checkpoints:
        entry.answers.append(NO_ANSWER)
        entry.likelihoods.append(None)
        entry.prompts.append(None)


def _add(entry: _Entry, item: Item) -> None:
    if item.generated:
        answer = entry.texts.setdefault(tuple(item.generated), len(entry.texts))
    else:
        answer = NO_ANSWER if item.answer is None else item.answer
    entry.answers.append(answer)
    values = [json_number(round(float(value), 4)) for value in item.log_likelihoods]
    entry.likelihoods.append(values or None)
    entry.prompts.append(item.prompt_sha256)


def right_metric(result: TaskResult) -> str | None:
    """Return the metric that says whether an item is right; None where there is only a loss.

    The same one as in every table, and the one by which an item's answer was chosen.
    """
    metric = main_metric(result)
    is_loss = metric is not None and metric.partition(",")[0] in LOWER_IS_BETTER
    return None if is_loss else metric


def letter_of(scores: Mapping[str, Any], metric: str | None) -> str:
    """Return whether an item is right, partly right or wrong, as one letter."""
    value = scores.get(metric) if metric is not None else None
    if value is None or not 0 <= value <= 1:
        return UNKNOWN
    return RIGHT if value == 1 else PARTLY if value > 0 else WRONG


def task_files(tasks: Sequence[TaskView], spans: Spans | None) -> Iterator[tuple[str, Any]]:
    """Yield name and content of each file: `tasks` is the index."""
    for number, task in enumerate(tasks, 1):
        yield (
            f"task_{number}",
            {
                "right": task.right,
                "answers": [entry.answers for entry in task.entries],
            },
        )
        for first in range(0, len(task.entries), ITEMS_A_FILE):
            part = task.entries[first : first + ITEMS_A_FILE]
            block = first // ITEMS_A_FILE
            yield f"task_{number}_text_{block:04d}", [_texts(entry, spans) for entry in part]
            yield f"task_{number}_item_{block:04d}", [_numbers(entry) for entry in part]
    yield "tasks", {"tasks": [_facts(task) for task in tasks], "itemsAFile": ITEMS_A_FILE}


def _texts(entry: _Entry, spans: Spans | None) -> Facts:
    item = entry.newest
    wanted = item.target.strip()
    right = [n for n, choice in enumerate(item.choices) if wanted and choice.strip() == wanted]
    return {
        "item": item.item,
        "prompt": item.prompt,
        "target": item.target,
        "choices": [with_spans({"text": one}, one, spans) for one in item.choices],
        "right": right[0] if len(right) == 1 else None,
        "answers": [
            [with_spans({"text": one}, one, spans) for one in samples] for samples in entry.texts
        ],
    }


def _numbers(entry: _Entry) -> Facts:
    own = entry.newest.prompt_sha256
    others = [n for n, one in enumerate(entry.prompts) if one is not None and one != own]
    return {"likelihoods": entry.likelihoods, "otherPrompt": others}


def _number(value: float | None) -> float | str | None:
    return None if value is None else json_number(value)


def _facts(task: TaskView) -> Facts:
    newest = task.results[-1]
    names = dict.fromkeys(name for result in task.results for name in result.scores)
    return {
        "task": newest.task,
        "version": newest.version,
        "style": newest.style,
        "harness": newest.harness,
        "shots": newest.num_shots,
        "limit": newest.limit,
        "items": len(task.entries),
        "metric": task.metric,
        "checkpoints": [
            {"name": one.checkpoint, "step": one.step, "manifest": one.manifest_sha256}
            for one in task.results
        ],
        # A list: a name of a metric is no key of an object in a browser.
        "scores": [
            {
                "name": name,
                "values": [_number(one.scores.get(name)) for one in task.results],
                "errors": [_number(one.errors.get(name)) for one in task.results],
            }
            for name in names
        ],
    }
