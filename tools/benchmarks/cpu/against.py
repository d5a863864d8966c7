"""Speed regression check: k2train in this tree beside k2train at the commit of an earlier record.

- The earlier commit is checked out into a temporary folder, and its own contender runs from there,
  interleaved with the present one.
- BASE.json only gives the commit. Its numbers are not compared: speeds of another day belong to
  that day's machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import subprocess
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.cpu.contenders import Contender
from benchmarks.cpu.processes import worker_of
from benchmarks.cpu.processor import kind_of, kind_text
from benchmarks.cpu.results import ESTABLISHED, Ratio, Row, ratio
from benchmarks.cpu.table import FORMAT, ratio_text
from k2train.errors import RunError
from k2train.text import markdown_table, number


@dataclass(frozen=True)
class Comparison:
    """One layout now and at the base. `ratio` above 1 is faster now; None if one has no number."""

    name: str
    precision: str
    now: float | None
    then: float | None
    ratio: Ratio | None
    verdict: str
    lost: bool


def read_base(path: Path) -> dict[str, Any]:
    """Read the record of an earlier run. Raises RunError with one line for anything else."""
    try:
        base = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise RunError(f"--against {path} cannot be read: {problem.strerror}") from None
    except ValueError as problem:
        raise RunError(
            f"--against {path} is no JSON: {problem}; give a file that --json wrote"
        ) from None

    if not isinstance(base, dict) or base.get("format") != FORMAT or base.get("kind") != "cpu":
        raise RunError(
            f"--against {path} is no record of `bench.py cpu` in format {FORMAT}; give a file that "
            "--json wrote"
        )

    if not re.fullmatch(r"[0-9a-f]{40}", str(base.get("commit"))):
        raise RunError(
            f"--against {path} names no commit ({base.get('commit')}); write it from a git checkout"
        )

    # Read at the end of the run, so its shape is looked at before it.
    if not isinstance(base.get("machine") or {}, dict):
        raise RunError(f"--against {path} is damaged: machine is no object; give a whole record")
    try:
        kind_text((base.get("machine") or {}).get("cpu"))
    except (LookupError, TypeError, ValueError, AttributeError) as problem:
        raise RunError(
            f"--against {path} is damaged: machine.cpu: {type(problem).__name__} {problem}"
        ) from None

    return base


@contextlib.contextmanager
def checkout(repository: Path, commit: str) -> Iterator[Path]:
    """Check out a commit into a temporary folder, deleted at the end.

    Raises RunError if unknown.
    """
    git = ["git", "-C", str(repository)]
    known = subprocess.run(
        [*git, "cat-file", "-e", f"{commit}^{{commit}}"], capture_output=True, check=False
    )
    if known.returncode != 0:
        raise RunError(
            f"commit {commit} is not in {repository}; fetch it, or give a record made from one "
            "that is"
        )

    with TemporaryDirectory(prefix="k2train-base-") as name:
        folder = Path(name) / "tree"
        with subprocess.Popen(
            [*git, "archive", "--format=tar", commit], stdout=subprocess.PIPE
        ) as archive:
            assert archive.stdout is not None, "started with a pipe"
            with tarfile.open(fileobj=archive.stdout, mode="r|") as tar:
                tar.extractall(folder, filter="data")
        if worker_of(folder) is None:
            raise RunError(
                f"commit {commit} has no tools/benchmarks/cpu to run; give a record made from a "
                "later one"
            )
        yield folder


def pairs(groups: Sequence[Sequence[Contender]], base: Path) -> list[list[Contender]]:
    """k2train's contenders of each group, each followed by the same contender at the base."""
    ours = [[c for c in group if c.ours] for group in groups]
    return [
        [x for c in group for x in (c, dataclasses.replace(c, root=base))]
        for group in ours
        if group
    ]


def compare(rows: Sequence[Row]) -> list[Comparison]:
    """Compare the two rows of every layout."""
    then = {(row.name, row.precision): row for row in rows if row.base}
    return [_compare(row, then[row.name, row.precision]) for row in rows if not row.base]


def _compare(now: Row, then: Row) -> Comparison:
    found = None if now.problem or then.problem else ratio(now.seconds, then.seconds)
    if found is None:
        lost = bool(now.problem) and not then.problem
        verdict = f"now {now.problem}" if now.problem else f"then {then.problem}"
    else:
        lost = found.median < 1 - ESTABLISHED
        verdict = (
            "LOSS"
            if lost
            else "gain"
            if found.median > 1 + ESTABLISHED
            else "no established difference"
        )

    return Comparison(
        now.name, now.precision, now.tokens_per_second, then.tokens_per_second, found, verdict, lost
    )


def _other_processor(base: Mapping[str, Any], machine: Mapping[str, Any]) -> list[str]:
    """The line on a record of another processor. The comparison is not affected: both trees ran."""
    then = (base.get("machine") or {}).get("cpu")
    if kind_of(then) is not None and kind_of(then) == kind_of(machine["cpu"]):
        return []
    return [
        f"The record is of {kind_text(then)}, this run of {kind_text(machine['cpu'])}: the numbers "
        "in the record are not compared, and both trees ran here."
    ]


def report(
    comparisons: Sequence[Comparison], base: dict[str, Any], machine: Mapping[str, Any]
) -> str:
    """Markdown table of the comparison, with its basis; `machine` is the one that ran both."""
    head = f"Base: commit {base['commit']}, run beside this tree in this call."
    if base.get("uncommitted_changes"):
        head += (
            " Its record was made with uncommitted changes on top, which are not part of what ran."
        )

    lines = [
        head,
        *_other_processor(base, machine),
        f"A loss is a median below {1 - ESTABLISHED:.2f}; differences under {ESTABLISHED:.0%} are "
        "not established.",
        "",
    ]
    headings = ("layout", "precision", "now, tokens/s", "then, tokens/s", "now / then", "")
    rows = (
        (
            c.name,
            c.precision,
            number(c.now, 0),
            number(c.then, 0),
            "-" if c.ratio is None else ratio_text(c.ratio),
            c.verdict,
        )
        for c in comparisons
    )
    return "\n".join([*lines, *markdown_table(headings, rows)])
