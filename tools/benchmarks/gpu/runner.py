"""Parts on a GPU, each a process of its own, within one time budget.

- A part writes each row at once. So one that dies, hangs or runs out of time leaves its rows, and a
  broken CUDA context or full memory ends one part only.
- Parts run in order of worth. Each gets its own time where the budget has it, and its share of what
  is left where that is more. What no longer fits is a row that says so.
- Compiled code is kept in the folder for all parts: the second one compiles nothing.
- Standard library only.

Alternatives considered:
- One process for everything: the first illegal address ends the rest too.
- Shares of the time alone: with half of the time every part would end in the middle.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.processes import command_of, last_line, run_to_end
from benchmarks.gpu.rows import Row
from k2train.errors import RunError

GRACE_SECONDS = 8.0
"""Extra seconds after a part's deadline to finish its current timing, before it is ended."""

SCRATCH = ".gpu_scratch"
"""Subfolder for compiler caches, data and runs. It is removed, so its name is nobody else's."""


@dataclass(frozen=True)
class Part:
    """A part: the module whose `run(bench)` it is, and its time on a device."""

    name: str
    module: str
    seconds: float
    """What it takes, with starting torch and compiling."""
    least_seconds: float = 5.0
    """Below this it is not started."""


@dataclass(frozen=True)
class Given:
    """What to run, where results go, and for how long."""

    folder: Path
    parts: tuple[Part, ...]
    budget_seconds: float
    dry_run: bool
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the parts."""


@contextmanager
def results_folder(folder: Path, results: Iterable[str]) -> Iterator[None]:
    """Make the folder; inside this context parts may write to its `SCRATCH`.

    Results of an earlier call are removed first: one that is ended early must not leave them.
    Raises RunError where nothing can be written.
    """
    scratch = folder / SCRATCH
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        for name in results:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise RunError(
            f"--folder ({folder}): nothing can be written there ({error.strerror}); name another"
        ) from None
    try:
        yield
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def rows_file(given: Given, part: Part) -> Path:
    """File of a part's rows."""
    return given.folder / f"rows_{part.name}.jsonl"


def log_file(given: Given, part: Part) -> Path:
    """File of a part's output."""
    return given.folder / f"log_{part.name}.txt"


def part_command(part: Part, given: Given, seconds: float) -> list[str]:
    """Command of one part's process, with its compiler caches in the folder."""
    cache = given.folder / SCRATCH / "cache"
    variables = {
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TOKENIZERS_PARALLELISM": "false",
        **given.variables,
    }

    arguments = [
        "--part",
        part.name,
        "--module",
        part.module,
        "--folder",
        str(given.folder),
        "--rows",
        str(rows_file(given, part)),
        "--seconds",
        f"{seconds:.1f}",
    ]

    return command_of(
        "benchmarks.gpu.part", [*arguments, *(["--dry-run"] if given.dry_run else [])], variables
    )


def run_part(part: Part, given: Given, seconds: float) -> list[Row]:
    """Run one part to its end or its time limit.

    Returns its rows, and one more if it ended badly.
    """
    rows_file(given, part).write_text("")
    log = log_file(given, part)
    code = run_to_end(part_command(part, given, seconds), log, seconds + GRACE_SECONDS)
    rows, underway = read_rows(rows_file(given, part))
    if code is None:
        rows.append(_ended(part, underway, f"ended after {seconds + GRACE_SECONDS:.0f} s"))
    elif code != 0:
        rows.append(_ended(part, underway, f"exit code {code}: {last_line(log)}"))
    elif underway or not rows:
        rows.append(_ended(part, underway, f"ended without a {'result' if underway else 'row'}"))
    return rows


def _ended(part: Part, underway: str, why: str) -> Row:
    """Row for a part that ended before its work was finished."""
    return {"part": part.name, "what": underway or "(start)", "status": "failed", "why": why}


def read_rows(path: Path) -> tuple[list[Row], str]:
    """Finished rows of a part, and the work that was started and not finished."""
    rows: list[Row] = []
    underway = ""

    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut in the middle when the part was ended
        if row["status"] == "begun":
            underway = row["what"]
        else:
            rows.append(row)
            underway = ""

    return rows, underway


def limit_seconds(parts: Sequence[Part], left_seconds: float) -> float:
    """Limit of the first of `parts` when so much of the budget is left for all of them."""
    share = left_seconds * parts[0].seconds / sum(part.seconds for part in parts)
    return min(max(share, parts[0].seconds), left_seconds) - GRACE_SECONDS


def run_parts(
    given: Given,
    log: Callable[[str], None] | None = None,
    keep: Callable[[Sequence[Row]], object] | None = None,
) -> list[Row]:
    """Run all parts one after another; where there is no device, the first only.

    `log` takes a line before each part, by default to stderr. `keep` takes all rows so far after
    each: a call that is ended early has the results of the parts before.
    """
    say = log or (lambda text: print(text, file=sys.stderr, flush=True))
    began, rows = time.monotonic(), []

    for number, part in enumerate(given.parts):
        left = given.budget_seconds - (time.monotonic() - began)
        seconds, least = limit_seconds(given.parts[number:], left), part.least_seconds
        if given.dry_run:
            # As quick as the machine is idle, and the seconds of a part are those of a device.
            seconds, least = left - GRACE_SECONDS, 1.0
        if seconds < least:
            why = f"needs {least:.0f} s, {max(seconds, 0):.0f} s were left"
            rows.append({"part": part.name, "what": "(all)", "status": "skipped", "why": why})
            continue

        say(f"{part.name}: up to {seconds:.0f} s")
        found = run_part(part, given, seconds)
        rows += found
        if any(row["status"] == "no device" for row in found):
            break
        if keep is not None:
            keep(rows)

    return rows


def parts_without_result(rows: Sequence[Row]) -> list[str]:
    """Parts that have no row with a result, in their order."""
    names = dict.fromkeys(row["part"] for row in rows)
    fine = {row["part"] for row in rows if row["status"] == "ok"}
    return [name for name in names if name not in fine]
