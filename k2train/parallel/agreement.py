"""Parts of a save that all ranks do, and that end alike on all of them: with a result, or with the same error.

A rank that failed alone would leave the others waiting in the next collective, for as long as the group's timeout.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from k2train.errors import UserError
from k2train.parallel.grid import ProcessGrid

T = TypeVar("T")


class SaveError(RuntimeError):
    """A checkpoint could not be saved; raised on every rank alike. Those saved before are untouched."""


class DiskRefused(SaveError):
    """The disk refused it: what was written is of no use, but the same save may go well later."""


class Agreement:
    """Exchanges over the group of the thread that saves. Every method is collective."""

    def __init__(self, grid: ProcessGrid):
        self.group, self.rank, self.world_size = grid.background, grid.rank, grid.layout.world_size

    def do(self, part: Callable[[], T], refused: Callable[[OSError], SaveError]) -> T:
        """This rank's result of `part`, or the first rank's error on every rank; `refused` words an OSError."""
        mine: Any = None
        problem: Exception | None = None
        try:
            mine = part()
        except OSError as error:
            problem = refused(error)
        except (UserError, SaveError) as error:
            problem = error
        except Exception as error:
            # Whatever it is, the other ranks must hear of it.
            problem = SaveError(f"a checkpoint could not be saved: rank {self.rank}: {error!r}")
        for found in self.all(problem):
            if found is not None:
                raise found
        result: T = mine
        return result

    def all(self, mine: T) -> list[T]:
        """Every rank's value on every rank."""
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, mine, group=self.group)
        return parts

    def to_first(self, mine: T) -> list[T]:
        """Every rank's value on rank 0; elsewhere an empty list."""
        parts: list[Any] = [None] * self.world_size if self.rank == 0 else []
        dist.gather_object(mine, parts or None, dst=0, group=self.group)
        return parts

    def from_first(self, mine: T) -> T:
        """Rank 0's value on every rank."""
        shared: list[Any] = [mine]
        dist.broadcast_object_list(shared, src=0, group=self.group)
        result: T = shared[0]
        return result

    def sum(self, mine: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of a host tensor of whole numbers, in place."""
        dist.all_reduce(mine, group=self.group)
        return mine
