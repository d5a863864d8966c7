"""Test items whose text is searched in training data: from results of an evaluation, or a file.

- The parts of an item: its prompt, the right answer, prompt and answer as one text, each choice.
- Worked examples in front of a prompt are cut off: they are no part of the item, and the same ones
  stand in front of many.
- A file has a JSON object a line: `prompt`, `target` and `choices` as results have them, or a text
  under one key.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from k2train.errors import DataError
from k2train.evaluation.results import Item, TaskResult
from k2train.retry import reason
from k2train.safe_json import parse_json, read_plain_file

MAX_FILE_BYTES = 2**30
BLANK_LINE = "\n\n"
"""What harnesses put behind each worked example."""
NAMES = ("item", "id", "task_id", "doc_id")
"""Keys of a line under which the name of an item is looked for."""
PROMPT, TARGET, ANSWERED, CHOICE = "prompt", "target", "prompt and answer", "choice"


@dataclass(frozen=True)
class SearchedItem:
    """One item: its texts, without worked examples."""

    name: str
    prompt: str
    target: str = ""
    choices: tuple[str, ...] = ()

    def parts(self) -> Iterator[tuple[str, str]]:
        """Yield name and text of each part that is not empty."""
        joined = self.prompt + self.target if self.prompt and self.target else ""
        for name, text in ((PROMPT, self.prompt), (TARGET, self.target), (ANSWERED, joined)):
            if text.strip():
                yield name, text
        for number, text in enumerate(self.choices):
            if text.strip() and text != self.target:
                yield f"{CHOICE} {number}", text


def items_of_result(result: TaskResult, items: Sequence[Item]) -> list[SearchedItem]:
    """Return the items of a result, without the worked examples in front of their prompts."""
    prompts = [item.prompt for item in items]
    if result.num_shots:
        prompts = without_shots(prompts, result.num_shots)
    return [
        SearchedItem(item.item, prompt, item.target, item.choices)
        for item, prompt in zip(items, prompts, strict=True)
    ]


def without_shots(prompts: Sequence[str], num_shots: int) -> list[str]:
    """Cut worked examples off: what all prompts begin with, else all up to the last blank line.

    Where each item has examples of its own, an item that holds a blank line itself loses what is
    in front of that.
    """
    shared = _shared_beginning(prompts) if len(prompts) > 1 else ""
    end = shared.rfind(BLANK_LINE)
    if shared[: end + len(BLANK_LINE)].count(BLANK_LINE) >= num_shots:
        return [prompt[end + len(BLANK_LINE) :] for prompt in prompts]
    return [prompt.rpartition(BLANK_LINE)[2] for prompt in prompts]


def _shared_beginning(texts: Sequence[str]) -> str:
    """What all texts begin with: the first and the last in order have no more in common."""
    first, last = min(texts), max(texts)
    differs = (at for at, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1])
    return first[: next(differs, min(len(first), len(last)))]


def read_test_items(path: Path, key: str | None) -> list[SearchedItem]:
    """Read the items of a JSON Lines file; `key` is that of a plain text. Raises DataError."""
    try:
        lines = read_plain_file(path, MAX_FILE_BYTES).split(b"\n")
    except OSError as error:
        raise DataError(f"--items: {path} cannot be read ({reason(error, path)})") from None
    except ValueError as error:
        raise DataError(f"--items: {path}: {error}") from None
    found = [
        _item(f"--items: {path}, line {number}", number, line, key)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise DataError(f"--items: {path} has no item; write one object a line")
    names = [item.name for item in found]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"--items: {path}: two items are named {twice!r:.60}")
    return found


def _item(where: str, number: int, line: bytes, key: str | None) -> SearchedItem:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise DataError(f"{where}: is not JSON ({error}); each line must hold one object") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be an object with the key prompt, or name one with --key")
    name = str(next((row[one] for one in NAMES if isinstance(row.get(one), int | str)), number))
    prompt = row.get(key or "prompt")
    if not isinstance(prompt, str):
        known = ", ".join(sorted(row)[:8]) or "no keys"
        raise DataError(
            f"{where}: has no text under {key or 'prompt'!r}; it has {known}; name the key of the "
            "text with --key"
        )
    target, choices = row.get("target", ""), row.get("choices", [])
    if not isinstance(target, str) or not isinstance(choices, list):
        raise DataError(f"{where}: target must be a text, and choices a list of texts")
    if not all(isinstance(one, str) for one in choices):
        raise DataError(f"{where}: choices must be a list of texts")
    return SearchedItem(name, prompt, target, tuple(choices))
