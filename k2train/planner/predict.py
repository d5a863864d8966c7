"""Predictions for a CSV of training runs, and the report of errors on measured ones.

- `predict_rows` adds columns: step time with its interval, memory, whether it fits. A note says
  why a row has none, or that its machine was never calibrated.
- `calibration_report` fits the constants without each source in turn, and says how wrong they are
  on it. A second file of rows, which no fit sees, may judge them.
- The order of layouts is judged apart from their seconds (see `planner.ranking`).
- Memory is in GB (10^9 bytes), as most published rows are.

Alternatives considered:
- Errors on the rows that a fit has seen: they say little about other rows.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from k2train.config.messages import nearest
from k2train.errors import ConfigError, UserError
from k2train.files import write_synced
from k2train.plan.program_memory import program_memory
from k2train.plan.uncertainty import interval
from k2train.planner.fit import (
    Judged,
    Values,
    fit,
    leave_one_source_out,
    predicted,
)
from k2train.planner.ranking import ranking_lines
from k2train.planner.rows import OPTIONAL, Case, Row, case_of, cases_of
from k2train.retry import read_retried, reason
from k2train.text import markdown_table

PREDICTED = (
    "predicted_step_s",
    "predicted_low",
    "predicted_high",
    "predicted_mem_gb",
    "predicted_fits",
    "predicted_note",
)
NEEDED = ("layers", "hidden", "heads", "seq", "gpu")
"""Columns without which no row can be predicted."""
MISSPELT = 0.8
"""Likeness from which a column that is not read is taken for a misspelt one."""
GB = 1e9


def read_rows(path: str) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a CSV. Raises ConfigError for a file that is none."""
    try:
        text = bytes(read_retried(Path(path))).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, PermissionError, NotADirectoryError) as problem:
        raise ConfigError(f"{path}: cannot be read: {reason(problem, path)}") from None
    except UnicodeDecodeError as problem:
        raise ConfigError(f"{path}: not UTF-8 text (byte {problem.start})") from None
    # Strict: a quote that is never closed would swallow the rows behind it.
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = _columns(path, list(reader.fieldnames or []))
        return columns, [_cells(path, reader.line_num, columns, row) for row in reader]
    except csv.Error as problem:
        raise ConfigError(f"{path}: after line {reader.line_num}: not CSV: {problem}") from None


def _columns(path: str, columns: list[str]) -> list[str]:
    """Names of the columns. Raises ConfigError for missing ones and for two of one name."""
    missing = [name for name in NEEDED if name not in columns]
    if missing:
        other = next((one for one in ";\t|" if one in columns[0]), "") if columns else ""
        raise ConfigError(
            f"{path}: no column {', '.join(missing)}; it has "
            + (repr(columns[0]) if other else ", ".join(columns) or "no line")
            + (f": separate its cells with commas, not {other!r}" if other else "")
        )
    double = [name for name, count in Counter(columns).items() if count > 1]
    if double:
        raise ConfigError(f"{path}: more than one column {', '.join(double)}; name each once")
    return columns


def _cells(path: str, line: int, columns: Sequence[str], row: dict[str, Any]) -> dict[str, str]:
    """Cells of a row by column, missing ones empty. Raises ConfigError for more than columns."""
    # DictReader keeps what has no column under None.
    beyond: list[str] = row.pop(None, [])  # type: ignore[call-overload]
    if any(beyond):
        raise ConfigError(
            f"{path}: line {line} has {len(columns) + len(beyond)} cells for {len(columns)} "
            "columns: put quotes around a cell that has commas"
        )
    return {key: value or "" for key, value in row.items()}


def predict_rows(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Each row with the columns of `PREDICTED`."""
    return [{**row, **_prediction(row)} for row in rows]


def _prediction(row: Row) -> dict[str, str]:
    empty = dict.fromkeys(PREDICTED, "")
    try:
        case = case_of(row)
        step = interval(case.work, case.cluster)
        memory = program_memory(case.work)
    except UserError as problem:
        return {**empty, "predicted_note": str(problem)}
    note = (
        ""
        if step.calibrated
        else f"never calibrated: {case.cluster.device.generation} has no measured rows in "
        f"{case.work.precision}"
    )
    return {
        "predicted_step_s": f"{step.seconds:.5g}",
        "predicted_low": f"{step.low:.5g}",
        "predicted_high": f"{step.high:.5g}",
        "predicted_mem_gb": f"{memory.total / GB:.2f}",
        "predicted_fits": "true" if memory.fits(case.cluster) else "false",
        "predicted_note": note,
    }


def predict_file(source: str, target: str) -> str:
    """Write the rows of one CSV with their predictions into another; say how many.

    Raises ConfigError for a file that cannot be read or written.
    """
    columns, rows = read_rows(source)
    done = predict_rows(rows)
    text = io.StringIO()
    names = [*columns, *(name for name in PREDICTED if name not in columns)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(done)
    try:
        write_synced(Path(target), text.getvalue())
    except (FileNotFoundError, IsADirectoryError, PermissionError, NotADirectoryError) as problem:
        raise ConfigError(f"--out {target}: cannot be written: {reason(problem, target)}") from None
    without = sum(not row["predicted_step_s"] for row in done)
    rest = f"; {without} without, see predicted_note" if without else ""
    return "\n".join(
        [
            f"{target}: {len(done) - without} of {len(done)} rows predicted{rest}",
            *_misspelt(columns),
        ]
    )


def _misspelt(columns: Sequence[str]) -> list[str]:
    """A line for each column that is not read and looks like one that would be, and is absent."""
    absent = [name for name in OPTIONAL if name not in columns]
    likely = {
        name: nearest(name.strip().lower(), absent, MISSPELT)
        for name in columns
        if name not in (*NEEDED, *OPTIONAL)
    }
    return [
        f"column {name} is not read, and every row took the default of {known}: rename it, if it "
        f"is {known}"
        for name, known in likely.items()
        if known
    ]


def calibration_report(path: str, judges: Sequence[str] = ()) -> list[str]:
    """Markdown tables: errors by source, seen and unseen, and the fitted constants.

    `judges`: CSVs of rows that the fit does not see; the errors of each follow, by source.
    Raises ConfigError for files that cannot be read or have no measured row.
    """
    measured = _measured(path)
    others = [_measured(judge) for judge in judges]
    values = fit(measured)
    seen = [Judged(case, predicted(case, values)) for case in measured]
    unseen = leave_one_source_out(measured)

    table = [
        [source, device, *_errors(rows_seen), *_errors(rows_unseen)[1:]]
        for source, device, rows_seen, rows_unseen in _by_source(seen, unseen)
    ]
    inside = sum(_inside(one) for one in unseen)
    shares = [abs(one.error) for one in unseen]
    lines = markdown_table(
        ["source", "devices", "rows", "error, seen", "bias", "error, unseen", "bias"], table
    )
    lines += [
        "",
        f"All {len(unseen)} rows, unseen: mean error {_percent(sum(shares) / len(shares))}; "
        f"{inside} ({inside / len(unseen):.0%}) inside the interval of 90 %.",
        "",
        *markdown_table(["constant", "fitted"], [[k, f"{v:.4g}"] for k, v in values.items()]),
        *ranking_lines(unseen),
    ]
    return lines + [line for cases in others for line in _judged_lines(cases, values)]


def _measured(path: str) -> list[Case]:
    """Measured rows of a file. Raises ConfigError for none."""
    cases = [case for case in cases_of(read_rows(path)[1]) if isinstance(case, Case)]
    measured = [case for case in cases if case.measured_seconds]
    if not measured:
        raise ConfigError(f"{path}: no row with a measured time (published_step_s)")
    return measured


def _judged_lines(cases: Sequence[Case], values: Values) -> list[str]:
    """Errors on rows that no fit has seen, by source.

    A generation that the fit has not seen keeps its shipped constants.
    """
    judged = [Judged(case, predicted(case, values)) for case in cases]
    table = [
        [source, device, *_errors(own), f"{sum(map(_inside, own))} of {len(own)}"]
        for source, device, own, _ in _by_source(judged, judged)
    ]
    shares = [abs(one.error) for one in judged]
    inside = sum(map(_inside, judged))
    return [
        "",
        *markdown_table(["kept-back source", "devices", "rows", "error", "bias", "inside"], table),
        "",
        f"All {len(judged)} kept-back rows: mean error {_percent(sum(shares) / len(shares))}; "
        f"{inside} ({inside / len(judged):.0%}) inside the interval of 90 %.",
        *ranking_lines(judged),
    ]


def _by_source(
    seen: Sequence[Judged], unseen: Sequence[Judged]
) -> list[tuple[str, str, list[Judged], list[Judged]]]:
    """Rows of each source, in the file's order."""
    found = []
    for source in dict.fromkeys(one.case.source for one in seen):
        own = [one for one in seen if one.case.source == source]
        other = [one for one in unseen if one.case.source == source]
        devices = sorted({one.case.cluster.device.name for one in own})
        found.append((source.split(" (")[0], ", ".join(devices), own, other))
    return found


def _errors(judged: Sequence[Judged]) -> list[str]:
    errors = [one.error for one in judged]
    mean = sum(map(abs, errors)) / len(errors)
    return [str(len(errors)), _percent(mean), f"{sum(errors) / len(errors):+.1%}"]


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _inside(one: Judged) -> bool:
    """Whether the measured time is within the interval around an unseen prediction."""
    found = interval(one.case.work, one.case.cluster)
    measured = one.case.measured_seconds or math.nan
    return (
        one.seconds * found.low / found.seconds
        <= measured
        <= (one.seconds * found.high / found.seconds)
    )
