"""Report of a contamination search: tables for people, and the file for a release.

- `RUN/evaluation/contamination.json` names items and places, never their texts: a file that holds
  test items would contaminate the next corpus.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from k2train.data.inspect.run_progress import TRAINED
from k2train.evaluation.contamination_findings import (
    CLEAN,
    EXPOSED,
    PARTLY,
    SHORT,
    Hit,
    ItemFinding,
    PartFinding,
    Rules,
)
from k2train.evaluation.exposed_scores import ExposedScores, Mean
from k2train.files import alone_in, write_synced
from k2train.text import clean, counted, number, table

FORMAT = 1
FILE = "contamination.json"
MOST_HITS = 10
"""Places of a part that the file has."""
HEADINGS = (
    *("item", "part", "tokens", "longest", "covered", "state", "answer"),
    *("chunk", "row", "step", "places"),
)
MEANING = {
    EXPOSED: "covered from {exposed:.0%}",
    PARTLY: "{clean:.0%} or more",
    CLEAN: "less",
    SHORT: "fewer than {least_tokens} tokens, not judged",
}


@dataclass(frozen=True)
class TaskFinding:
    """What is found of one task, or of one file of items."""

    task: str
    source: Mapping[str, Any]
    """Where the items are from: a result with the hash of its items, or a file with its own."""
    items: tuple[ItemFinding, ...]
    scores: ExposedScores | None
    notes: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Number of items by what they count as."""
        found = Counter(item.label for item in self.items)
        return {label: found[label] for label in MEANING}


def lines_of(task: TaskFinding, rules: Rules, most: int) -> Iterator[str]:
    """Render a task: counts, the items covered most, scores by exposure."""
    count = counted(len(task.items), "item")
    yield f"{clean(task.task)}: {count}, spans from {rules.tokens} tokens"
    answered = Counter(item.label for item in task.items if item.with_answer)
    rows = [
        [label, number(count), number(answered[label]), MEANING[label].format(**asdict(rules))]
        for label, count in task.counts.items()
    ]
    yield from table(
        ("items", "count", "with answer", "of one part"), rows, ("items", "of one part")
    )

    found = [item for item in task.items if any(part.hits for part in item.parts)]
    found.sort(key=_order)
    if found:
        yield ""
        left = ("item", "part", "state", "answer", "chunk")
        yield from table(HEADINGS, [_cells(item) for item in found[:most]], left)
        if len(found) > most:
            yield f"... and {counted(len(found) - most, 'item')} more; --show shows them"
    if task.scores is not None:
        yield ""
        yield from _score_lines(task.scores)
    for note in task.notes:
        yield f"note: {note}"


def _order(item: ItemFinding) -> tuple[float, float, str]:
    part = item.worst or item.parts[0]
    return -part.covered, -part.covered_in_data, item.name


def _cells(item: ItemFinding) -> list[str]:
    # A part that is too short has no places, so there is one that is judged.
    part = item.worst or item.parts[0]
    shown = _longest(part)
    row = None if shown is None else shown.rows[0]
    step = item.step if item.step is not None else None if shown is None else shown.step
    return [
        clean(item.name),
        part.name,
        number(part.tokens),
        number(part.longest or max((hit.tokens for hit in part.hits), default=0)),
        f"{100 * (part.covered or part.covered_in_data):.0f}%",
        item.label if part.longest else f"{item.label}: {_state(part)}",
        "with" if item.with_answer else "-",
        "-" if row is None else row.chunk,
        "-" if row is None else number(row.row),
        number(step),
        number(len(part.hits)),
    ]


def _longest(part: PartFinding) -> Hit | None:
    """The longest place that was trained on, the first such one; else the longest of all."""
    trained = [hit for hit in part.hits if hit.step is not None]
    return max(trained or part.hits, key=lambda hit: (hit.tokens, -(hit.step or 0)), default=None)


def _state(part: PartFinding) -> str:
    """What became of rows that were not trained on."""
    states = {one.state for hit in part.hits for row in hit.rows for one in row.exposures}
    return ", ".join(sorted(states - {TRAINED})) or "in the data"


def _score_lines(scores: ExposedScores) -> Iterator[str]:
    yield f"{clean(scores.metric)} of exposed and of clean items:"
    headings = ("checkpoint", "step", "read", "exposed", "clean", "difference")
    rows = [
        [
            clean(one.checkpoint),
            number(one.step),
            f"{one.read} of {one.exposed.items}",
            _mean(one.exposed),
            f"{_mean(one.clean)} ({one.clean.items})",
            _mean(one.difference),
        ]
        for one in scores.checkpoints
    ]
    yield from table(headings, rows, ("checkpoint",))
    if scores.exposed_change.items:
        yield (
            f"after minus before the step of exposure: {_mean(scores.exposed_change)} of "
            f"{counted(scores.exposed_change.items, 'exposed item')}, "
            f"{_mean(scores.clean_change)} of {counted(scores.clean_change.items, 'clean one')}, "
            f"difference {_mean(scores.difference)}"
        )
    for note in scores.notes:
        yield f"note: {note}"


def _mean(value: Mean) -> str:
    error = "" if value.error is None else f" +- {number(value.error, 3)}"
    return f"{number(value.mean, 3)}{error}"


def facts_of(task: TaskFinding) -> dict[str, Any]:
    """Return keys and values of a task for JSON; items without any place are counted alone."""
    return {
        "task": task.task,
        "source": dict(task.source),
        "items": len(task.items),
        "counts": task.counts,
        "found": [
            _item_facts(item) for item in task.items if any(part.hits for part in item.parts)
        ],
        "scores": None if task.scores is None else _score_facts(task.scores),
        "notes": list(task.notes),
    }


def _item_facts(item: ItemFinding) -> dict[str, Any]:
    return {
        "item": item.name,
        "state": item.label,
        "step": item.step,
        "with_answer": item.with_answer,
        "parts": [
            {
                **{
                    key: getattr(part, key)
                    for key in ("name", "tokens", "needed", "longest", "covered", "step")
                },
                **{key: getattr(part, key) for key in ("covered_in_data", "with_answer")},
                "places": len(part.hits),
                "hits": [_hit_facts(hit) for hit in part.hits[:MOST_HITS]],
            }
            for part in item.parts
            if part.hits
        ],
    }


def _hit_facts(hit: Hit) -> dict[str, Any]:
    keys = ("run", "state", "step", "attempt", "checkpoint_before", "checkpoint_after")
    return {
        "first_byte": hit.first,
        "last_byte": hit.last,
        "tokens": hit.tokens,
        "step": hit.step,
        "rows": [
            {
                **{key: getattr(row, key) for key in ("data", "chunk", "row", "start", "tokens")},
                "exposures": [{key: getattr(one, key) for key in keys} for one in row.exposures],
            }
            for row in hit.rows
        ],
    }


def _score_facts(scores: ExposedScores) -> dict[str, Any]:
    facts = asdict(scores)
    facts["pairs"] = [
        {"before": before, "after": after, "exposed": count}
        for (before, after), count in scores.pairs.items()
    ]
    return facts


def file_facts(
    run: str, done_step: int, data: Sequence[Mapping[str, str]], rules: Rules, tasks: Any
) -> dict[str, Any]:
    """Return the content of the file of a run."""
    return {
        "format": FORMAT,
        "run": run,
        "step": done_step,
        "data": [dict(one) for one in data],
        "rules": asdict(rules),
        "tasks": tasks,
    }


def write_facts(place: Path, facts: Mapping[str, Any]) -> None:
    """Write the file of a run, whole; a process that writes it at the same time waits.

    Raises OSError.
    """
    with alone_in(place.parent):
        write_synced(place, json.dumps(facts, ensure_ascii=False, indent=1) + "\n")
