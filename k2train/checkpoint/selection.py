"""Selection of checkpoints of a run by a command line: words, numbers, ranges, names or paths.

- `all` and `every:N` take numbered checkpoints: saves inside chunks are named. `every:N` takes
  those whose number N divides. `newest` takes the newest save of any kind.
- A number or a name is a checkpoint of the run. A range `3-8` is its numbered checkpoints from 3 to
  8; both ends must be there.
- Anything with a slash is a path, of any run.

Alternatives considered:
- Ranges that may reach beyond what is there: a window would be shorter than its name without a
  word.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from k2train.checkpoint.manifest import (
    MANIFEST,
    checkpoint_name,
    checkpoint_order,
    list_checkpoints,
)
from k2train.checkpoint.retention import is_on_demand
from k2train.errors import CheckpointError, RunError
from k2train.retry import is_file_retried, is_folder_retried

_RANGE = re.compile(r"(?:ckpt_)?(\d+)-(?:ckpt_)?(\d+)", re.ASCII)
_NUMBER = re.compile(r"\d+", re.ASCII)
_EVERY = re.compile(r"every:([1-9]\d*)", re.ASCII)
SHOWN = 5
"""Checkpoints of a run that a message names, newest first."""


def chosen(run: Path, text: str) -> list[Path]:
    """Return the checkpoints that `all`, `newest`, `every:N` or a list name, oldest first.

    Raises RunError when `run` is no run or has none, CheckpointError for what is not there, for one
    that is named twice or is of another run, and for words that take none.
    """
    if not is_folder_retried(run):
        raise RunError(f"{run} is not a directory; give that of a run, such as runs/demo-stage1")
    there = list_checkpoints(run / "checkpoints")
    if not there:
        raise RunError(f"{run} has no checkpoints; train it first, or give another directory")
    if text == "newest":
        return there[-1:]

    every = _EVERY.fullmatch("every:1" if text == "all" else text)
    if every is None:
        try:
            paths = [path for item in selected(run, text) for path in item]
        except CheckpointError as error:
            raise CheckpointError(f"{error}; or take all, newest or every:N") from None
        folder = (run / "checkpoints").resolve()
        if other := [path for path in paths if path.resolve().parent != folder]:
            raise CheckpointError(f"--checkpoints: {other[0]} is not of {run}; take one that is")
        return sorted(paths, key=lambda path: checkpoint_order(path.name))
    numbered = [path for path in there if not is_on_demand(path)]
    found = [path for path in numbered if checkpoint_order(path.name)[0] % int(every[1]) == 0]
    if not found:
        raise CheckpointError(
            f"--checkpoints {text} takes none of {run}, which has {_shown(there)}; name some, or "
            "take newest"
        )
    return found


def selected(run: Path, text: str) -> list[list[Path]]:
    """Return the checkpoints of each item of a comma-separated list, in its order.

    Raises RunError when `run` is no run, CheckpointError for a checkpoint that is not there, and
    for one that is named twice.
    """
    if not is_folder_retried(run):
        raise RunError(f"{run} is not a directory; give that of a run, such as runs/demo-stage1")
    items = [item.strip() for item in text.split(",")]
    found = [_item(run, item) for item in items]

    seen: set[Path] = set()
    for path in (path for paths in found for path in paths):
        if path.resolve() in seen:
            raise CheckpointError(f"--checkpoints names {path} twice; name each checkpoint once")
        seen.add(path.resolve())
    return found


def _item(run: Path, item: str) -> list[Path]:
    if "/" in item:
        if not is_file_retried(Path(item) / MANIFEST):
            raise CheckpointError(
                f"--checkpoints: {item} is no checkpoint (no {MANIFEST}); give "
                "RUN/checkpoints/ckpt_NNN"
            )
        return [Path(item)]

    there = list_checkpoints(run / "checkpoints")
    if (ends := _RANGE.fullmatch(item)) is not None:
        return _range(run, there, int(ends[1]), int(ends[2]))
    return [_named(run, there, checkpoint_name(int(item)) if _NUMBER.fullmatch(item) else item)]


def _range(run: Path, there: Sequence[Path], first: int, last: int) -> list[Path]:
    if first >= last:
        raise CheckpointError(
            f"--checkpoints: {first}-{last} is no range; the lower number comes first"
        )
    for number in (first, last):
        _named(run, there, checkpoint_name(number))
    return [
        path
        for path in there
        if not is_on_demand(path) and first <= checkpoint_order(path.name)[0] <= last
    ]


def _named(run: Path, there: Sequence[Path], name: str) -> Path:
    for path in there:
        if path.name == name:
            return path
    raise CheckpointError(f"--checkpoints: {run} has no {name!r:.60}; it has {_shown(there)}")


def _shown(there: Sequence[Path]) -> str:
    """Name the newest checkpoints, and count the others."""
    shown = ", ".join(path.name for path in there[: -SHOWN - 1 : -1]) or "none"
    return shown + (f" and {len(there) - SHOWN} older" if len(there) > SHOWN else "")
