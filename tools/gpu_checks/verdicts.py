"""Verdict on each part of a GPU check: held, failed or not run, with the reason.

- A part has failed where a row has failed or an aim is missed.
- It has not run where anything is left out for want of time, or an aim has no figure. A choice that
  the machine has not (a package, memory for a larger model) is no reason.
- Nothing that is missing counts as held: a part without rows has not run.
- A dry run judges no aims: figures of tiny sizes mean nothing.
- Standard library only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.gpu.aims import Aim
from benchmarks.gpu.rows import Row, of
from gpu_checks.catalogue import CheckPart

Verdict = Literal["held", "failed", "not run"]
FINE = ("ok", "unavailable")


@dataclass(frozen=True)
class PartVerdict:
    """Verdict on one part."""

    part: str
    proves: str
    verdict: Verdict
    why: str = ""
    """First reason, and how many more; "" for a part that held."""
    checks: int = 0
    """Rows with a result."""


def judge(part: CheckPart, rows: Sequence[Row], aims: Sequence[Aim]) -> PartVerdict:
    """Verdict on a part from its rows and aims."""
    mine, own_aims = of(rows, part.name), [aim for aim in aims if aim.part == part.name]
    checks = sum(row["status"] == "ok" for row in mine)
    skipped = ("skipped", "no device")

    failed = [_row_text(row) for row in mine if row["status"] not in (*FINE, *skipped)]
    failed += [
        f"{aim.what}: {aim.found:.3f}, wanted {aim.wanted}"
        for aim in own_aims
        if aim.state == "missed"
    ]
    left_out = [_row_text(row) for row in mine if row["status"] in skipped]
    left_out += [f"{aim.what}: {aim.why}" for aim in own_aims if aim.state == "not judged"]
    if not checks and not failed and not left_out:
        left_out = [_row_text(row) for row in mine] or ["the check ended before it"]

    if failed:
        return PartVerdict(part.name, part.proves, "failed", _reasons(failed), checks)
    if left_out:
        return PartVerdict(part.name, part.proves, "not run", _reasons(left_out), checks)
    return PartVerdict(part.name, part.proves, "held", "", checks)


def _row_text(row: Row) -> str:
    return f"{row['what']}: {row['why']}"


def _reasons(texts: Sequence[str]) -> str:
    return texts[0] + (f" (and {len(texts) - 1} more)" if len(texts) > 1 else "")
