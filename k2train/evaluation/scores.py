"""Scores of a run for people: the main score of each task, and a table of checkpoints by tasks.

- A task has several metrics. The main one is the first there is of a fixed order, in which
  normalized accuracy comes first, as in most published tables.
- Members of a group of tasks are left out where the group has a score.

Alternatives considered:
- All metrics of all tasks: 57 subjects of one benchmark hide the benchmark.
"""

from collections.abc import Sequence

from k2train.evaluation.results import TaskResult
from k2train.text import number, table

ORDER = (
    *("acc_norm", "acc", "mc2", "exact_match", "pass@1", "f1"),
    *("bits_per_byte", "byte_perplexity", "word_perplexity", "perplexity"),
)
"""Metrics, the first of which a task has is its main score."""
LOWER_IS_BETTER = {"bits_per_byte", "byte_perplexity", "word_perplexity", "perplexity"}


MEMBERS = "members_items_sha256"
"""Setting of a group's result: the hash of the items of each member that it was made of."""


def main_metric(result: TaskResult) -> str | None:
    """Return the name of a result's main score; None where it has no score."""
    return main_of(list(result.scores))


def main_of(names: Sequence[str]) -> str | None:
    """Return the main one of the names of a task's metrics; None for none."""
    for wanted in ORDER:
        # A metric behind a filter is named `metric,filter`.
        found = [name for name in names if name.partition(",")[0] == wanted]
        if found:
            return wanted if wanted in found else found[0]
    return names[0] if names else None


def title_of(result: TaskResult) -> str:
    """Return what people call a result's task: label, shots, and style where there are two."""
    name = result.label or result.task
    style = "" if result.style == "default" else f", {result.style}"
    return f"{name} ({result.num_shots}-shot{style})" if result.num_shots or style else name


def shown(results: Sequence[TaskResult]) -> list[TaskResult]:
    """Return the results without members of groups that have a score themselves.

    A group whose member was evaluated otherwise since is left out, and its members are shown.
    """
    now = {(one.checkpoint, one.task): one.items_sha256 for one in results}
    kept = [
        one
        for one in results
        if all(
            now.get((one.checkpoint, name), known) == known
            for name, known in one.settings.get(MEMBERS, {}).items()
        )
    ]
    members = {(one.checkpoint, name) for one in kept for name in one.members}
    return [one for one in kept if (one.checkpoint, one.task) not in members]


def score_text(result: TaskResult) -> str:
    """Return the main score with its standard error, such as `0.512 ± 0.031`."""
    metric = main_metric(result)
    if metric is None:
        return "-"
    error = result.errors.get(metric)
    return f"{result.scores[metric]:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def score_table(results: Sequence[TaskResult]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows: a row for each checkpoint, a column for each task."""
    kept = shown(results)
    columns = {one.task: f"{title_of(one)} {main_metric(one) or ''}".rstrip() for one in kept}
    found = {(one.checkpoint, one.task): one for one in kept}
    places = sorted({(one.step, one.checkpoint) for one in kept})
    rows = [
        [
            checkpoint,
            number(step),
            *(
                score_text(found[checkpoint, task]) if (checkpoint, task) in found else "-"
                for task in columns
            ),
        ]
        for step, checkpoint in places
    ]
    return ["checkpoint", "step", *columns.values()], rows


def table_lines(results: Sequence[TaskResult]) -> list[str]:
    """Return the table as aligned lines."""
    headings, rows = score_table(results)
    return table(headings, rows, left=("checkpoint",)) if rows else []
