"""Collective agreement on host objects: all ranks get the same result or raise the same error.

- Saving uses the background group, so that its thread never meets training collectives.
- A rank that failed alone would leave the others in the next collective until the group's timeout.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from k2train.errors import UnavailableError, UserError
from k2train.parallel.comm_tracker import collective_scope
from k2train.parallel.grid import ProcessGrid

T = TypeVar("T")
Problem = str | UnavailableError
"""What is wrong ("" for nothing), or why a rank cannot say."""


class SaveError(RuntimeError):
    """A checkpoint could not be saved.

    Raised on every rank alike; earlier checkpoints are untouched.
    """


class DiskRefused(SaveError):
    """The disk refused the write. The partial files are useless, but a later save may succeed."""


class Agreement:
    """Exchange of small objects between all ranks. Every method is collective.

    - In the group of the main thread. `what` names an exchange for the watchdog: without a name, it
      would take the ranks that wait in it for stuck.
    - `background`: in the group of the saving thread, which has no phase of its own.
    """

    def __init__(self, grid: ProcessGrid, background: bool = False):
        self.group = grid.background if background else grid.host
        self.comm = None if background else grid.comm
        self.rank, self.world_size = grid.rank, grid.layout.world_size

    def do(self, part: Callable[[], T], refused: Callable[[OSError], SaveError]) -> T:
        """Run `part` on every rank; every rank raises the first error there was.

        Returns this rank's result. `refused` turns an OSError into the SaveError to raise.
        """
        value: Any = None
        problem: Exception | None = None
        try:
            value = part()
        except OSError as error:
            problem = refused(error)
        except (UserError, SaveError) as error:
            problem = error
        except Exception as error:
            # The other ranks must learn of any error, or they would wait for this rank.
            problem = SaveError(f"a checkpoint could not be saved: rank {self.rank}: {error!r}")

        for failure in self.all(problem):
            if failure is not None:
                raise failure
        result: T = value
        return result

    def all(self, value: T, what: str = "") -> list[T]:
        """Gather every rank's value on every rank."""
        parts: list[Any] = [None] * self.world_size
        with collective_scope(self.comm, what):
            dist.all_gather_object(parts, value, group=self.group)
        return parts

    def first(self, problem: Problem, what: str = "") -> tuple[int, str] | None:
        """Return the lowest rank with a problem, and its problem; None when no rank has one.

        Raises UnavailableError on every rank when one of them could not look.
        """
        told = self.all((str(problem), isinstance(problem, UnavailableError)), what)
        problems = [(rank, text, away) for rank, (text, away) in enumerate(told) if text]
        for rank, text, away in problems:
            if away:
                raise UnavailableError(f"rank {rank}: {text}")
        return problems[0][:2] if problems else None

    def to_first(self, value: T) -> list[T]:
        """Gather every rank's value on rank 0; other ranks get an empty list."""
        parts: list[Any] = [None] * self.world_size if self.rank == 0 else []
        dist.gather_object(value, parts or None, dst=0, group=self.group)
        return parts

    def from_first(self, value: T, what: str = "") -> T:
        """Broadcast rank 0's value to every rank."""
        shared: list[Any] = [value]
        with collective_scope(self.comm, what):
            dist.broadcast_object_list(shared, src=0, group=self.group)
        result: T = shared[0]
        return result

    def sum(self, value: torch.Tensor, what: str = "") -> torch.Tensor:
        """Sum a host tensor of integers over all ranks, in place."""
        with collective_scope(self.comm, what):
            dist.all_reduce(value, group=self.group)
        return value
