"""Agreement of ranks: one result or one error everywhere, each exchange under its name."""

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from k2train.errors import RunError, UnavailableError
from k2train.launch.environment import Launch
from k2train.parallel import agreement as agreement_module
from k2train.parallel.agreement import Agreement, SaveError
from k2train.parallel.comm_tracker import CommTracker
from k2train.parallel.grid import ProcessGrid
from k2train.parallel.messages import FLAG, DiskRefused, MessageError
from k2train.plan.layout import Layout
from tests.support.gloo_pool import GlooPool

CPU = torch.device("cpu")
TEXT = TypeAdapter(str)
COUNT = TypeAdapter(int)
TOKEN = TypeAdapter(dict[str, int])
FACTS: TypeAdapter[tuple[float, int, str] | None] = TypeAdapter(tuple[float, int, str] | None)


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
        agreement.all(f"r{rank}", TEXT, "all"),
        agreement.first("" if rank == 0 else f"problem {rank}", "first"),
        agreement.first("", "none"),
        agreement.from_first({"token": rank + 7}, TOKEN, "from"),
        agreement.sum(torch.tensor([rank, 1]), "sum").tolist(),
        agreement.to_first(torch.tensor([[rank, 5]])).tolist(),
        agreement.distinct(rank // 2, COUNT, "distinct"),
    )
    return found, comm.names


NAMES = ["all", "first", "none", "from", "sum", "distinct"]


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
        assert found[5] == ([[[0, 5]], [[1, 5]], [[2, 5]]] if rank == 0 else [])
        assert found[6] == [0, 1]
        # The saving thread has no phase, so it must not move the one of the main thread.
        assert names == ([] if background else NAMES)


def error_job(launch: Launch, error: Exception) -> str:
    grid = ProcessGrid(Layout(data=2, tensor=1, pipeline=1), launch.rank, CPU)

    def part() -> str:
        if launch.rank == 1:
            raise error
        return "done"

    try:
        return Agreement(grid, background=True).do(part, lambda e: SaveError(f"disk: {e.strerror}"))
    except (RunError, SaveError, UnavailableError) as raised:
        return f"{type(raised).__name__}: {raised}"


@pytest.mark.parametrize(
    ("error", "words"),
    (
        (OSError(28, "No space left"), "SaveError: disk: No space left"),
        (RunError("another owner"), "RunError: another owner"),
        (UnavailableError("server is away", 5), "UnavailableError: server is away"),
        (DiskRefused("disk is full"), "DiskRefused: disk is full"),
        (KeyError("bug"), "SaveError: a checkpoint could not be saved: rank 1: KeyError('bug')"),
    ),
)
def test_an_error_of_one_rank_is_everyones(pool: GlooPool, error: Exception, words: str) -> None:
    """Catches a rank that leaves alone: the other would wait until the group's timeout."""
    assert pool.run(2, error_job, error) == [words, words]


def values_job(launch: Launch) -> Any:
    """Messages of other lengths on every rank, one of them nothing at all."""
    grid = ProcessGrid(Layout(data=3, tensor=1, pipeline=1), launch.rank, CPU)
    agreement = Agreement(grid)
    mine = [None, (math.nan, 2**63 - 1, "ä\n" * 5000), (-math.inf, -(2**63), "a\udc80")][
        launch.rank
    ]
    return (
        agreement.all(mine, FACTS),
        agreement.distinct(mine, FACTS),
        agreement.from_first(None, FACTS),
        agreement.from_first((0.1, launch.rank, ""), FACTS),
        agreement.all(None, FACTS),
        agreement.distinct(None, FACTS),
    )


def test_values_arrive_as_they_were(pool: GlooPool) -> None:
    """Catches a float that JSON has no number for, a tuple that becomes a list, and a message that
    is cut or filled to the length of another.
    """
    for gathered, different, nothing, first, none, no_difference in pool.run(3, values_job):
        assert gathered[0] is None and nothing is None
        assert math.isnan(gathered[1][0]) and gathered[1][1:] == (2**63 - 1, "ä\n" * 5000)
        assert gathered[2] == (-math.inf, -(2**63), "a\udc80")
        assert first == (0.1, 0, "") and none == [None] * 3
        assert repr(different) == repr(gathered) and no_difference == [None]


def limits_job(launch: Launch, longest: int, together: int) -> list[str]:
    grid = ProcessGrid(Layout(data=2, tensor=1, pipeline=1), launch.rank, CPU)
    limits = agreement_module.MAX_BYTES, agreement_module.MAX_GATHERED_BYTES
    agreement_module.MAX_BYTES, agreement_module.MAX_GATHERED_BYTES = longest, together
    agreement, text, found = Agreement(grid), "x" * (90 if launch.rank == 1 else 190), []
    try:
        for exchange in (agreement.all, agreement.distinct, agreement.from_first):
            try:
                exchange(text, TEXT)
            except MessageError as error:
                found.append(str(error))
            else:
                found.append("done")
        # The ranks still agree on what comes next, and no connection was lost.
        assert grid.comm.broken == ""
        return [*found, *map(str, agreement.all(launch.rank, COUNT))]
    finally:
        agreement_module.MAX_BYTES, agreement_module.MAX_GATHERED_BYTES = limits


@pytest.mark.parametrize(
    ("longest", "together", "words"),
    (
        (192, 384, ["done"] * 3),
        (191, 384, ["rank 0 would send 192 bytes to other ranks at once, the limit is 191"] * 3),
        (
            192,
            383,
            ["2 messages of up to 192 bytes are more than a rank takes at once (383 bytes)"]
            + ["done"] * 2,
        ),
    ),
)
def test_a_message_that_is_too_long_is_everyones_error(
    pool: GlooPool, longest: int, together: int, words: list[str]
) -> None:
    """Catches room for any size that a rank names, and a limit that only the sender knows."""
    assert pool.run(2, limits_job, longest, together) == [[*words, "0", "1"]] * 2


def form_job(launch: Launch) -> str:
    """Rank 1 expects another form, as with two versions of the code."""
    grid = ProcessGrid(Layout(data=2, tensor=1, pipeline=1), launch.rank, CPU)
    try:
        Agreement(grid).from_first({"token": 7}, TOKEN if launch.rank == 0 else FLAG)  # type: ignore[arg-type]
    except MessageError as error:
        return str(error)
    return "taken"


def test_a_message_of_another_form_is_refused(pool: GlooPool) -> None:
    taken, refused = pool.run(2, form_job)
    assert taken == "taken" and refused.startswith("a message of another form: ")
