"""Result of a GPU check as one versioned JSON file.

- Frozen dataclasses: what is written is what is declared. A reader of another format refuses it.
- Rows stay as the parts wrote them, with all their figures.
- Standard library only.

Alternatives considered:
- Several files by part: the one that is committed would be the one that looks best.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.aims import Aim, aims_of
from benchmarks.gpu.rows import Row
from gpu_checks.catalogue import CheckPart
from gpu_checks.verdicts import PartVerdict, judge
from k2train.errors import RunError

FORMAT = 1


@dataclass(frozen=True)
class CheckResult:
    """All that a check has found."""

    format: int
    dry_run: bool
    seconds: float
    device: Mapping[str, Any]
    """Device, driver, clocks, torch, packages, commit; empty where the part environment died."""
    parts: tuple[PartVerdict, ...]
    aims: tuple[Aim, ...]
    rows: tuple[Row, ...]

    @property
    def held(self) -> bool:
        """True when every part ran and held."""
        return bool(self.parts) and all(part.verdict == "held" for part in self.parts)


def result_of(
    parts: Sequence[CheckPart], rows: Sequence[Row], dry_run: bool, seconds: float
) -> CheckResult:
    """Judge the rows of these parts."""
    aims = () if dry_run else tuple(aims_of(rows, [part.name for part in parts]))
    verdicts = tuple(judge(part, rows, aims) for part in parts)
    device: Mapping[str, Any] = next((row["facts"] for row in rows if row.get("facts")), {})
    return CheckResult(FORMAT, dry_run, round(seconds, 1), device, verdicts, aims, tuple(rows))


def write_result(result: CheckResult, path: Path) -> None:
    """Write the result as JSON."""
    text = json.dumps(dataclasses.asdict(result), indent=1)
    path.write_text(f"{text}\n", encoding="utf-8")


def read_result(path: Path) -> CheckResult:
    """Read a result. Raises RunError for a file that is none, or of another format."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise RunError(f"{path}: format {found['format']}, this version reads {FORMAT}")
        return CheckResult(
            **{
                **found,
                "parts": tuple(PartVerdict(**part) for part in found["parts"]),
                "aims": tuple(Aim(**aim) for aim in found["aims"]),
                "rows": tuple(found["rows"]),
            }
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"{path}: not the result of a GPU check ({error})") from None
