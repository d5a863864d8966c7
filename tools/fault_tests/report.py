"""Fault results page: a Markdown table, then the measurements of each row and what was not run.

- The tool writes it from what it has just observed, so the page cannot claim more than the run did.
"""

import contextlib
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from fault_tests.processes import ROOT
from fault_tests.result import Bench, Result
from k2train.record.system_info import git_output, package_version, processor_name
from k2train.text import markdown_table

LIMITS = (
    "Nothing here was seen on a GPU or over a network of several machines: an NCCL hang, a device "
    "that falls off its bus,\ndamage done by the silicon itself and a switch that loses packets "
    "are not in these figures. The runs are tiny and the\nprocesses share two cores; seconds "
    "say how the mechanism behaves, not how long a large run takes."
)


def remember(record: Path, result: Result, bench: Bench) -> list[Result]:
    """Add a row to the record of earlier runs (JSON, one row per line).

    Return the newest of each row and seed: a row that was run with two seeds is shown twice, and
    only the same seed can replace what did not hold.

    So long rows can be run one by one, and the page shows the date and commit of each.
    """
    seen = (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, commit {_commit()}, level {bench.level}, "
        f"seed {bench.seed}"
    )
    record.parent.mkdir(parents=True, exist_ok=True)
    text = record.read_text(encoding="utf-8") if record.exists() else ""
    with record.open("a", encoding="utf-8") as stream:
        # A run of the tool that was killed may have left half a line.
        stream.write("\n" * (text != "" and not text.endswith("\n")))
        stream.write(json.dumps({**asdict(result), "seen": seen}) + "\n")
        stream.flush()
        os.fsync(stream.fileno())

    newest = {(row.row, row.seed): row for row in _recorded(record)}
    return [newest[key] for key in sorted(newest)]


def _recorded(record: Path) -> Iterator[Result]:
    """The rows of a record, oldest first; half a line is left out."""
    for line in record.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            yield Result(**json.loads(line))


def table_line(result: Result) -> str:
    """One line of console output for a row."""
    return f"row {result.row:2d}  {result.verdict:12s} {result.seconds:6.1f} s  {result.fault}"


def page(results: Sequence[Result], bench: Bench, seconds: float) -> str:
    """The whole page."""
    lines = [
        "# What was broken, and what the run came to",
        "",
        "Written by `python tools/fault_run.py --page docs/faults.md`; run it again to check it.",
        "",
        *(f"- {fact}" for fact in facts(bench, seconds)),
        "",
        LIMITS,
        "",
        *markdown_table(
            ("#", "Fault", "Target", "Verdict", "Seconds"),
            (
                (str(r.row), r.fault, r.target, f"**{r.verdict}**", f"{r.seconds:.0f}")
                for r in results
            ),
        ),
        "",
    ]

    for result in results:
        lines += section(result)
    return "\n".join(lines)


def section(result: Result) -> list[str]:
    """Section of one row."""
    lines = [
        f"## {result.row}. {result.fault}: {result.verdict}",
        "",
        f"How: {result.how}." + (f" Seen {result.seen}." if result.seen else ""),
        "",
    ]

    lines += [f"- {measured}" for measured in result.measured]
    lines += [f"- **Not held:** {_one_line(problem)[:400]}" for problem in result.problems[:8]]
    if len(result.problems) > 8:
        lines.append(f"- and {len(result.problems) - 8} more of these")
    lines += [f"- Not run: {missing}" for missing in result.missing]
    return [*lines, ""]


def _one_line(text: str) -> str:
    return text.replace("\n", " ")


def facts(bench: Bench, seconds: float) -> list[str]:
    """Date, machine, versions, commit, and the size of the run of the tool."""
    commit = _commit()
    packages = ", ".join(
        f"{name} {package_version(name) or 'not installed'}"
        for name in ("torch", "numpy", "safetensors", "pydantic")
    )

    return [
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {seconds:.0f} s, level {bench.level}, seed "
        f"{bench.seed}",
        f"{platform.system()} {platform.release().split('-')[0]}, "
        f"{processor_name() or platform.machine()}, {_cores()} cores, no accelerator used",
        f"Python {sys.version.split()[0]}, {packages}; gloo on the loopback, one thread a process",
        f"commit {commit}",
    ]


def _commit() -> str:
    commit = git_output(ROOT, "rev-parse", "--short=12", "HEAD")
    changes = git_output(ROOT, "status", "--porcelain", "--untracked-files=no")
    return (commit or "unknown") + (" with changes not committed" if changes else "")


def _cores() -> int:
    return Path("/proc/cpuinfo").read_text().count("processor\t")
