"""When this process was started, on the clock of `time.monotonic`; standard library only.

- Importing torch takes 10 to 25 seconds from a cold disk. A deadline that counts from a line of
  Python after it would forget them.

Alternatives considered:
- The starter's own reading as an argument: it would count for one way of starting only.
"""

import os
import time

from k2train.processes import start_ticks


def process_start_seconds() -> float:
    """Reading of `time.monotonic` at the start of this process; the present one without /proc."""
    now = time.monotonic()
    ticks = start_ticks(os.getpid())
    if not ticks:
        return now
    # Both since boot; the kernel counts a suspended machine's time in them, too.
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return now - max(age, 0.0)
