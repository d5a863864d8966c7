"""Registry of fault rows: their numbers, names and order; each row is a function of the bench."""

import time
import traceback
from collections.abc import Callable

from fault_tests import (
    cases_clock,
    cases_data,
    cases_disk,
    cases_full_disk,
    cases_host,
    cases_kill,
    cases_network,
    cases_resume,
    cases_signal,
    cases_value,
    endurance,
)
from fault_tests.result import Bench, Result
from k2train.fault_injection import PERMISSION, POINTS, SIGNALS, VARIABLE

ROWS: dict[int, Callable[[Bench], Result]] = {
    1: cases_kill.row_1,
    2: cases_kill.row_2,
    3: cases_kill.row_3,
    4: cases_disk.row_4,
    5: cases_disk.row_5,
    6: cases_disk.row_6,
    7: cases_full_disk.row_7,
    8: cases_signal.row_8,
    9: cases_signal.row_9,
    10: cases_network.row_10,
    11: cases_signal.row_11,
    12: cases_value.row_12,
    17: cases_value.row_17,
    18: cases_resume.row_18,
    19: cases_resume.row_19,
    20: cases_resume.row_20,
    21: cases_data.row_21,
    22: cases_data.row_22,
    23: cases_host.row_23,
    24: cases_host.row_24,
    25: cases_clock.row_25,
    26: cases_host.row_26,
    27: cases_host.row_27,
    28: cases_host.row_28,
    29: cases_host.row_29,
    30: endurance.row_30,
}
"""Rows 13 to 16 of the table are about spikes of the loss and no part of this tool."""


TITLES = {
    1: "SIGKILL to a rank in the middle of a step",
    2: "SIGKILL and power loss at every phase of a save, and at random moments of one",
    3: "SIGKILL while old checkpoints are removed or set aside",
    4: "a stale, empty or cut pointer, extra files",
    5: "one flipped bit in a file",
    6: "a shard cut, empty, missing, exchanged, or one too many",
    7: "the disk full, or failing, in a save",
    8: "SIGTERM, SIGUSR1, SIGINT, and the launcher's",
    9: "a rank hangs (SIGSTOP)",
    10: "the network between two ranks cut",
    11: "one rank slow in every step",
    12: "NaN or Inf in a gradient or a loss",
    17: "a bit flips in memory",
    18: "going on with the same layout",
    19: "going on with another layout",
    20: "the same run twice",
    21: "bad ids, lengths, JSON, UTF-8",
    22: "a chunk missing, changed, cut, exchanged; every sample once",
    23: "two jobs in one run directory",
    24: "a lease whose owner is dead",
    25: "the clock jumps by an hour",
    26: "another config at a restart",
    27: "the run dies at the same place again and again",
    28: "hostile checkpoints, configs and data",
    29: "a secret in the environment",
    30: "endurance: many mixed faults in one run",
}
"""Row -> its fault, in a few words."""


def listing() -> str:
    """List the rows, and how to make a fault by hand."""
    lines = ["Rows (--rows):", *(f"  {row:2d}  {TITLES[row]}" for row in ROWS), ""]
    lines += [
        f"Faults by hand, in any run: {VARIABLE}='POINT[@rank=R][@step=S][@nth=N]:ACTION;...'",
        f"(and run.allow=[{PERMISSION}] in its config)",
        "Points, in order:",
    ]
    lines += [f"  {point}" for point in POINTS]
    lines += [
        f"with actions {', '.join(SIGNALS)}, exit=CODE, sleep=SECONDS, error=ERRNO (such as "
        "ENOSPC)",
        "Values:",
    ]
    lines += [f"  {line}" for line in VALUE_LINES]
    return "\n".join(lines)


VALUE_LINES = (
    "gradient@rank=1@step=4:nan=TENSOR       nan, inf or huge, on that rank",
    "loss@step=4@nth=2:nan                   of the second micro-batch",
    "weight@rank=1@step=5:flip=TENSOR        one bit of a weight in use",
    "moment@rank=0@step=5:flip=TENSOR.exp_avg  one bit of a state of the optimizer",
)


SAME_WHEN_SHORT = (20, 21, 24, 26, 27, 28, 29)
"""Rows that leave nothing out at the short level."""
SHORTENED = "most of what is asked for above: this was the short level, with a few of each kind"


def run_row(bench: Bench, row: int) -> Result:
    """Run one row.

    An error of the experiment itself makes the row fail and never ends the table.
    """
    began = time.monotonic()
    bench.log(f"row {row}")

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

    if bench.short and row not in SAME_WHEN_SHORT:
        result.missing.append(SHORTENED)
    result.seconds = time.monotonic() - began
    return result
