"""Agreement of ranks: one result or one error everywhere, each exchange under its name."""

from typing import Any

import pytest
import torch

from k2train.errors import RunError
from k2train.launch.environment import Launch
from k2train.parallel.agreement import Agreement, SaveError
from k2train.parallel.comm_tracker import CommTracker
from k2train.parallel.grid import ProcessGrid
from k2train.plan.layout import Layout
from tests.support.gloo_pool import GlooPool

CPU = torch.device("cpu")


class Named(CommTracker):
    """Remembers the names of its exchanges."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def collective(self, name: str) -> Any:
        self.names.append(name)
        return super().collective(name)


def exchange_job(launch: Launch, background: bool) -> tuple[Any, list[str]]:
    rank = launch.rank
    comm = Named()
    grid = ProcessGrid(Layout(data=3, tensor=1, pipeline=1), rank, CPU, comm)
    agreement = Agreement(grid, background=background)
    found = (
        agreement.all(f"r{rank}", "all"),
        agreement.first("" if rank == 0 else f"problem {rank}", "first"),
        agreement.first("", "none"),
        agreement.from_first({"token": rank + 7}, "from"),
        agreement.sum(torch.tensor([rank, 1]), "sum").tolist(),
        agreement.to_first(rank),
    )
    return found, comm.names


@pytest.mark.parametrize("background", (False, True))
def test_every_rank_gets_the_same(pool: GlooPool, background: bool) -> None:
    """Catches the problem of the last rank for that of the first, and a value of the wrong rank."""
    for rank, (found, names) in enumerate(pool.run(3, exchange_job, background)):
        assert found[:5] == (
            ["r0", "r1", "r2"],
            (1, "problem 1"),
            None,
            {"token": 7},
            [3, 3],
        )
        assert found[5] == ([0, 1, 2] if rank == 0 else [])
        # The saving thread has no phase, so it must not move the one of the main thread.
        assert names == ([] if background else ["all", "first", "none", "from", "sum"])


def error_job(launch: Launch, error: Exception) -> str:
    grid = ProcessGrid(Layout(data=2, tensor=1, pipeline=1), launch.rank, CPU)

    def part() -> str:
        if launch.rank == 1:
            raise error
        return "done"

    try:
        return Agreement(grid, background=True).do(part, lambda e: SaveError(f"disk: {e.strerror}"))
    except (RunError, SaveError) as raised:
        return f"{type(raised).__name__}: {raised}"


@pytest.mark.parametrize(
    ("error", "words"),
    (
        (OSError(28, "No space left"), "SaveError: disk: No space left"),
        (RunError("another owner"), "RunError: another owner"),
        (KeyError("bug"), "SaveError: a checkpoint could not be saved: rank 1: KeyError('bug')"),
    ),
)
def test_an_error_of_one_rank_is_everyones(pool: GlooPool, error: Exception, words: str) -> None:
    """Catches a rank that leaves alone: the other would wait until the group's timeout."""
    assert pool.run(2, error_job, error, timeout_seconds=60) == [words, words]
