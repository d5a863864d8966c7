"""Which rows there are, in order; a row is a function of the bench."""

import time
import traceback
from collections.abc import Callable

from fault_runs import endurance, rows_disk, rows_host, rows_kill, rows_signal, rows_value
from fault_runs.result import Bench, Result

ROWS: dict[int, Callable[[Bench], Result]] = {
    1: rows_kill.row_1,
    2: rows_kill.row_2,
    3: rows_kill.row_3,
    4: rows_disk.row_4,
    5: rows_disk.row_5,
    6: rows_disk.row_6,
    7: rows_disk.row_7,
    8: rows_signal.row_8,
    9: rows_signal.row_9,
    10: rows_signal.row_10,
    11: rows_signal.row_11,
    12: rows_value.row_12,
    17: rows_value.row_17,
    18: rows_value.row_18,
    19: rows_value.row_19,
    20: rows_value.row_20,
    21: rows_host.row_21,
    22: rows_host.row_22,
    23: rows_host.row_23,
    24: rows_host.row_24,
    25: rows_host.row_25,
    26: rows_host.row_26,
    27: rows_host.row_27,
    28: rows_host.row_28,
    29: rows_host.row_29,
    30: endurance.row_30,
}
"""Rows 13 to 16 of the table are about spikes of the loss and no part of this tool."""


def run_row(bench: Bench, row: int) -> Result:
    """Run one row. What goes wrong in the experiment itself is a row that did not hold, never the end of the table."""
    began = time.monotonic()
    bench.say(f"row {row}")
    try:
        result = ROWS[row](bench)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        result = Result(
            row,
            f"row {row}",
            "",
            "",
            problems=[f"the experiment failed: {error!r} ({where.name}, line {where.lineno})"],
        )
    if bench.short:
        result.how += " (short level: a part of this)"
    result.seconds = time.monotonic() - began
    return result
