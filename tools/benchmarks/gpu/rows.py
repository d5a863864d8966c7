"""Rows of results, as parts write them, and figures read from several of them.

- A row is a dictionary: `part`, `what`, `status`, `why`, and its figures. A status is ok, skipped
  (no time), unavailable (not on this device or machine), failed, out of memory, or no device.
- Standard library only.
"""

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
FAIR = "fair peer"
"""Contender of the same precision as k2train, on plain torch."""


def of(rows: Sequence[Row], part: str) -> list[Row]:
    """Rows of a part."""
    return [row for row in rows if row["part"] == part]


def fine(rows: Sequence[Row], part: str, key: str) -> list[Row]:
    """Rows of a part that have a figure."""
    return [row for row in of(rows, part) if row["status"] == "ok" and row.get(key) is not None]


def matmul_rate(rows: Sequence[Row]) -> float | None:
    """Best sustained rate of this call, FLOP/s."""
    return max(
        (row["flops_per_second"] for row in fine(rows, "device", "flops_per_second")), default=None
    )


def data_sheet(rows: Sequence[Row]) -> float | None:
    """FLOP/s of the device's data sheet; None if unknown."""
    return next((row["data_sheet_flops"] for row in fine(rows, "device", "data_sheet_flops")), None)


def peak_ratio(row: Row) -> float | None:
    """Measured over planned peak of a row; None if either is unknown."""
    return ratio(row["peak_bytes"], row["planned_bytes"])


def ratio(mine: float | None, theirs: float | None) -> float | None:
    """Quotient of two numbers; None if either is unknown."""
    return None if mine is None or not theirs else mine / theirs


def work_text(row: Row) -> str:
    """Micro-batches of a step of a whole model."""
    return f"{row['microbatches']} x {row['batch']}"


def against(row: Row, rows: Sequence[Row], name: str) -> float | None:
    """Tokens per second of a row over those of a contender at the same model and batch."""

    def work(one: Row) -> tuple[str, ...]:
        return one["model"], work_text(one)

    found = (one for one in rows if one["contender"] == name and work(one) == work(row))
    other = next(found, None)
    return None if other is None else row["tokens_per_second"] / other["tokens_per_second"]
