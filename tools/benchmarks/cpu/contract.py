"""Contender interface: a module with `build(work, precision, options, rank, world) -> Built`.

When `build` is called, the process group (gloo) is up and the number of threads is set. Every rank
of a contender calls it.
"""

from collections.abc import Callable
from dataclasses import dataclass


class UnavailableError(Exception):
    """Raised where a contender or a part cannot run; the message goes into its row."""


@dataclass(frozen=True)
class Built:
    """A contender ready to run.

    `step` does one optimizer step and returns the mean loss where this rank knows it.
    """

    step: Callable[[], float | None]
    parameters: int
    """Of the whole model, each counted once: the same for all contenders, or they do not do the
    same work.
    """
    note: str = ""
