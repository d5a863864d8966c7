"""Flags that the ranks sum in a step's exchange, and what they agree on by them."""

from typing import NamedTuple

STOP, SAVE, FAILED, SECONDS = 0, 1, 2, 3
"""Indices of the flags in the step's exchange; from `SECONDS` on one per rank."""
SAVE_ASKED = 2.0
"""Value of the flag of saves when somebody asked for one; 1 when only the time has come."""


def no_flags(world_size: int) -> list[float]:
    """Return flags that ask for nothing, as many as those of a step on `world_size` ranks.

    The bits of a step may depend on the length of its exchange.
    """
    return [0.0] * (SECONDS + world_size)


class Agreed(NamedTuple):
    """What the ranks agreed on in a step's exchange."""

    stop: str | None
    """Reason to stop, None to go on."""
    save_asked: bool
    save_due: bool
    """Whether a save was asked for, or it is time for one."""
    failed: bool
    """Whether a rank could not save or record."""
    slow: str | None
    """A line when a rank became slow or recovered."""
