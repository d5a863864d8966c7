"""Selection of the tasks of an evaluation, with their shots, from words.

- Tasks: names, paths of YAML files, and lists. A name is that of a YAML file in the folder of local
  tasks, else one of the harness's own.
- A list is a YAML file with the key `tasks`: each entry has a task, its shots and its style.
- Nothing here imports the harness: a mistake is found in a fraction of a second.

Alternatives considered:
- Only the harness's own search path: it reads 12,000 files before it knows a name.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from k2train.errors import ConfigError
from k2train.retry import is_file_retried, is_folder_retried, list_retried, reason
from k2train.safe_json import read_plain_file
from k2train.text import safe

DEFAULT_STYLE = "default"
KEYS = {"task", "shots", "style", "label", "metric", "generates_code", "source"}
"""Keys of an entry of a list. `source` is for people: where its shots are published."""


@dataclass(frozen=True)
class Wanted:
    """A task to do. `shots` None: as the task says. `file` is that of a local task."""

    task: str
    shots: int | None = None
    style: str = DEFAULT_STYLE
    label: str = ""
    file: Path | None = None


def select_tasks(
    words: str, shots: int | None, folders: Sequence[Path]
) -> tuple[list[Wanted], list[str]]:
    """Return the tasks that `words` name, and labels of those that need a sandbox for code.

    `shots` is for tasks without a number of their own. Raises ConfigError for a wrong list.
    """
    wanted: list[Wanted] = []
    code: list[str] = []
    for word in filter(None, (part.strip() for part in words.split(","))):
        file = _file_of(word, folders)
        content = {} if file is None else read_yaml(file)
        if file is not None and "tasks" in content:
            for entry in _entries(file, content["tasks"]):
                if entry.get("generates_code"):
                    code.append(str(entry.get("label", entry["task"])))
                else:
                    wanted.append(_of_entry(entry, folders))
        elif file is not None:
            wanted.append(_of_file(file, content))
        else:
            wanted.append(Wanted(word))
    if not wanted and not code:
        raise ConfigError("--tasks names no task; write names with commas between them")
    several = [one.task for one in wanted]
    for name in several:
        if several.count(name) > 1:
            raise ConfigError(f"--tasks: {safe(name)} is named twice; name it once")
    return [one if one.shots is not None else replace(one, shots=shots) for one in wanted], code


def _file_of(word: str, folders: Sequence[Path]) -> Path | None:
    if word.endswith((".yaml", ".yml")):
        return Path(word)
    if "/" in word:
        return None
    places = (folder / f"{word}.yaml" for folder in folders)
    return next((path for path in places if is_file_retried(path)), None)


def local_names(folders: Sequence[Path]) -> list[str]:
    """Return the names of local tasks and lists."""
    found = [
        path for folder in folders if is_folder_retried(folder) for path in list_retried(folder)
    ]
    return sorted({path.stem for path in found if path.suffix == ".yaml"})


class _Loader(yaml.SafeLoader):
    """Reads a task's file for its plain keys; functions of the harness stay their names."""


_Loader.add_constructor("!function", lambda loader, node: str(getattr(node, "value", "")))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the file of a task or a list. Raises ConfigError, one line."""
    try:
        content = _Loader(read_plain_file(path)).get_single_data()
    except OSError as error:
        raise ConfigError(f"--tasks: {path}: {reason(error, path)}") from None
    except (yaml.YAMLError, ValueError) as error:
        words = " ".join(str(error).split())
        raise ConfigError(f"--tasks: {path} is not valid YAML ({safe(words)})") from None
    if not isinstance(content, dict) or not {"task", "tasks"} & content.keys():
        raise ConfigError(
            f"--tasks: {path} has neither the key task, as the file of a task, nor tasks, as a list"
        )
    return content


def _of_file(file: Path, content: dict[str, Any]) -> Wanted:
    name = content["task"]
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise ConfigError(
            f"--tasks: {file}: task must be a name of letters, digits, . _ and -, is "
            f"{safe(repr(name))}"
        )
    metadata = content.get("metadata")
    style = metadata.get("style", DEFAULT_STYLE) if isinstance(metadata, dict) else DEFAULT_STYLE
    return Wanted(name, content.get("num_fewshot"), str(style), "", file)


def _entries(file: Path, entries: object) -> list[dict[str, Any]]:
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"--tasks: {file}: tasks must be a list of entries with the key task")
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict) or not isinstance(entry.get("task"), str):
            raise ConfigError(f"--tasks: {file}: entry {number} must have the key task")
        if unknown := sorted(map(str, entry.keys() - KEYS)):
            raise ConfigError(
                f"--tasks: {file}: entry {number} has the unknown key {safe(unknown[0])}; known "
                f"are {', '.join(sorted(KEYS))}"
            )
        shots = entry.get("shots")
        if shots is not None and (type(shots) is not int or shots < 0):
            raise ConfigError(
                f"--tasks: {file}: entry {number}: shots must be a whole number from 0, is "
                f"{safe(repr(shots))}"
            )
    return entries


def _of_entry(entry: dict[str, Any], folders: Sequence[Path]) -> Wanted:
    file = _file_of(entry["task"], folders)
    base = Wanted(entry["task"]) if file is None else _of_file(file, read_yaml(file))
    return replace(
        base,
        shots=entry.get("shots", base.shots),
        style=str(entry.get("style", base.style)),
        label=str(entry.get("label", "")),
    )
