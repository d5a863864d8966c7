"""What a contender is to the worker that runs it: a module with `build(work, precision, options, rank, world) -> Built`.

The process group (gloo) is up and the thread count set when `build` is called; every rank of a contender calls it.
"""

from collections.abc import Callable
from dataclasses import dataclass


class UnavailableError(Exception):
    """Raised by `build` where the contender cannot run; the text says why and goes into its row."""


@dataclass(frozen=True)
class Built:
    """A contender ready to run: `step` does one optimizer step and gives the mean loss where this rank knows it."""

    step: Callable[[], float | None]
    parameters: int
    """Of the whole model, each counted once: the same for all contenders, or they do not do the same work."""
    note: str = ""
