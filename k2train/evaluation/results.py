"""Evaluation results: scores of a checkpoint on a task, and what it answered to each item.

- `RUN/evaluation/TASK/ckpt_NNN.json` has the scores and what they were made from. Beside it,
  `ckpt_NNN.items.jsonl` has a line for each item, in the order of the task.
- The first names the second by its hash, and is written last: a result is whole or not there.
- A result names its checkpoint by the hash of its manifest, so that a score of other weights under
  the same name is seen.
- A number that is not finite is a string, `"-Infinity"`, `"Infinity"` or `"NaN"`: JSON has no other
  form for the logarithm of a probability of zero. Python's `float` and JavaScript's `Number` read
  all three, and numbers as well.

Alternatives considered:
- One file for a run: two processes that evaluate two checkpoints would have to share it.
- lm-eval's own result files: they name neither the step nor the weights, and differ by version.
- `null` for a number that is not finite: a choice that was never scored would look the same.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator

from k2train.errors import RunError
from k2train.files import AtomicFile, alone_in, sha256_file, sync_directory, write_synced
from k2train.json_record import Count, Record, Text
from k2train.retry import exists_retried, is_folder_retried, list_retried, reason
from k2train.safe_json import parse_json, read_plain_file

FOLDER = "evaluation"
FORMAT = 1
ITEMS = ".items.jsonl"
"""End of the name of a file of items."""
MAX_BYTES = 2**30
"""Of the file of items; a task of 14,000 items with their texts has 30 MB."""

NOT_FINITE = {"-Infinity": -math.inf, "Infinity": math.inf, "NaN": math.nan}
"""Numbers that JSON does not have, by the strings that stand for them."""


def json_number(value: float) -> float | str:
    """Return a number as JSON can hold it: one that is not finite as its string."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _measure(value: Any) -> float | int:
    if isinstance(value, str) and value in NOT_FINITE:
        return NOT_FINITE[value]
    if type(value) not in (int, float):
        raise ValueError(
            f"must be a number, or one of {', '.join(NOT_FINITE)}, is {repr(value)[:60]}"
        )
    number: float | int = value
    return number


Measure = Annotated[
    int | float, PlainValidator(_measure), PlainSerializer(json_number, return_type=Any)
]
"""A number of a result, finite or not."""


class Item(Record):
    """What a checkpoint answered to one item of a task."""

    item: Text
    """The item's name: the same for all checkpoints of a run."""
    prompt_sha256: Text
    """Of the rendered prompt, shots included, in UTF-8."""
    prompt: str
    target: str
    """The right answer as text; empty where a task has none."""
    choices: tuple[str, ...] = ()
    """Texts of the continuations that were compared; empty for a generated answer."""
    log_likelihoods: tuple[Measure, ...] = ()
    """Natural logarithm of the probability of each choice after the prompt."""
    greedy: tuple[bool, ...] = ()
    """Whether each choice is what greedy generation would have said."""
    generated: tuple[str, ...] = ()
    """Generated answers; several where a task takes samples."""
    answer: int | None = None
    """Index of the choice with the highest score by the task's own rule."""
    scores: Mapping[str, Measure] = {}
    """Value of each metric for this item."""
    shots: tuple[Text, ...] = ()
    """Ids of the worked examples in front of this item, where items have different ones."""


class TaskResult(Record):
    """Scores of one checkpoint on one task."""

    format: Count
    task: Text
    version: Text
    """Of the task, as its author counts."""
    style: Text
    """Style of the prompt, for tasks that have two; "default" where there is one."""
    checkpoint: Text
    step: Count
    manifest_sha256: Text
    """Of the checkpoint's manifest."""
    harness: Text
    """Name and version of what rendered and scored: "lm-eval 0.4.13"."""
    shots: tuple[Text, ...] = ()
    """Ids of the worked examples in front of each item; empty without, and where an item names
    its own.
    """
    num_shots: Count = 0
    limit: Count | None = None
    """Only so many items were taken; None: all."""
    items: Count
    items_sha256: Text
    scores: Mapping[str, Measure]
    """Each metric of the task over its items: `acc`, `acc_norm`, `exact_match`, `pass@1`, ..."""
    errors: Mapping[str, Measure] = {}
    """Standard error of each score, where there is one."""
    settings: Mapping[str, Any] = {}
    """What else decides the result: precision, sampling, seed, hash of the task's definition."""
    label: str = ""
    """Name for people; empty: that of the task."""
    members: tuple[Text, ...] = ()
    """Tasks that a group of tasks is made of; a group has no items of its own."""


def result_paths(run: Path, task: str, checkpoint: str) -> tuple[Path, Path]:
    """Return the places of a result and of its items."""
    folder = run / FOLDER / task
    return folder / f"{checkpoint}.json", folder / f"{checkpoint}{ITEMS}"


def write_result(run: Path, result: TaskResult, items: Sequence[Item]) -> Path:
    """Write a result of a task; number and hash of the items are filled in. Raises OSError."""
    place, lines = result_paths(run, result.task, result.checkpoint)
    place.parent.mkdir(parents=True, exist_ok=True)
    # Two evaluations of the same would mix their lines, and one would name the other's items.
    with alone_in(place.parent):
        # An older result must not name these items.
        place.unlink(missing_ok=True)
        sync_directory(place.parent)

        with AtomicFile(lines) as stream:
            for item in items:
                stream.write(_text(item).encode() + b"\n")
        facts = {"items": len(items), "items_sha256": sha256_file(lines)}
        whole = result.model_copy(update=facts)
        write_synced(place, _text(whole, indent=1) + "\n")
    return place


def _text(record: Record, indent: int | None = None) -> str:
    """Return a record as JSON that every reader takes."""
    return json.dumps(record.model_dump(), ensure_ascii=False, indent=indent, allow_nan=False)


def read_result(path: Path) -> TaskResult:
    """Read a result. Raises RunError, one line."""
    try:
        result = TaskResult.parse(parse_json(read_plain_file(path)))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: {_why(error, path)}; evaluate this checkpoint again") from None
    if result.format > FORMAT:
        raise RunError(f"{path} has format {result.format}, this version reads up to {FORMAT}")
    return result


def read_results(run: Path) -> list[TaskResult]:
    """Read all results of a run, by task and step. Raises RunError."""
    folder = run / FOLDER
    if not exists_retried(folder):
        return []
    # Files beside the tasks' folders are about several tasks.
    tasks = [task for task in list_retried(folder) if is_folder_retried(task)]
    paths = [path for task in tasks for path in list_retried(task) if path.suffix == ".json"]
    found = []
    for path in paths:
        result = read_result(path)
        # Its names lead to the file of its items, which must be the one beside it.
        if path != result_paths(run, result.task, result.checkpoint)[0]:
            raise RunError(
                f"{path} is the result of {result.checkpoint!a:.60} on {result.task!a:.60}; move "
                "it back to its place"
            )
        found.append(result)
    return sorted(found, key=lambda result: (result.task, result.step, result.checkpoint))


def is_of_other_weights(run: Path, result: TaskResult) -> bool:
    """Whether the checkpoint is another one now. One that was removed is the one it was."""
    manifest = run / "checkpoints" / result.checkpoint / "manifest.json"
    return exists_retried(manifest) and sha256_file(manifest) != result.manifest_sha256


def read_items(run: Path, result: TaskResult) -> list[Item]:
    """Read the items of a result. Raises RunError when they are not those that it names."""
    _, path = result_paths(run, result.task, result.checkpoint)
    try:
        if sha256_file(path) != result.items_sha256:
            raise ValueError(f"is not what {path.name.removesuffix(ITEMS)}.json names")
        lines = read_plain_file(path, MAX_BYTES).splitlines()
        items = [Item.parse(parse_json(line)) for line in lines]
        if len(items) != result.items:
            raise ValueError(f"has {len(items)} items, must have {result.items}")
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: {_why(error, path)}; evaluate this checkpoint again") from None
    return items


def _why(error: OSError | ValueError, path: Path) -> str:
    return reason(error, path) if isinstance(error, OSError) else str(error)
