"""Training series from files: our metrics.jsonl, other JSON lines, CSV and TSV, also gzipped.

- Columns are found by their common names; those of other tools are listed in `NAMES`.
- A cell without a value is a step that was not logged. `nan` and `inf` are values.
- Rows are kept in the order of the file, and sorted into attempts: by their column, or, without
  one, wherever the steps go back.

Alternatives considered:
- A data frame library: a dependency, to read five columns.
"""

import csv
import gzip
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple

from k2train.errors import RunError
from k2train.record.jsonl import NON_FINITE
from k2train.record.line_check import has_check, line_problem
from k2train.record.metrics import is_scores_line

NAMES = {
    "step": ("step", "_step", "iteration", "iter", "global_step", "train/step", "global step"),
    "loss": (
        "loss",
        "train_loss",
        "train/loss",
        "training_loss",
        "lm_loss",
        "lm loss",
        "train/lm_loss",
        "train/ce loss",
        "train/ce_loss",
        "train/crossentropyloss",
    ),
    "grad_norm": (
        "grad_norm",
        "grad norm",
        "gradient_norm",
        "gradient norm",
        "train/grad_norm",
        "optim/total_grad_norm",
    ),
    "update_norm": ("update_norm", "update norm", "train/update_norm"),
    "attempt": ("attempt", "run", "run_id"),
    "lr": ("lr", "learning_rate", "learning rate", "train/learning_rate", "optim/learning_rate"),
    "applied": ("applied",),
}
"""Names of each column, in lower case."""
LONGEST_LINE = 1 << 20


class Row(NamedTuple):
    """One recorded step; a norm that is not on record is None."""

    step: int
    loss: float
    grad_norm: float | None = None
    update_norm: float | None = None
    lr: float | None = None
    applied: bool = True


@dataclass
class Attempt:
    """Rows of one attempt, in the order of their steps."""

    name: str
    rows: list[Row] = field(default_factory=list)

    @property
    def first(self) -> int:
        """First step of the attempt."""
        return self.rows[0].step

    @property
    def last(self) -> int:
        """Last step of the attempt."""
        return self.rows[-1].step


@dataclass(frozen=True)
class Series:
    """The attempts of a series, and where its columns came from."""

    attempts: list[Attempt]
    columns: Mapping[str, str]
    """Name of each column that was read, by ours."""

    @property
    def stride(self) -> int:
        """Steps between two rows: the most frequent difference."""
        counts: dict[int, int] = {}
        for attempt in self.attempts:
            rows = attempt.rows
            for before, after in pairwise(rows):
                step = after.step - before.step
                counts[step] = counts.get(step, 0) + 1
        return max(counts, key=lambda step: (counts[step], -step), default=1)


def read_series(path: Path) -> Series:
    """Read a series. Raises RunError, in one line, for a file that is none."""
    path = path / "metrics.jsonl" if path.is_dir() else path
    try:
        with _open(path) as stream:
            found: tuple[Mapping[str, str], Iterator[tuple[str, Row]]] = (
                _json_rows(path, stream) if ".jsonl" in path.suffixes else _table(path, stream)
            )
            columns, rows = found
            attempts = _attempts(rows, "attempt" in columns)
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(f"{path} cannot be read: {reason}") from None
    except UnicodeDecodeError:
        raise RunError(f"{path} is not UTF-8 text; give a CSV, TSV or JSON-lines file") from None

    if not attempts:
        raise RunError(f"{path}: no step is on record; give a file with at least one row")
    return Series(attempts, columns)


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _attempts(rows: Iterator[tuple[str, Row]], named: bool) -> list[Attempt]:
    """Sort rows into attempts."""
    attempts: list[Attempt] = []
    by_name: dict[str, Attempt] = {}
    latest: Attempt | None = None
    for name, row in rows:
        if latest is None or (name != latest.name if named else row.step <= latest.last):
            name = name if named else str(len(attempts) + 1)
            latest = by_name.get(name)
            if latest is None:
                latest = by_name[name] = Attempt(name)
                attempts.append(latest)
        latest.rows.append(row)

    if named:
        for attempt in attempts:
            attempt.rows.sort(key=lambda row: row.step)
        if all(attempt.name.isdecimal() for attempt in attempts):
            attempts.sort(key=lambda attempt: int(attempt.name))
    return attempts


def columns_of(path: Path, header: Sequence[str]) -> dict[str, str]:
    """Choose the column of each of our names. Raises RunError when a needed one is missing."""
    known = {name.strip().lower(): name for name in reversed(header)}
    found = {
        ours: known[name]
        for ours, names in NAMES.items()
        if (name := next((name for name in names if name in known), None)) is not None
    }
    for ours in ("step", "loss"):
        if ours not in found:
            raise RunError(
                f"{path}: no column is the {ours}; it has {_listed(header)}; name one of them "
                f"{ours} (or {', '.join(NAMES[ours][1:4])})"
            )
    return found


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(ascii(name)[1:-1][:40] for name in names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown or "none"


def _table(path: Path, stream: IO[str]) -> tuple[dict[str, str], Iterator[tuple[str, Row]]]:
    first = stream.readline(LONGEST_LINE)
    delimiter = "\t" if "\t" in first else ","
    header = next(csv.reader([first], delimiter=delimiter), [])
    columns = columns_of(path, header)
    at = {ours: header.index(name) for ours, name in columns.items()}
    return columns, _table_rows(path, csv.reader(stream, delimiter=delimiter), at)


def _table_rows(
    path: Path, lines: Iterator[list[str]], at: Mapping[str, int]
) -> Iterator[tuple[str, Row]]:
    step_at, loss_at, attempt_at = at["step"], at["loss"], at.get("attempt")
    norms = [at.get(name) for name in ("grad_norm", "update_norm", "lr")]
    simple = all(place is None for place in norms)
    applied_at = at.get("applied")
    number = 1
    try:
        for line in lines:
            number += 1
            if not line or not line[loss_at]:
                continue
            attempt = "" if attempt_at is None else line[attempt_at]
            step, loss = line[step_at], float(line[loss_at])
            whole = int(step) if step.isdecimal() else _whole(step)
            if simple:
                yield attempt, Row(whole, loss)
                continue
            grad, update, lr = (
                None if place is None or not line[place] else float(line[place]) for place in norms
            )
            applied = applied_at is None or line[applied_at].lower() not in ("false", "0")
            yield attempt, Row(whole, loss, grad, update, lr, applied)
    except (ValueError, IndexError, csv.Error) as error:
        raise RunError(f"{path}: line {number} is no step: {error}; correct or remove it") from None


def _whole(text: str) -> int:
    """Whole number that a data frame wrote as a float."""
    value = float(text)
    if not math.isfinite(value) or value != int(value):
        raise ValueError(f"step {text!r:.40} is not a whole number")
    return int(value)


def _json_rows(path: Path, stream: IO[str]) -> tuple[dict[str, str], Iterator[tuple[str, Row]]]:
    first, before = stream.readline(LONGEST_LINE), 0
    # The held-out loss before the first step is no step.
    while is_scores_line(first.encode()):
        first, before = stream.readline(LONGEST_LINE), before + 1
    columns = columns_of(path, [*_object(path, before + 1, first)])
    return columns, _json_lines(path, first, before, stream, columns)


def _json_lines(
    path: Path, first: str, before: int, stream: IO[str], columns: Mapping[str, str]
) -> Iterator[tuple[str, Row]]:
    step_key, loss_key = columns["step"], columns["loss"]
    attempt_key, applied_key = columns.get("attempt", ""), columns.get("applied", "")
    grad_key, update_key, lr_key = (
        columns.get(name, "") for name in ("grad_norm", "update_norm", "lr")
    )
    checked = False
    line, number = first, before + 1
    while line:
        if not line.endswith("\n") and number > 1:
            # A torn last line: the end of a process that was killed.
            return
        raw = line.rstrip("\n").encode()
        if problem := line_problem(raw, checked):
            raise RunError(f"{path}: line {number} {problem}: it was changed or damaged")
        # From the first line with a check on, every line has one.
        checked = checked or has_check(raw)

        row = _object(path, number, line)
        try:
            if row.get(loss_key) is not None:
                grad, update, lr = row.get(grad_key), row.get(update_key), row.get(lr_key)
                grad = None if grad is None else _number(grad)
                update = None if update is None else _number(update)
                lr = None if lr is None else _number(lr)
                applied = row.get(applied_key, True) is not False
                step = row[step_key]
                whole = step if type(step) is int else _whole(str(step))
                loss = _number(row[loss_key])
                yield str(row.get(attempt_key, "")), Row(whole, loss, grad, update, lr, applied)
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{path}: line {number} is no step ({error}); correct it") from None
        line, number = stream.readline(LONGEST_LINE), number + 1


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise RunError(f"{path}: line {number} is not JSON; correct or remove it") from None
    if not isinstance(row, dict):
        raise RunError(f"{path}: line {number} holds no object; give one object a line")
    return row


def _number(value: Any) -> float:
    if type(value) is float:
        return value
    if isinstance(value, str):
        return NON_FINITE[value.lower()] if value.lower() in NON_FINITE else float(value)
    return float(value)
